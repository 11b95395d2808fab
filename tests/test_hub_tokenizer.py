"""Tokenizers and chat templates of Hugging Face folders: ids and prompts equal those of transformers, or a refusal."""

import json
import random
import sys
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest

from errors import UserError
from hub.tokenizer import Tokenizer

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SAMPLE = """
The quick brown fox doesn't jump over 1234567890 lazy dogs; they're CAN'T I'LL we've I'd  two  spaces   three
def f(x, y=2):
    return [x ** 2 for _ in range(10) if x != y]  # comment\t\ttabs\r\nwindows
naïve café über Ångström 日本語テキスト 한국어 русский язык العربية
١٢٣ ½ Ⅷ x² 😀👩‍👩‍👧 <b>html</b> {"json": [1, 2.5e-3]} ... !!! ?? ->
"""
TEXTS = ["", SAMPLE, "a<|im_end|>b <|eot_id|> <think> <|im", " hi  there "]
TEXTS += ["e\u0301 \u1112\u1161\u11ab", "\x00\u200b\u3000", "𝔘"]
SPECIALS = {
    "Qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    "Qwen2": ["<|endoftext|>", "<|im", "<|im_start|>", "<|im_end|>"],  # one begins another: the longest counts
    "SmolLM2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "Llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}
NO_REGEX = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
BYTE_LEVEL = NO_REGEX | {"use_regex": True}
TURNS = r"{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
ASK = r"{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
THINK = r"{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
SYSTEM = r"{{- '<|im_start|>system\nBe brief.<|im_end|>\n' }}"
LLAMA3 = (
    r"{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    r"{{- m.content | trim + '<|eot_id|>' }}{%- endfor %}"
    r"{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
TEMPLATES = {"Qwen3": TURNS + ASK + THINK, "Qwen2": SYSTEM + TURNS + ASK, "SmolLM2": TURNS + ASK, "Llama3": LLAMA3}
MORE_TEMPLATES = {
    "system for tools only": "{%- if tools %}" + SYSTEM + "{%- endif %}" + TURNS + ASK,
    "raw": "{% raw %}<|im_start|>system\n{{ no variable }}<|im_end|>\n{% endraw %}" + TURNS + ASK,
    "variable": "{% set x = 'Be ' ~ 'brief.' %}{{- '<|im_start|>system\n' + x + '<|im_end|>\n' }}" + TURNS + ASK,
    "trim": TURNS.replace("m.content", "m.content | trim") + ASK,
    "bos": "{{- bos_token }}" + TURNS + ASK,
    "starts to think": TURNS + ASK + r"{{- '<think>\n' }}",
    "named": [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": TURNS + ASK}],
    "lines": "{% for m in messages %}\n  {% if m.role != 'system' %}\n<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n  {% endif %}\n{% endfor %}\n" + ASK,
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}",
    "language": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if ns.n > 9 %}{% break %}{% endif %}{{ m.content }}<|im_end|>{{ dict(a=ns.n) | tojson }}"
    "{{ strftime_now('%%') }}{% endfor %}",
}  # fmt: skip


def split_by(regex: str, **changes: Any) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split | changes, NO_REGEX]}


PRE_TOKENIZERS = {
    "Qwen3": split_by(QWEN2),
    "Qwen2": split_by(QWEN2),
    "Llama3": split_by(QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")),
    "SmolLM2": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]},
}


def write_tokenizer(folder: Path, family: str, template: Any = None, **changes: Any) -> Any:
    """A small byte-level BPE with the family's pre-tokenizer, special tokens and template; returns transformers'."""
    transformers = pytest.importorskip("transformers")
    import tokenizers

    first = SPECIALS[family] if family == "SmolLM2" else []  # SmolLM2's special tokens are the first ids
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet() if family != "SmolLM2" else []
    raw = json.loads(tokenizer.to_str()) | {"pre_tokenizer": PRE_TOKENIZERS[family], "decoder": BYTE_LEVEL}
    raw["normalizer"] = {"type": "NFC"} if family.startswith("Qwen") else None
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(raw))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SAMPLE] * 3, trainer)
    tokenizer.add_special_tokens(SPECIALS[family])
    raw = json.loads(tokenizer.to_str())
    raw["model"] |= {"ignore_merges": family == "Llama3"} | changes.pop("model", {})
    raw["added_tokens"] += changes.pop("added", [])
    folder.mkdir(exist_ok=True)
    write(folder, "tokenizer.json", raw | changes)
    settings = {"bos_token": SPECIALS[family][0], "chat_template": template or TEMPLATES[family]}
    write(folder, "tokenizer_config.json", settings)
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What the library that transformers uses makes of ids."""
    return tokenizer.library.decode(ids, skip_special_tokens=False)


def compare(theirs: Any, folder: Path) -> int:
    """How many texts are refused, those that decode to another text; all other ids and a chat are transformers'."""
    ours, refused = Tokenizer(folder), 0
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False).input_ids
        if normalize("NFC", theirs.decode(ids)) == normalize("NFC", text):
            assert ours.encode(text) == ids
        else:
            refused += 1
            with pytest.raises(UserError, match="outside the tokenizer's vocabulary"):
                ours.encode(text)
    turns = [("user", " Hi {2}?\n"), ("assistant", "4"), ("user", "no")]
    messages = [{"role": role, "content": text} for role, text in turns]
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    assert ours.chat(turns) == prompt
    return refused


@pytest.mark.parametrize("family", PRE_TOKENIZERS)
def test_ids_and_prompts_equal_those_of_transformers(tmp_path: Path, family: str) -> None:
    theirs = write_tokenizer(tmp_path, family)
    assert (compare(theirs, tmp_path) > 0) == (family == "SmolLM2"), "only its vocabulary lacks some bytes"
    ours, end = Tokenizer(tmp_path), "<|eot_id|>" if family == "Llama3" else "<|im_end|>"
    assert (ours.vocab_size, ours.end) == (len(theirs), theirs.convert_tokens_to_ids(end))


@pytest.mark.parametrize("name", MORE_TEMPLATES)
def test_templates_render_as_in_transformers(tmp_path: Path, name: str) -> None:
    theirs = write_tokenizer(tmp_path, "Qwen3", MORE_TEMPLATES[name])
    compare(theirs, tmp_path)
    if isinstance(MORE_TEMPLATES[name], str):  # in a file of its own it comes before that of the settings
        write(tmp_path, "chat_template.jinja", MORE_TEMPLATES[name])
        write(tmp_path, "tokenizer_config.json", {"chat_template": "{{ 1 }}", "bos_token": "<|endoftext|>"})
        compare(theirs, tmp_path)


ADDED = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
SHORT = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize(
    ("change", "loses"),
    [
        ({"added": [ADDED | {"id": 700, "content": "er", "single_word": True}]}, False),
        ({"added": [ADDED | {"id": 700, "content": "er"}]}, False),
        ({"added": [ADDED | {"id": 700, "content": "한", "normalized": True}]}, False),
        ({"pre_tokenizer": NO_REGEX}, False),
        ({"pre_tokenizer": split_by(QWEN2, behavior="MergedWithPrevious")}, False),
        ({"truncation": SHORT}, False),
        ({"model": {"end_of_word_suffix": "!"}}, True),
        ({"pre_tokenizer": split_by(r"\p{L}+", behavior="Removed", invert=True)}, True),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, True),
        ({"normalizer": {"type": "Lowercase"}}, True),
    ],
    ids=str,
)
def test_what_changes_ids_counts_and_what_loses_text_is_refused(tmp_path: Path, change: dict, loses: bool) -> None:
    theirs = write_tokenizer(tmp_path, "Qwen2", **change)
    theirs.backend_tokenizer.no_truncation()
    assert (compare(theirs, tmp_path) > 0) == loses


def test_no_text_is_too_long_or_ends_in_a_traceback(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "Qwen3")
    tokenizer = Tokenizer(tmp_path)
    assert decode(tokenizer, tokenizer.encode(" " * 1_000_000)) == " " * 1_000_000
    with pytest.raises(UserError, match="no valid Unicode"):
        tokenizer.encode("half a pair: \ud800")


def test_pieces_join_to_the_text_and_a_character_belongs_to_its_first_token(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "Qwen3")
    tokenizer, rng = Tokenizer(tmp_path), random.Random(0)
    split = tokenizer.encode("\U0001d518!")
    assert len(split) == 5 and tokenizer.pieces(split) == ["\U0001d518", "", "", "", "!"]
    assert tokenizer.pieces([split[0], *tokenizer.encode("7"), split[0]]) == ["\ufffd", "7", "\ufffd"]
    ids = [id for id in range(tokenizer.vocab_size) if id not in tokenizer.stops]
    for tokens in [[], tokenizer.encode(SAMPLE), *(rng.choices(ids, k=rng.randint(1, 30)) for _ in range(300))]:
        pieces = tokenizer.pieces(tokens)
        assert len(pieces) == len(tokens) and "".join(pieces) == decode(tokenizer, tokens)
        ended = tokenizer.pieces([*tokens, tokenizer.end, *tokens])
        assert "".join(ended) == "".join(pieces) and len(ended) == 2 * len(tokens) + 1
    assert tokenizer.pieces([tokenizer.vocab_size, *tokenizer.encode("a")]) == ["", "a"], "a row of no token"


def test_stops_are_those_of_all_files_and_the_end_of_turn(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "Qwen2")
    end = Tokenizer(tmp_path).end
    assert Tokenizer(tmp_path).stops == (end,)
    write(tmp_path, "config.json", {"eos_token_id": 5})
    write(tmp_path, "generation_config.json", {"eos_token_id": [7, end]})
    assert Tokenizer(tmp_path).stops == tuple(sorted((5, 7, end)))
    write(tmp_path, "config.json", {"eos_token_id": "5"})
    with pytest.raises(UserError, match="eos_token_id"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("tokenizer.json", {"pre_tokenizer": split_by("(")}, "is no tokenizer"),
        ("tokenizer.json", {"decoder": {"type": "Fuse"}}, "decoder that is not byte-level"),
        ("tokenizer.json", {"added_tokens": [ADDED | {"id": 0, "content": "!", "rstrip": True}]}, "white space"),
        ("tokenizer_config.json", {"eos_token": "<|gone|>"}, "differ from file to file"),
        ("added_tokens.json", {"<|im_end|>": 3}, "differ from file to file"),
        ("tokenizer_config.json", {"chat_template": None}, "no chat template"),
        ("tokenizer_config.json", {"chat_template": [{"name": "tools", "template": ""}]}, "no chat template"),
        ("tokenizer_config.json", {"chat_template": "{% if %}"}, "is no template"),
        ("tokenizer_config.json", {"chat_template": "{{ raise_exception('not today') }}"}, r"fails \(not today\)"),
        ("tokenizer_config.json", {"chat_template": "{{ ''.__class__ }}"}, "looks into Python"),
        ("tokenizer_config.json", {"chat_template": "{{ pad_token }}" + TURNS}, "a pad_token, which tokenizer_config"),
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}, "without a token behind an answer"),
    ],
    ids=str,
)
def test_other_folders_are_refused_by_name(tmp_path: Path, file: str, change: dict[str, Any], named: str) -> None:
    write_tokenizer(tmp_path, "Qwen2")
    raw = json.loads((tmp_path / file).read_text(encoding="utf-8")) if (tmp_path / file).exists() else {}
    write(tmp_path, file, raw | change)
    with pytest.raises(UserError, match=named) as error:
        Tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_library_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(tmp_path, "Qwen2")
    for module in ("jinja2", "tokenizers"):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=r'pip install -e "\.\[real\]"'):
            Tokenizer(tmp_path)
