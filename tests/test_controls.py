"""What the controls change in the reflections, and what they leave alone."""

import dataclasses
import random
from pathlib import Path
from statistics import mean

import pytest
from conftest import Letters, make_rollout, metrics, train

import train_rosd
from controls import CONTROLS, oracle_reflections, spoil, teaches
from data import Problem, falsify
from data.arithmetic import Arithmetic
from reflect import Pair, Reflection, Rollout


def pair(text: str, problem: Problem | None = None) -> Pair:
    return Pair(make_rollout(text, problem) if problem else make_rollout(text), None, 0.0)


def draws(reflection: Reflection, y: Pair, count: int, control: str = "random-quotes") -> list[Reflection]:
    rng = random.Random(0)
    return [spoil([reflection], [y], control, 1.0, rng)[0] for _ in range(count)]


# ---------------------------------------------------------------------------------------------- random quotes


@pytest.mark.parametrize("text", ["bc", "bcd", "bcdbcdb", "bcd" * 13])
def test_random_quotes_begin_at_every_token_equally_often(text: str) -> None:
    y = pair(text)
    T, found = len(y.y.tokens), draws(Reflection("bc", "e", (0, 2)), y, 4000)
    assert {reflection.span[0] for reflection in found} == set(range(T))
    # drawn uniformly, k / T has mean (T - 1) / 2T, and its standard error is below 0.005
    assert mean(reflection.span[0] / T for reflection in found) == pytest.approx((T - 1) / (2 * T), abs=0.02)


def test_random_quotes_lie_where_they_were_drawn_even_if_their_text_occurs_earlier() -> None:
    """All the text is the same: located by their text, all would begin at 0."""
    y, k = pair("bbbbbb"), random.Random(0)
    for reflection in draws(Reflection("bb", "e", (0, 2)), y, 30):
        k.random()  # the dose
        start = k.randrange(7)
        assert reflection.span == (start, min(start + 2, 7))


def test_random_quotes_are_as_long_as_the_quote_or_one_token_if_none_was_found() -> None:
    y = pair("bcdbcdb")
    assert {r.span[1] - r.span[0] for r in draws(Reflection("bcd", "e", (0, 3)), y, 200) if r.span[0] < 6} == {3}
    assert {r.span[1] - r.span[0] for r in draws(Reflection("x", "e", None), y, 200)} == {1}
    assert {(r.quote, r.idea) for r in draws(Reflection("bcd", "e", (0, 3)), y, 10)} == {("bcd", "e")}


def test_random_quotes_leave_correct_rollouts_alone() -> None:
    reflection = Reflection("a", "e", (0, 1))
    assert draws(reflection, pair("abcdabc"), 20) == [reflection] * 20


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
    before = Reflection("b", "3+4=7", (0, 1))
    for after in draws(before, pair(text), 10, "false-ideas"):
        assert after.idea != before.idea and after.idea.startswith("3+4=")
        assert dataclasses.replace(after, idea=before.idea) == before


def test_other_ideas_are_never_of_this_problem() -> None:
    one, two, three = (Problem(f"{letter}0", letter) for letter in "abc")
    pairs = [pair("b", problem) for problem in (one, one, two, two, three)]
    reflections = [Reflection("q", idea, (0, 1)) for idea in ("one", "ONE", "two", None, "three")]
    received = [set() for _ in pairs]
    for seed in range(100):
        for ideas, r in zip(received, spoil(reflections, pairs, "other-ideas", 1.0, random.Random(seed)), strict=True):
            assert (r.quote, r.span) == ("q", (0, 1))
            ideas.add(r.idea)
    ones = {"one", "ONE"}
    # a malformed reflection stays malformed, and its missing idea is given to nobody
    assert received == [{"two", "three"}, {"two", "three"}, ones | {"three"}, {None}, ones | {"two"}]


def test_an_idea_stays_if_there_is_no_other_problem() -> None:
    reflections = [Reflection("q", "d"), Reflection("q", "c")]
    assert spoil(reflections, [pair("b"), pair("c")], "other-ideas", 1.0, random.Random(0)) == reflections


# ---------------------------------------------------------------------------------------------- dose, and the rest


@pytest.mark.parametrize("control", CONTROLS[1:])
def test_dose_is_the_share_of_reflections_that_are_spoiled(control: str) -> None:
    count = 500
    pairs = [pair("bcdbcdbcdbcdbcdbcdbcd", Problem(f"a{i % 2}", "a")) for i in range(count)]
    reflections = [Reflection("b", f"1={i % 2}", (0, 1)) for i in range(count)]
    for dose in (0.0, 0.25, 1.0):
        after = spoil(reflections, pairs, control, dose, random.Random(0))
        changed = sum(one != other for one, other in zip(reflections, after, strict=True)) / count
        kept_by_chance = 1 / 22 if control == "random-quotes" else 0.0
        assert changed == pytest.approx(dose * (1 - kept_by_chance), abs=0.05)


def test_no_control_changes_nothing() -> None:
    reflections = [Reflection("b", "1=2", (0, 1)), Reflection()]
    assert spoil(reflections, [pair("b"), pair("a")], "none", 1.0, random.Random(0)) == reflections


def test_learn_from_names_the_rollouts_that_teach() -> None:
    right, wrong = pair("a"), pair("b")
    assert [(teaches(right, which), teaches(wrong, which)) for which in ("all", "right", "wrong")] == [
        (True, True),
        (True, False),
        (False, True),
    ]


def test_the_oracle_of_arithmetic_quotes_the_first_error_and_names_the_true_step() -> None:
    task, problem, text = Arithmetic(), Problem("3+8-5*2", "3+8=1;1-5=6;6*2=2;#2"), "3+8=1;1-5=7;7*2=4;#4"
    y = Rollout(problem, task.encode(text), [], text, list(text), task.verify(problem, text))
    assert oracle_reflections(None, task, [Pair(y, None, 0.0)], False) == [Reflection("1-5=7", "1-5=6", (6, 11))]


def test_the_oracle_asks_no_model(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_rosd, "write_reflections", None)
    read = []
    monkeypatch.setattr(Letters, "true_reflection", lambda self, *_: "<explanation>d</explanation>")
    monkeypatch.setattr(train_rosd, "teacher_prompt", lambda task, y, peer, e, config: read.append(e))
    train(train_rosd, base, tmp_path, "--reflector", "oracle", "--batch", "6")
    assert set(read) == {"d"}


@pytest.mark.parametrize("flags", ["--control other-ideas", "--control random-quotes", "--learn-from wrong"])
def test_a_control_changes_what_is_learned(flags: str, base: str, tmp_path: Path) -> None:
    small = ("--steps", "1", "--batch", "8")
    losses = []
    for out, more in ((tmp_path / "a", []), (tmp_path / "b", flags.split())):
        train(train_rosd, base, out, *small, *more, reflect_temperature=1.0)
        losses.append(metrics(out)[0]["loss"])
    assert None not in losses and losses[0] != losses[1]
