"""Tokenizers written by `tokenizers`, read back without it: equal ids, equal text; chat formats and stop tokens."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from hub.tokenizer import Tokenizer

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SAMPLE = """
The quick brown fox doesn't jump over 1234567890 lazy dogs; they're CAN'T I'LL we've I'd  two  spaces   three
def f(x, y=2):
    return [x ** 2 for _ in range(10) if x != y]  # comment\t\ttabs\r\nwindows
naïve café über Ångström 日本語テキスト 한국어 русский язык العربية
١٢٣ ½ Ⅷ x² 😀👩‍👩‍👧 <b>html</b> {"json": [1, 2.5e-3]} ... !!! ?? ->
"""
PIECES = [
    *SAMPLE.split(),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u0085", "\u200b", "\x00", "\x1c", "'", "''"),
    *(
        "'s",
        "'S",
        "'ſ",
        "'ll",
        "K",
        "é",
        "e\u0301",
        "\u0301",
        "\u0338",
        "Å",
        "ﬁ",
        "٣",
        "²",
        "½",
        "0",
        "00",
        "123",
        "4567",
    ),
    *("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<think>", "<|im", "_end|>", "🏳️‍🌈", "𝔘", "\U0001f1e9\U0001f1ea"),
]
SPECIALS = {
    "Qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    "Qwen2": ["<|endoftext|>", "<|im", "<|im_start|>", "<|im_end|>"],  # one begins another: the longest counts
    "SmolLM2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "Llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}
NO_REGEX = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
BYTE_LEVEL = NO_REGEX | {"use_regex": True}


def split_by(regex: str, **changes: Any) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split | changes, NO_REGEX]}


PRE_TOKENIZERS = {
    "Qwen3": split_by(QWEN2),
    "Qwen2": split_by(QWEN2),
    "Llama3": split_by(LLAMA3),
    "SmolLM2": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]},
}


def write_tokenizer(folder: Path, family: str, **changes: Any) -> Any:
    """A small byte-level BPE with the family's pre-tokenizer and special tokens; returns that of `tokenizers`."""
    tokenizers = pytest.importorskip("tokenizers")
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
    raw["model"]["ignore_merges"] = family == "Llama3"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(raw | changes), encoding="utf-8")
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.encoding.decode([tokenizer.ranks[id] for id in ids])


@pytest.mark.parametrize("family", PRE_TOKENIZERS)
def test_ids_equal_those_of_tokenizers_on_varied_texts(tmp_path: Path, family: str) -> None:
    theirs, rng = write_tokenizer(tmp_path, family), random.Random(0)
    ours = Tokenizer(tmp_path)
    texts = ["", *PIECES, *("".join(rng.choices([*PIECES, " "], k=rng.randint(1, 12))) for _ in range(1000))]
    missing = {byte for byte in range(256) if ours.ids[ours.encoding.encode_single_token(bytes([byte]))] < 0}
    assert (len(missing) > 0) == (family == "SmolLM2")
    compared = 0
    for text in texts:
        if missing.isdisjoint(ours.special.sub("", text).encode()):
            expected = theirs.encode(text, add_special_tokens=False).ids
            assert ours.encode(text) == expected, repr(text)
            assert decode(ours, expected) == theirs.decode(expected, skip_special_tokens=False)
            compared += 1
        else:
            with pytest.raises(ValueError, match="outside the tokenizer's vocabulary"):
                ours.encode(text)
    assert compared > 300
    assert ours.vocab_size == theirs.get_vocab_size()


def test_ids_need_not_follow_the_order_of_merges(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "Qwen2")
    raw = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    ids = list(raw["model"]["vocab"].values())
    random.Random(0).shuffle(ids)
    raw["model"]["vocab"] = dict(zip(raw["model"]["vocab"], ids, strict=True))
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer(tmp_path)
    assert ours.encode(SAMPLE) == theirs.encode(SAMPLE).ids
    assert decode(ours, ours.encode(SAMPLE)) == SAMPLE


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "the normalizer Lowercase"),
        ({"model": {"type": "Unigram", "vocab": []}}, "a tokenizer of type Unigram"),
        ({"model": {"type": "BPE", "vocab": {"abc": 0}, "merges": []}}, "tokens that no merge makes"),
        ({"added_tokens": []}, "no chat format"),
        ({"pre_tokenizer": None}, "cuts text"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "cuts text"),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "cuts text"),
        ({"pre_tokenizer": NO_REGEX}, "cuts text"),
        ({"pre_tokenizer": split_by(QWEN2, behavior="Removed")}, "cuts text"),
        ({"pre_tokenizer": split_by(QWEN2, invert=True)}, "cuts text"),
    ],
    ids=str,
)
def test_other_tokenizers_are_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    write_tokenizer(tmp_path, "Qwen2")
    raw = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw | change), encoding="utf-8")
    with pytest.raises(ValueError, match=named):
        Tokenizer(tmp_path)


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        Tokenizer(tmp_path)


# ---------------------------------------------------------------------------------------------- chat


def test_chat_is_written_in_the_format_of_the_special_tokens(tmp_path: Path) -> None:
    turns = [("user", "Hi."), ("assistant", "2 + {2}?")]
    chatml = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n2 + {2}?<|im_end|>\n<|im_start|>assistant\n"
    expected = {
        "Qwen3": chatml + "<think>\n\n</think>\n\n",
        "Qwen2": chatml,
        "SmolLM2": chatml,
        "Llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n2 + {2}?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    }
    for family, prompt in expected.items():
        write_tokenizer(tmp_path / family, family)
        tokenizer = Tokenizer(tmp_path / family)
        assert tokenizer.chat(turns) == prompt
        assert (tokenizer.chat([("user", " hi\n")]) == tokenizer.chat([("user", "hi")])) == (family == "Llama3")
        if family != "SmolLM2":  # whose small vocabulary lacks some of these characters
            assert decode(tokenizer, tokenizer.encode(prompt)) == prompt


@pytest.mark.parametrize(("template", "prefix"), [("{% if enable_thinking %}", True), ("{{ messages }}", False)])
@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_models_whose_template_cannot_think_get_no_empty_thought(
    tmp_path: Path, template: str, prefix: bool, place: str
) -> None:
    write_tokenizer(tmp_path, "Qwen3")
    (tmp_path / place).write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    assert Tokenizer(tmp_path).chat([("user", "hi")]).endswith("</think>\n\n") == prefix


TEMPLATES = {  # what the programs of these folders do with a chat, cut to what matters here
    "SmolLM2": "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helper named Smol<|im_end|>\n' }}{% endif %}",
    "Qwen2": r"{%- if messages[0].role != 'system' %}"
    r"{{- '<|im_start|>system\nYou\'re Qwen.\n\nBox: \\boxed{}.<|im_end|>\n' }}{%- endif %}{% for m in messages %}",
    "Qwen3": r"{%- if messages[0].role == 'system' %}"
    r"{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}{% for m in messages[off:] %}",
}


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_chat_gets_the_system_message_of_the_template(tmp_path: Path, family: str) -> None:
    jinja2 = pytest.importorskip("jinja2")
    write_tokenizer(tmp_path, family)
    turn = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}<|im_start|>assistant\n"
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[family] + turn, encoding="utf-8")
    messages = [{"role": "user", "content": "hi"}]
    template = jinja2.Environment(keep_trailing_newline=True).from_string(TEMPLATES[family] + turn)
    assert Tokenizer(tmp_path).chat([("user", "hi")]) == template.render(messages=messages, off=0)


def test_stops_are_those_of_all_files_and_the_end_of_turn(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "Qwen2")
    turn = Tokenizer(tmp_path).end
    assert Tokenizer(tmp_path).stops == (turn,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}), encoding="utf-8")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, turn]}), encoding="utf-8")
    assert Tokenizer(tmp_path).stops == tuple(sorted((5, 7, turn)))
