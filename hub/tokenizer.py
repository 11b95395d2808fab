"""The tokenizer of a Hugging Face folder, read by the library that `transformers` uses.

>>> byte_of["Ġ"]  # tokenizer.json writes each byte as one printable character, the space as Ġ
32
"""

import codecs
import re
from functools import cache
from pathlib import Path
from typing import Any
from unicodedata import normalize

from errors import UserError
from hub.chat import NAMES, Template
from hub.weights import one_line, read_json, refuse

printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
others = [byte for byte in range(256) if byte not in printable]
byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

ANSWER = "\ue000"  # a character that no template changes


class Tokenizer:
    """A byte-level tokenizer and its chat template; ids and prompts equal those of `transformers`.

    end is the token that the template puts behind an assistant's text, stops are all ids that end a response,
    ascending, vocab_size is the largest id plus 1, and special finds special tokens in a text.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        self.library = open_library(folder)
        self.bytes_of = cache(self.bytes_of)  # the same tokens come again and again
        self.added = {id: token.content for id, token in self.library.get_added_tokens_decoder().items()}
        self.vocab_size = max(self.library.get_vocab().values(), default=-1) + 1
        longest_first = sorted(map(re.escape, self.added.values()), key=len, reverse=True)
        self.special = re.compile("|".join(longest_first) or "(?!)")
        settings = read_json(folder / "tokenizer_config.json", optional=True)
        if "added_tokens_decoder" not in settings:
            settings |= read_json(folder / "special_tokens_map.json", optional=True)
        self.template = Template(folder, settings, check_named(folder, settings, self.library))
        chat = self.chat([("user", "a"), ("assistant", ANSWER), ("user", "b")])
        end = re.search(f"{ANSWER}({self.special.pattern})", chat)
        refuse(folder, {"a chat template without a token behind an answer": end is None})
        self.end = self.encode(end[1])[0]
        self.stops = stop_tokens(folder, self.end)

    def encode(self, text: str) -> list[int]:
        """Text -> ids; special tokens written in the text become one id each, and none is added.

        Raises UserError where the ids decode to another text, its Unicode normal form aside.
        """
        try:
            ids = self.library.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # half of a surrogate pair
            raise UserError(f"{text[:40]!r} is no valid Unicode; leave it out") from error
        decoded = b"".join(map(self.bytes_of, ids)).decode("utf-8", "replace")
        if normalize("NFC", decoded) != normalize("NFC", text):
            raise UserError(f"{text[:40]!r} holds a character outside the tokenizer's vocabulary; leave it out")
        return ids

    def bytes_of(self, id: int) -> bytes:
        """A token's UTF-8, perhaps only a part of a character; empty for an id that is no token."""
        if id in self.added:
            return self.added[id].encode()
        token = self.library.id_to_token(id) or ""
        return bytes(byte_of[c] for c in token) if all(c in byte_of for c in token) else token.encode()

    def pieces(self, ids: list[int]) -> list[str]:
        """The text of each token; a character that several tokens make up belongs to the first of them.

        Stop tokens and what comes after them have no text; bytes that are no character show as a replacement.
        """
        utf8, texts, first = codecs.getincrementaldecoder("utf-8")("replace"), [""] * len(ids), 0
        for i, id in enumerate(ids):
            if id in self.stops:
                break
            for byte in self.bytes_of(id):
                if not utf8.getstate()[0]:  # no character is incomplete, a new one begins
                    first = i
                text = utf8.decode(bytes([byte]))  # two characters if this byte does not continue the incomplete one
                texts[first] += text[:1]
                texts[i] += text[1:]
                if len(utf8.getstate()[0]) == 1:  # this byte begins a character
                    first = i
        if ids:
            texts[first] += utf8.decode(b"", final=True)
        return texts

    def chat(self, turns: list[tuple[str, str]]) -> str:
        """The prompt that asks for the assistant's answer to turns of (role, text)."""
        return self.template.render(turns)


def open_library(folder: Path) -> Any:
    """tokenizer.json as a `tokenizers.Tokenizer`; UserError where it is damaged or its tokens are no bytes."""
    try:
        from tokenizers import Tokenizer
        from tokenizers.decoders import ByteLevel
    except ImportError as error:
        raise UserError('reading tokenizer.json needs tokenizers; pip install -e ".[real]"') from error
    path = folder / "tokenizer.json"
    read_json(path)
    try:
        library = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"{path} is no tokenizer ({one_line(error)}); download it again") from error
    library.no_truncation()
    library.no_padding()
    added = library.get_added_tokens_decoder().values()
    refusals = {
        "a decoder that is not byte-level": not isinstance(library.decoder, ByteLevel),
        "a tokenizer that draws at random": getattr(library.model, "dropout", None),
        "special tokens that take in white space": any(token.lstrip or token.rstrip for token in added),
    }
    refuse(folder, refusals)
    return library


def check_named(folder: Path, settings: dict[str, Any], library: Any) -> dict[str, str]:
    """The special tokens with names; UserError where files beside tokenizer.json have other special tokens than it."""
    from tokenizers import AddedToken

    def text(token: Any) -> Any:
        return token["content"] if isinstance(token, dict) else token

    tokens = library.get_added_tokens_decoder()
    ids = {token.content: id for id, token in tokens.items()}
    listed, more = settings.get("added_tokens_decoder") or {}, settings.get("extra_special_tokens")
    more, legacy = (
        more or settings.get("additional_special_tokens") or [],
        read_json(folder / "added_tokens.json", True),
    )
    try:
        named = {name: text(settings[name]) for name in NAMES if settings.get(name) is not None}
        named_or_more = {*named.values(), *map(text, more.values() if isinstance(more, dict) else more)}
        same = named_or_more <= ids.keys() and not settings.get("split_special_tokens")
        same &= all(repr(AddedToken(**token)) == repr(tokens[int(id)]) for id, token in listed.items())
        same &= legacy.items() <= ids.items()
    except (TypeError, ValueError, KeyError, AttributeError):
        same = False
    if not same:
        raise UserError(f"the special tokens in {folder} differ from file to file; choose another model")
    return named


def stop_tokens(folder: Path, end: int) -> tuple[int, ...]:
    """The ids that end an answer, ascending: the end of a turn and those of the folder's config files."""
    stops = {end}
    for name in ("config.json", "generation_config.json"):
        ids = read_json(folder / name, optional=True).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(id) is int and id >= 0 for id in ids):
            raise UserError(f"eos_token_id in {folder / name} is {ids!r:.40} but must be token ids; download it again")
        stops.update(ids)
    return tuple(sorted(stops))
