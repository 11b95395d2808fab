"""The tokenizer and chat format of a Hugging Face folder: its tokenizer.json as a tiktoken encoding.

>>> byte_of["Ġ"]  # tokenizer.json writes each byte as one printable character, the space as Ġ
32
"""

import re
import unicodedata
from pathlib import Path
from typing import Any

import tiktoken

from errors import UserError
from hub.weights import read_json, refuse

printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
others = [byte for byte in range(256) if byte not in printable]
byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

# SmolLM2's, which is GPT-2's after every digit was cut out: so white space before a digit ends its piece.
SINGLE_DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

CHATML = "<|im_start|>{role}\n{text}<|im_end|>\n"
# A system message that a template writes as it is: a quoted string of its program, which may hold escapes.
DEFAULT_SYSTEM = re.compile(r"""(['"])<\|im_start\|>system(?:\\n|\n)((?:\\.|(?!\1)[^\\])+?)<\|im_end\|>""", re.DOTALL)
LLAMA3 = "<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"
END_OF_TURN = ("<|im_end|>", "<|eot_id|>")


class Tokenizer:
    """Byte-level BPE of a folder with tokenizer.json; its ids equal those of `transformers` without added BOS.

    encoding is the tiktoken encoding: its ranks follow the order of merges, and ids[rank] is the id in the folder, or
    -1 for a byte that the vocabulary lacks. end is the token that ends a turn of the chat.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        raw = read_json(folder / "tokenizer.json")
        model, normalizer = raw["model"], raw.get("normalizer") or {"type": None}
        self.added = added = {token["content"]: token["id"] for token in raw["added_tokens"]}
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", ())]
        texts = list(dict.fromkeys([*byte_of, *map("".join, merges)]))  # in the order of their ranks
        refusals = {
            f"a tokenizer of type {model['type']}": model["type"] != "BPE",
            f"the normalizer {normalizer['type']}": normalizer["type"] not in ("NFC", None),
            "special tokens that take in white space": any(t["lstrip"] or t["rstrip"] for t in raw["added_tokens"]),
            "no chat format": not any(text in added for text in END_OF_TURN),
            "tokens that no merge makes": model["type"] == "BPE" and set(model["vocab"]) - {*texts, *added},
        }
        refuse(folder, refusals)
        self.ids = [model["vocab"].get(text, -1) for text in texts] + list(added.values())  # rank -> id
        self.ranks = {id: rank for rank, id in enumerate(self.ids) if id >= 0}
        self.encoding = tiktoken.Encoding(
            name=folder.name,
            pat_str=split_pattern(folder, raw["pre_tokenizer"]),
            mergeable_ranks={bytes(byte_of[c] for c in text): rank for rank, text in enumerate(texts)},
            special_tokens={text: len(texts) + i for i, text in enumerate(added)},
        )
        self.vocab_size = max(self.ids) + 1
        self.nfc = normalizer["type"] == "NFC"
        longest_first = sorted(map(re.escape, added), key=len, reverse=True)
        self.special = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        self.end = next(added[text] for text in END_OF_TURN if text in added)
        self.stops = stop_tokens(folder, self.end)
        template = chat_template(folder)
        self.may_think = "<think>" in added and (template is None or "enable_thinking" in template)
        written = DEFAULT_SYSTEM.search(template or "")
        self.system = written and written[2].encode("ascii", "backslashreplace").decode("unicode-escape")

    def encode(self, text: str) -> list[int]:
        """Text -> ids; special tokens written in the text become one id each."""
        ids = []
        for i, part in enumerate(self.special.split(text)):
            if i % 2:
                ids.append(self.added[part])
            else:
                part = unicodedata.normalize("NFC", part) if self.nfc else part
                ids += [self.ids[rank] for rank in self.encoding.encode_ordinary(part)]
        if -1 in ids:
            raise UserError(f"{text[:40]!r} holds a character outside the tokenizer's vocabulary; leave it out")
        return ids

    def chat(self, turns: list[tuple[str, str]]) -> str:
        """The prompt that asks for the assistant's answer to turns of (role, text): ChatML or Llama 3's format.

        The system message that the folder's ChatML template adds comes first; a model that can think is told not to.
        """
        if "<|im_end|>" in self.added:
            turns = [("system", self.system), *turns] if self.system else turns
            asked = "".join(CHATML.format(role=role, text=text) for role, text in turns) + "<|im_start|>assistant\n"
            return asked + "<think>\n\n</think>\n\n" * self.may_think
        asked = "".join(LLAMA3.format(role=role, text=text.strip()) for role, text in turns)
        return f"<|begin_of_text|>{asked}<|start_header_id|>assistant<|end_header_id|>\n\n"


def split_pattern(folder: Path, pre_tokenizer: dict[str, Any] | None) -> str:
    """The regular expression of the pieces within which merges happen, from the pre-tokenizer."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [{"type": None}])
    if steps[-1]["type"] == "ByteLevel" and not steps[-1]["add_prefix_space"]:
        match [step["type"] for step in steps], steps[-1].get("use_regex", True):
            case ["Digits", "ByteLevel"], True if steps[0]["individual_digits"]:
                return SINGLE_DIGITS
            case ["Split", "ByteLevel"], False if steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
                return steps[0]["pattern"]["Regex"]
    raise UserError(f"the tokenizer in {folder} cuts text in a way that is not supported; choose another model")


def chat_template(folder: Path) -> str | None:
    """The program that writes the folder's prompts; it is searched for words, never executed."""
    template, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if template.is_file():
        return template.read_text(encoding="utf-8")
    found = read_json(settings).get("chat_template") if settings.is_file() else None
    if isinstance(found, list):  # several with names
        found = next((each["template"] for each in found if each["name"] == "default"), None)
    return found


def stop_tokens(folder: Path, end: int) -> tuple[int, ...]:
    """The ids that end an answer, ascending: the end of a turn and those of the folder's config files."""
    stops = {end}
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            ids = read_json(folder / name).get("eos_token_id")
            stops |= {ids} if isinstance(ids, int) else set(ids or ())
    return tuple(sorted(stops))
