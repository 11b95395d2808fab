"""What the controls change in the reflections, and what they leave alone."""

import random
from pathlib import Path
from statistics import mean

import pytest
from conftest import ONE, Letters, make_rollout, metrics, train

import train_rosd
from controls import CONTROLS, oracle_reflections, spoil, teaches
from data import Problem, falsify
from data.arithmetic import Arithmetic
from reflect import Pair, Reflection, Rollout, Span, locate


def pair(text: str, problem: Problem = ONE) -> Pair:
    return Pair(make_rollout(text, problem), None, 0.0)


# ---------------------------------------------------------------------------------------------- random quotes


def draw(quote: Span | None, y: Pair, count: int) -> list[Span]:
    """Where a quote is put, each time it is spoiled; the text of the reflection stays."""
    rng, before, quotes = random.Random(0), Reflection("bc", "e"), []
    for _ in range(count):
        (after,), (place,) = spoil([before], [quote], [y], "random-quotes", 1.0, rng)
        assert after == before
        quotes.append(place)
    return quotes


@pytest.mark.parametrize("text", ["bc", "bcd", "bcdbcdb", "bcd" * 13])
def test_random_quotes_begin_at_every_token_equally_often(text: str) -> None:
    y = pair(text)
    T, quotes = len(y.y.tokens), draw((0, 2), y, 4000)
    assert {k for k, _ in quotes} == set(range(T))
    # drawn uniformly, k / T has mean (T - 1) / 2T, and its standard error is below 0.005
    assert mean(k / T for k, _ in quotes) == pytest.approx((T - 1) / (2 * T), abs=0.02)


def test_random_quotes_lie_where_they_were_drawn_even_if_their_text_occurs_earlier() -> None:
    """All the text is the same: located by their text, all would begin at 0."""
    y, rng = pair("bbbbbb"), random.Random(0)
    for quote in draw((0, 2), y, 30):
        rng.random()  # the dose
        k = rng.randrange(7)
        assert quote == (k, min(k + 2, 7))


def test_random_quotes_are_as_long_as_the_quote_or_one_token_if_none_was_found() -> None:
    y = pair("bcdbcdb")
    assert {end - k for k, end in draw((0, 3), y, 200) if k < 6} == {3}
    assert {end - k for k, end in draw(None, y, 200)} == {1}


def test_random_quotes_leave_correct_rollouts_alone() -> None:
    assert draw((0, 1), pair("abcdabc"), 20) == [(0, 1)] * 20
    assert draw(None, pair("abcdabc"), 20) == [None] * 20


def test_other_quotes_are_those_of_wrong_rollouts_to_other_problems() -> None:
    one, two = Problem("a0", "a"), Problem("a1", "a")
    pairs = [pair("bcdbcd", one), pair("bcdbcd", one), pair("bcdbcdbcd", two), pair("c", two), pair("abc", one)]
    spans = [(1, 3), (2, 4), (6, 8), None, (0, 1)]
    before, seen = [Reflection("q", "e")] * 5, [set() for _ in pairs]
    for seed in range(100):
        after, quotes = spoil(before, spans, pairs, "other-quotes", 1.0, random.Random(seed))
        assert after == before
        for places, quote in zip(seen, quotes, strict=True):
            places.add(quote)
    # rollouts have 7, 7, 10, 2 and 4 tokens; a quote beyond the end is not taken, the correct one keeps its own
    assert seen == [{(6, 7)}, {(6, 7)}, {(1, 3), (2, 4)}, {(1, 2)}, {(0, 1)}]


# ---------------------------------------------------------------------------------------------- false and other ideas


def test_a_false_idea_has_another_result_and_nothing_else_changed() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        assert (false := falsify("3+4=7", rng))[:4] == "3+4=" and false[4] in "012345689"
        assert (false := falsify("so it is 12, then", rng))[:10] == "so it is 1" and false[10] in "013456789"
        assert falsify("1=2 and 3 = 40", rng) not in ("1=2 and 3 = 40", "")
    assert falsify("no digit", random.Random(0)) == "no digit"


@pytest.mark.parametrize("text", ["a", "b"])
def test_false_ideas_reach_right_and_wrong_rollouts_and_leave_the_quote(text: str) -> None:
    for seed in range(10):
        before = [Reflection("b", "3+4=7"), Reflection("b", None)]
        (after, malformed), quotes = spoil(
            before, [(0, 1), None], [pair(text)] * 2, "false-ideas", 1.0, random.Random(seed)
        )
        assert after.quote == "b" and after.idea[:4] == "3+4=" and after.idea != "3+4=7"
        assert malformed == before[1] and quotes == [(0, 1), None]


def test_other_ideas_are_never_of_this_problem() -> None:
    one, two, three = (Problem(f"{letter}0", letter) for letter in "abc")
    pairs = [pair("b", problem) for problem in (one, one, two, two, three)]
    reflections = [Reflection("q", idea) for idea in ("one", "ONE", "two", None, "three")]
    received = [set() for _ in pairs]
    for seed in range(100):
        after, quotes = spoil(reflections, [(0, 1)] * 5, pairs, "other-ideas", 1.0, random.Random(seed))
        assert quotes == [(0, 1)] * 5 and {reflection.quote for reflection in after} == {"q"}
        for ideas, reflection in zip(received, after, strict=True):
            ideas.add(reflection.idea)
    ones = {"one", "ONE"}
    # a malformed reflection stays malformed, and its missing idea is given to nobody
    assert received == [{"two", "three"}, {"two", "three"}, ones | {"three"}, {None}, ones | {"two"}]


def test_an_idea_stays_if_there_is_no_other_problem() -> None:
    reflections = [Reflection("q", "d"), Reflection("q", "c")]
    after, _ = spoil(reflections, [None, None], [pair("b"), pair("c")], "other-ideas", 1.0, random.Random(0))
    assert after == reflections


# ---------------------------------------------------------------------------------------------- dose, and the rest


@pytest.mark.parametrize("control", CONTROLS[1:])
def test_dose_is_the_share_of_reflections_that_are_spoiled(control: str) -> None:
    count = 500
    pairs = [pair("bcd" * 7, Problem(f"a{i % 2}", "a")) for i in range(count)]
    before = [Reflection("b", f"1={i % 2}") for i in range(count)]
    for dose in (0.0, 0.25, 1.0):
        spans = [(i % 2, 2) for i in range(count)]
        after, quotes = spoil(before, spans, pairs, control, dose, random.Random(0))
        changed = [
            one != other or was != is_now for one, other, was, is_now in zip(before, after, spans, quotes, strict=True)
        ]
        by_chance_where_it_was = 1 / 22 if control == "random-quotes" else 0.0
        assert mean(changed) == pytest.approx(dose * (1 - by_chance_where_it_was), abs=0.05)


def test_learn_from_names_the_rollouts_that_teach() -> None:
    right, wrong = pair("a"), pair("b")
    teaching = {which: [teaches(right, which), teaches(wrong, which)] for which in ("all", "right", "wrong")}
    assert teaching == {"all": [True, True], "right": [True, False], "wrong": [False, True]}


def test_the_oracle_of_arithmetic_quotes_the_first_error_and_names_the_true_step() -> None:
    task, problem, text = Arithmetic(), Problem("3+8-5*2", "3+8=1;1-5=6;6*2=2;#2"), "3+8=1;1-5=7;7*2=4;#4"
    y = Rollout(problem, task.encode(text), [], text, list(text), task.verify(problem, text))
    (reflection,) = oracle_reflections(None, task, [Pair(y, None, 0.0)])
    assert reflection.quote == "1-5=7" and reflection.idea.endswith("1-5=6")
    assert locate(reflection.quote, y.pieces) == (6, 11)


def test_the_oracle_asks_no_model(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(train_rosd, "write_reflections", None)
    monkeypatch.setattr(Letters, "true_reflection", lambda self, *_: "<explanation>d</explanation>")
    monkeypatch.setattr(train_rosd, "teacher_prompt", lambda task, y, peer, e, config: read.append(e))
    train(train_rosd, base, tmp_path, "--reflector", "oracle", "--batch", "6")
    assert set(read) == {"d"}


@pytest.mark.parametrize("flags", ["--control other-ideas", "--control random-quotes", "--learn-from wrong"])
def test_a_control_changes_what_is_learned_but_not_what_is_logged_of_the_reflector(
    flags: str, base: str, tmp_path: Path
) -> None:
    rows = []
    for out, more in ((tmp_path / "a", []), (tmp_path / "b", flags.split())):
        train(train_rosd, base, out, "--steps", "1", "--batch", "8", *more, reflect_temperature=1.0)
        rows += metrics(out)
    assert None not in (rows[0]["loss"], rows[1]["loss"]) and rows[0]["loss"] != rows[1]["loss"]
    if "learn" not in flags:
        assert rows[0]["error_position"] == rows[1]["error_position"]
