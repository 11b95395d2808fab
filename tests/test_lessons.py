"""Which rollouts teach, what their teacher reads, how they are batched, and what a step logs of them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import Letters, make_rollout, metrics, train

import train_rosd
from data import Verdict
from lessons import Lesson, as_tensors, by_length, pairs_to_learn_from, split, statistics, teacher_prompt
from reflect import Pair
from train_rosd import configure

# ---------------------------------------------------------------------------------------------- which rollouts teach

GROUPS = {  # the first of each is the rollout in question; those with an a are right
    "wrong beside a right one": ["b", "a", "c"],
    "wrong as all are": ["b", "c", "d"],
    "right as the only one": ["a", "b", "c"],
    "right beside right and wrong": ["a", "ab", "b"],
    "right as all are": ["a", "ab", "ac"],
}
TEACHES = {  # by what the teacher reads, in the order of GROUPS
    "reflection": [True, False, True, True, True],
    "peer": [True, False, False, True, True],
    "both": [True, False, False, True, True],
    "gold": [True, True, True, True, True],
    "nothing": [True, False, True, True, False],
}


def taught(texts: list[str], **settings: object) -> list[str]:
    rollouts = [make_rollout(text) for text in texts]
    return [pair.y.text for pair in pairs_to_learn_from(rollouts, configure(group=3, **settings))]


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("context", TEACHES)
def test_a_rollout_teaches_only_if_its_teacher_has_something_to_read(context: str, kind: str) -> None:
    group, expected = GROUPS[kind], TEACHES[context][list(GROUPS).index(kind)]
    assert (taught(group, context=context)[:1] == group[:1]) == expected
    lost = ["d", "c", "b"]
    assert taught(lost + group, context=context) == taught(lost, context=context) + taught(group, context=context)


@pytest.mark.parametrize("context", TEACHES)
def test_only_solved_groups_are_dropped(context: str) -> None:
    texts = [text for group in GROUPS.values() for text in group]
    dropped = taught(texts, context=context, solved="drop")
    assert dropped == taught(texts[:-3], context=context)
    assert taught(texts, context=context) == dropped + taught(texts[-3:], context=context)


def test_learn_from_selects_right_or_wrong_rollouts() -> None:
    texts = ["a", "b", "ab", "b", "c", "d"]
    kept = {which: taught(texts, learn_from=which) for which in ("all", "right", "wrong")}
    assert kept == {"all": ["a", "b", "ab"], "right": ["a", "ab"], "wrong": ["b"]}


def test_an_unknown_context_or_mask_is_refused() -> None:
    y = make_rollout("a")
    with pytest.raises(ValueError, match="no context 'hint', only reflection, peer"):
        teacher_prompt(Letters(), y, y, "e", configure(context="hint"))
    with pytest.raises(ValueError, match="no context 'hint', only reflection, peer"):
        taught(["a", "b", "c"], context="hint")
    with pytest.raises(ValueError, match="no context 'hint' or no mask 'whole'"):
        train_rosd.Method("a method of mine", "hint", "whole")
    with pytest.raises(ValueError, match="no context 'peer' or no mask 'quote'"):
        train_rosd.Method("a method of mine", "peer", "quote")


# ---------------------------------------------------------------------------------------------- the teacher's prompt


@pytest.mark.parametrize(
    ("settings", "with_idea", "malformed"),
    [
        ({}, "a0d~?", None),
        ({"malformed": "peer"}, "a0d~?", "a0~ab?"),
        ({"context": "peer"}, "a0~ab?", "a0~ab?"),
        ({"context": "both"}, "a0d~ab?", "a0~ab?"),
        ({"context": "gold"}, "a0~a?", "a0~a?"),
        ({"context": "nothing"}, "a0?", "a0?"),
    ],
    ids=str,
)
def test_teacher_reads_the_problem_and_what_the_context_names(
    settings: dict, with_idea: str, malformed: str | None
) -> None:
    y, peer, config = make_rollout("c"), make_rollout("ab"), configure(**settings)
    assert teacher_prompt(Letters(), y, peer, "d", config) == with_idea
    assert teacher_prompt(Letters(), y, peer, None, config) == malformed


def test_a_malformed_reflection_without_a_peer_leaves_the_teacher_nothing() -> None:
    assert teacher_prompt(Letters(), make_rollout("c"), None, None, configure(malformed="peer")) is None


# ---------------------------------------------------------------------------------------------- batches


def lesson(length: int, start: int, end: int, context: int = 1) -> Lesson:
    return Lesson([1], [2] * context, list(range(1, length + 1)), [-0.5] * length, start, end, 0.0)


@pytest.mark.parametrize(("parts", "sizes"), [(1, [7]), (2, [3, 4]), (3, [2, 2, 3]), (7, [1] * 7), (99, [1] * 7)])
def test_minibatches_are_equal_parts_in_order(parts: int, sizes: list[int]) -> None:
    lessons = [lesson(3, 0, 3) for _ in range(7)]
    batches = list(split(lessons, parts))
    assert list(map(len, batches)) == sizes and [x for batch in batches for x in batch] == lessons


def test_minibatches_without_an_unmasked_token_are_left_out() -> None:
    empty, full = lesson(3, 1, 1), lesson(3, 1, 2)
    assert list(split([empty, empty, empty, full], 2)) == [[empty, full]]
    assert list(split([], 2)) == []


def test_micro_batches_hold_every_lesson_and_the_lengths_of_one_are_similar() -> None:
    lessons = [lesson(length, 0, 1, context) for length, context in ((9, 1), (2, 2), (5, 6), (2, 1), (3, 9))]
    assert [[len(x.x_T) + len(x.y) for x in part] for part in by_length(lessons, 2)] == [[3, 4], [10, 11], [12]]


def test_tensors_are_padded_and_masked_from_start_to_end() -> None:
    y, m, logp = as_tensors([lesson(2, 0, 2), lesson(4, 1, 3)], torch.device("cpu"))
    assert y.tolist() == [[1, 2, 0, 0], [1, 2, 3, 4]]
    assert m.tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]
    assert logp.tolist() == [[-0.5, -0.5, 0, 0], [-0.5] * 4]


# ---------------------------------------------------------------------------------------------- the log


def wrong(text: str, error: tuple[int, int] | None) -> Pair:
    return Pair(dataclasses.replace(make_rollout(text), verdict=Verdict(False, True, error)), None, 0.0)


def test_quotes_are_counted_of_wrong_rollouts_and_positions_of_quotes_that_were_found() -> None:
    pairs = [
        wrong("bcd", (1, 2)),  # 4 tokens with the stop token
        wrong("bcdbcdb", (3, 4)),  # 8 tokens
        wrong("bcd", (0, 1)),
        wrong("bcd", None),  # the verifier knows no position
        Pair(make_rollout("a"), None, 0.0),
    ]
    rollouts = [make_rollout(text) for text in ("a", "b!", "bcdbcdbc", "b")]
    quotes = [(1, 2), (2, 3), None, (2, 3), (0, 1)]  # 1, 3 and 0 would be true
    of_rollouts = {
        "accuracy": [True, False, False, False],
        "solved": [True, False],  # of the groups of two
        "loud": [False, True, False, False],
        "unfinished": [False, False, True, False],
    }
    assert statistics(rollouts, pairs, quotes, Letters(), group=2) == of_rollouts | {
        "quote_match": [True, True, False, True],
        "quote_accuracy": [True, False, False],
        "error_position": [1 / 4, 2 / 8, 2 / 4],
    }
    nothing_read = {"quote_match": [], "quote_accuracy": [], "error_position": []}
    assert statistics(rollouts, pairs, None, Letters(), group=2) == of_rollouts | nothing_read


# ---------------------------------------------------------------------------------------------- who reflects, and when


@pytest.mark.parametrize(
    ("flags", "reflects"),
    [
        ("--method rosd", True),
        ("--method rosd --context peer", True),  # its mask begins at a quote
        ("--method rosd --context peer --mask whole", False),
        ("--method rosd --mask whole", True),  # its teacher reads ideas
        ("--method sdpo", False),
        ("--method sdpo --mask suffix", True),
        ("--method sdpo --mask span", True),
        ("--method sdpo --mask oracle", False),
        ("--method opsd --context both", True),
        ("--method grpo", False),
    ],
)
def test_reflections_are_written_where_the_teacher_or_the_mask_needs_them(
    flags: str, reflects: bool, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, write = [], train_rosd.write_reflections
    monkeypatch.setattr(Letters, "knows_first_error", True)  # for the oracle's mask
    monkeypatch.setattr(train_rosd, "write_reflections", lambda *a, **k: calls.append(1) or write(*a, **k))
    train(train_rosd, base, tmp_path, *flags.split(), "--batch", "6")
    assert len(calls) == 2 * reflects
    assert any("quote_match" in row for row in metrics(tmp_path)) == reflects
