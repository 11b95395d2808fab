"""Reading a reflection, locating its quote, and the mask: by hand, and on text no one would write."""

import random

import pytest
import torch

import reflect
from data.arithmetic import DOMAINS, make_problem, verify
from data.documents import reflection, wrong_attempt
from data.tokenizer import END, VOCAB_SIZE, decode, encode, pieces
from reflect import Reflection, Rollout, error_mask, locate, parse_reflection, true_position

TAGS = ("<error_quote>", "</error_quote>", "<explanation>", "</explanation>")


def make_rollout(problem: str, text: str) -> Rollout:
    return Rollout(problem, [*encode(text), END], text, verify(problem, text))


# ---------------------------------------------------------------------------------------------- parse_reflection


@pytest.mark.parametrize(
    ("text", "quote", "idea"),
    [
        ("<error_quote>6*2=8</error_quote><explanation>6*2=2</explanation>", "6*2=8", "6*2=2"),
        ("1-5=6:6<error_quote>q</error_quote>;<explanation>e</explanation>1", "q", "e"),
        ("<explanation>e</explanation><error_quote>q</error_quote>", "q", "e"),
        ("<error_quote>q\nr</error_quote><explanation>e\nf</explanation>", "q\nr", "e\nf"),
        ("<explanation>e</explanation>", None, "e"),
        ("<error_quote>q</error_quote>", "q", None),
        ("<error_quote>q<explanation>e</explanation>", None, "e"),
        ("<error_quote>q</error_quote><explanation>e", "q", None),
        ("q</error_quote>e</explanation>", None, None),
        ("</error_quote>q<error_quote></explanation>e<explanation>", None, None),
        ("<error_quote></error_quote><explanation></explanation>", None, None),
        ("<error_quote>q</explanation><explanation>e</error_quote>", "q</explanation><explanation>e", None),
        ("<error_quote>q</error_quote><error_quote>r</error_quote>", "q", None),
        ("<error_quote>q<error_quote>r</error_quote>s</error_quote>", "q<error_quote>r", None),
        ("<ERROR_QUOTE>q</ERROR_QUOTE>", None, None),
        ("", None, None),
    ],
)
def test_reflection_is_read_from_its_tags_alone(text: str, quote: str | None, idea: str | None) -> None:
    assert parse_reflection(text) == Reflection(quote, idea)


# ---------------------------------------------------------------------------------------------- locate


@pytest.mark.parametrize(
    ("quote", "tokens", "k"),
    [
        ("c", ["a", "b", "c"], 2),
        ("a", ["a", "b", "c"], 0),
        ("bc", ["a", "b", "c"], 1),
        ("cd", ["ab", "cde", "f"], 1),
        ("de", ["ab", "cde", "f"], 1),  # begins inside a token
        ("ef", ["ab", "cde", "f"], 1),  # begins inside one and ends in the next
        ("ab", ["x", "ab", "y", "ab"], 1),  # occurs twice
        ("b", ["a", "", "b"], 2),  # a token without text holds nothing
        ("abc", ["a", "b"], None),
        ("ba", ["a", "b"], None),
        ("", ["a", "b"], None),
        (None, ["a", "b"], None),
        ("a", [], None),
    ],
)
def test_quote_is_located_at_the_token_where_it_first_begins(quote: str | None, tokens: list[str], k: int) -> None:
    assert locate(quote, tokens) == k


def test_true_position_is_the_token_where_the_verifiers_span_begins() -> None:
    rng = random.Random(0)
    for _ in range(300):
        problem = make_problem(rng.choice(list(DOMAINS)), rng)
        rollout = make_rollout(problem, wrong_attempt(problem, rng))
        texts, k = pieces(rollout.tokens), true_position(rollout)
        assert "".join(texts[:k]) == rollout.text[: rollout.verdict.error[0]]


def test_true_position_without_a_named_error_is_the_beginning() -> None:
    assert true_position(make_rollout("3+8-5*2", "3+8=1;1-")) == 0


def test_quote_of_a_perfect_reflection_is_located_at_the_true_position() -> None:
    rng, hits = random.Random(1), 0
    for _ in range(300):
        problem = make_problem(rng.choice(list(DOMAINS)), rng)
        rollout = make_rollout(problem, wrong_attempt(problem, rng))
        quote = parse_reflection(reflection(problem, rollout.text)).quote
        hits += locate(quote, pieces(rollout.tokens)) == true_position(rollout)
    assert hits >= 297  # all but those whose wrong line was right where it first occurred


def test_random_bytes_are_read_and_located_without_exception() -> None:
    rng = random.Random(2)
    for i in range(10_000):
        parts = [rng.randbytes(rng.randrange(12)) for _ in range(rng.randrange(6))]
        if i % 2:
            parts = [part for text in parts for part in (text, rng.choice(TAGS).encode())]
        encoding = "latin-1" if i % 4 < 2 else "utf-8"
        tokens = [part.decode(encoding, errors="replace") for part in parts]
        read = parse_reflection("".join(tokens))
        assert "" not in (read.quote, read.idea)
        rng.shuffle(tokens)
        k = locate(read.quote, tokens)
        assert (k is not None) == (read.quote is not None and read.quote in "".join(tokens))
        assert k is None or 0 <= k < len(tokens)


def test_random_tokens_are_read_verified_and_located_without_exception() -> None:
    rng = random.Random(3)
    for _ in range(1000):
        tokens = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(40))]
        text = decode(tokens)
        rollout = Rollout("3+8-5*2", tokens, text, verify("3+8-5*2", text))
        assert 0 <= true_position(rollout) <= len(tokens)
        read = parse_reflection(text)
        assert read.quote is None or "".join(pieces(tokens))[: len(text)].find(read.quote) >= 0
        assert read.quote is None or locate(read.quote, pieces(tokens)) < len(tokens)


# ---------------------------------------------------------------------------------------------- error_mask, reflect


def test_mask_covers_each_response_from_its_error_on() -> None:
    mask = error_mask([0, 2, 3, 1], [2, 4, 3, 3])
    assert torch.equal(mask, torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]]))


def test_reflector_reads_a_wrong_rollout_beside_its_peer_and_a_right_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    def write(reflector: None, prompts: list[list[int]], *args: object, **settings: object) -> list[list[int]]:
        shown.extend(map(decode, prompts))
        return [encode(f"<explanation>{i}</explanation>") for i, _ in enumerate(prompts)]

    monkeypatch.setattr(reflect, "generate", write)
    rollouts = [make_rollout("1+2", "1+2=4;#4"), make_rollout("1+2", "1+2=3;#3")]
    read = reflect.reflect(None, rollouts, ["#3", "#3"], torch.Generator())
    assert read == [Reflection(None, "0"), Reflection(None, "1")]
    assert shown == [
        "<|user|>1+2<|solution|>#3<|attempt|>1+2=4;#4<|assistant|>",
        "<|user|>1+2<|attempt|>1+2=3;#3<|assistant|>",
    ]
