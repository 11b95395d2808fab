"""The tokenizer and chat template of a Hugging Face folder, as `transformers` applies them.

>>> byte_of["Ġ"]  # tokenizer.json writes each byte as one printable character, the space as Ġ
32
"""

import codecs
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar
from unicodedata import normalize

from errors import UserError
from hub.weights import read_json, refuse

printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
others = [byte for byte in range(256) if byte not in printable]
byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

NAMES = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
ANSWER = "\ue000"  # no template changes it


class Tokenizer:
    """A byte-level tokenizer; its ids and prompts equal those of `transformers`.

    end is the token that the chat template puts behind an assistant's text, stops are the ids that end a response,
    ascending, vocab_size is the largest id plus 1, and special finds special tokens in a text.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = folder = Path(folder)
        self.library = open_library(folder)
        tokens = self.library.get_added_tokens_decoder()
        self.added = {id: token.content for id, token in tokens.items()}
        settings = read_json(folder / "tokenizer_config.json", optional=True)
        if "added_tokens_decoder" not in settings:
            settings |= read_json(folder / "special_tokens_map.json", optional=True)
        check_added(folder, settings, tokens)
        self.names = {name: text_of(settings[name]) for name in NAMES if settings.get(name) is not None}
        self.template = compile_template(folder, settings)
        longest_first = sorted(map(re.escape, self.added.values()), key=len, reverse=True)
        self.special = re.compile("|".join(longest_first) or "(?!)")
        self.vocab_size = max(self.library.get_vocab().values()) + 1
        chat = self.chat([("user", "a"), ("assistant", ANSWER), ("user", "b")])
        end = self.special.match(chat, chat.find(ANSWER) + 1)
        refuse(folder, {"a chat template without a token behind an answer": ANSWER not in chat or end is None})
        self.end = self.encode(end[0])[0]
        self.stops = stop_tokens(folder, self.end)

    def encode(self, text: str) -> list[int]:
        """Text -> ids; special tokens written in the text become one id each, and none is added.

        Raises UserError where the ids do not hold the whole text, apart from its Unicode normal form.
        """
        try:
            ids = self.library.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # half of a surrogate pair
            raise UserError(f"{text[:40]!r} is no valid Unicode; leave it out") from error
        held = b"".join(map(self.bytes_of, ids)).decode("utf-8", "replace")
        if normalize("NFC", held) != normalize("NFC", text):
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
                if not utf8.getstate()[0]:
                    first = i  # the token in which the current character begins
                text = utf8.decode(bytes([byte]))  # two characters where this byte breaks off the current one
                texts[first] += text[:1]
                texts[i] += text[1:]
                if len(utf8.getstate()[0]) == 1:
                    first = i
        if ids:
            texts[first] += utf8.decode(b"", final=True)
        return texts

    def chat(self, turns: list[tuple[str, str]]) -> str:
        """The prompt that asks for the assistant's answer to turns of (role, text), without thinking where it can."""
        messages = [{"role": role, "content": text} for role, text in turns]
        settings = {"tools": None, "documents": None, "add_generation_prompt": True, "enable_thinking": False}
        try:
            return self.template.render(messages=messages, **settings, **self.names)
        except Exception as error:  # a template may raise anything
            raise UserError(
                f"the chat template of {self.folder} fails ({line(error)}); choose another model"
            ) from error


def line(error: Exception) -> str:
    return " ".join(str(error).split())


def text_of(token: Any) -> Any:
    """The text of a special token, which some files write as an object."""
    return token.get("content") if isinstance(token, dict) else token


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
        raise UserError(f"{path} is no tokenizer ({line(error)}); download it again") from error
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


def check_added(folder: Path, settings: dict[str, Any], tokens: dict[int, Any]) -> None:
    """UserError where other files name special tokens that tokenizer.json lacks or has with other properties."""
    from tokenizers import AddedToken

    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    more = [*(settings.get(name) for name in NAMES), *(more.values() if isinstance(more, dict) else more)]
    texts = {token.content: id for id, token in tokens.items()} | {None: None}
    listed = settings.get("added_tokens_decoder") or {}
    legacy = read_json(folder / "added_tokens.json", optional=True)
    try:
        same = all(repr(AddedToken(**token)) == repr(tokens[int(id)]) for id, token in listed.items())
        same = same and all(texts[text] == id for text, id in legacy.items())
        same = same and all(text_of(token) in texts for token in more) and not settings.get("split_special_tokens")
    except (TypeError, ValueError, KeyError, AttributeError):
        same = False
    if not same:
        raise UserError(f"the special tokens in {folder} differ from file to file; choose another model")


def compile_template(folder: Path, settings: dict[str, Any]) -> Any:
    """The folder's chat template in Jinja's sandbox, with what `transformers` adds to the language."""
    try:
        from jinja2 import TemplateError, meta, nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UserError('chat templates need jinja2; pip install -e ".[real]"') from error

    class Generation(Extension):
        """A block that marks the assistant's text and changes nothing."""

        tags: ClassVar = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(x: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, **layout)

    path, source = folder / "chat_template.jinja", settings.get("chat_template")
    if isinstance(source, list):  # several with names
        source = {each.get("name"): each.get("template") for each in source if isinstance(each, dict)}
    source = source.get("default") if isinstance(source, dict) else source
    world = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    world.filters["tojson"] = to_json
    world.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    world.globals["dict"] = lambda *pairs, **named: dict(*pairs, **named)  # the class itself would open the sandbox
    try:
        source = path.read_text(encoding="utf-8") if path.is_file() else source
        refusals = {
            "no chat template": not isinstance(source, str),
            "several chat templates": not path.is_file() and (folder / "additional_chat_templates").exists(),
            "a chat template that looks into Python": "__" in str(source),
        }
        refuse(folder, refusals)
        unknown = meta.find_undeclared_variables(world.parse(source)) & {*NAMES} - settings.keys()
        refuse(folder, {f"a chat template that writes an unnamed {', '.join(sorted(unknown))}": unknown})
        return world.from_string(source)
    except (TemplateError, UnicodeDecodeError) as error:
        raise UserError(
            f"the chat template of {folder} is no template ({line(error)}); choose another model"
        ) from error


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
