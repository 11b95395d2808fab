"""From reflections to lessons: which rollouts teach, what the teacher holds, and what every setting changes."""

import random
from pathlib import Path

import pytest
import torch
from conftest import ROSD, Letters, make_rollout

import train_rosd
from data import Problem, Verdict
from data.answers import falsify
from data.arithmetic import Arithmetic
from harness.cli import parse_config
from harness.run import Run, run_name
from losses import group_advantage
from reflect import (
    Reflection,
    choose_peers,
    pair_up,
    parse_reflection,
    spoil_some,
)
from train_rosd import Config, Lesson, make_lessons, settle

# ---------------------------------------------------------------------------------------------- pairs


def test_peers_are_other_correct_rollouts_of_the_same_group() -> None:
    first, wrong, short = make_rollout("abc"), make_rollout("b"), make_rollout("a")
    alone, lost = make_rollout("da"), make_rollout("c")
    group = [first, wrong, short, alone, lost, lost]
    assert choose_peers(group, 3, "shortest") == [short, short, first, None, alone, alone]
    assert choose_peers(group, 3, "first") == [short, first, first, None, alone, alone]
    assert choose_peers([lost, lost], 2) == [None, None]


SOLVED, MIXED, LOST = ["a", "ab", "ac"], ["a", "b", "cd"], ["b", "c", "d"]


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ({}, ["a", "ab", "ac", "a", "b", "cd"]),
        ({"solved": "drop"}, ["a", "b", "cd"]),
        ({"learn_from": "right"}, ["a", "ab", "ac", "a"]),
        ({"learn_from": "wrong"}, ["b", "cd"]),
        ({"method": "sdpo"}, ["a", "ab", "ac", "b", "cd"]),  # a group's only correct rollout has no peer
        ({"method": "sdpo", "solved": "drop"}, ["b", "cd"]),
        ({"method": "opsd"}, ["a", "ab", "ac", "a", "b", "cd", "b", "c", "d"]),
    ],
)
def test_groups_without_a_peer_are_skipped_and_solved_ones_where_that_is_asked(flags: dict, kept: list[str]) -> None:
    rollouts = [make_rollout(text) for text in SOLVED + MIXED + LOST]
    pairs = pair_up(rollouts, settle(Config(group=3, **flags)))
    assert [rollout.text for rollout, _ in pairs] == kept


# ---------------------------------------------------------------------------------------------- lessons


@pytest.fixture
def run(letters: Letters, base: str, tmp_path: Path) -> Run:
    config = parse_config(Config, "", [*ROSD, "--base", base, "--out", str(tmp_path / "out")])
    return Run(settle(config), run_name(config))


def lessons_of(
    run: Run, texts: list[str], written: list[str], monkeypatch: pytest.MonkeyPatch, **flags: object
) -> tuple[list[Lesson], dict[str, list[float]]]:
    """The lessons of one group of rollouts whose reflections are given."""
    monkeypatch.setattr(
        train_rosd.reflect, "write_reflections", lambda model, task, asked, *_, **__: written[: len(asked)]
    )
    rollouts = [make_rollout(text) for text in texts]
    return make_lessons(rollouts, run.base, run.task, settle(Config(group=len(texts), **flags)), 0, run)


def write(quote: str, idea: str) -> str:
    return f"<error_quote>{quote}</error_quote><explanation>{idea}</explanation>"


@pytest.mark.parametrize(
    ("flags", "span"),
    [
        ({}, (1, 5)),
        ({"mask": "span"}, (1, 3)),
        ({"mask": "whole"}, (0, 5)),
        ({"mask": "oracle"}, (2, 5)),
        ({"method": "sdpo"}, (0, 5)),
        ({"method": "sdpo", "mask": "span"}, (1, 3)),
    ],
)
def test_mask_of_a_wrong_rollout(flags: dict, span: tuple[int, int], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Letters, "verify", lambda self, problem, text: Verdict("a" in text, True, None if "a" in text else (2, 3))
    )
    written = [write("bc", "d"), write("none", "d"), write("none", "d")]
    lessons, _ = lessons_of(run, ["dbcd", "a", "ab"], written, monkeypatch, **flags)
    assert [(lesson.start, lesson.end) for lesson in lessons] == [span, (0, 2), (0, 3)]


@pytest.mark.parametrize("mask", ["suffix", "span"])
def test_a_quote_that_is_not_found_leaves_the_whole_response(
    mask: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lesson, _), quotes = lessons_of(run, ["bc", "a"], [write("x", "d"), write("x", "d")], monkeypatch, mask=mask)
    assert (lesson.start, lesson.end) == (0, 3)
    assert quotes == {"quote_match": [False], "quote_accuracy": [], "error_position": [0.0]}


@pytest.mark.parametrize(
    ("flags", "prompts"),
    [
        ({}, ["a0d~?", "a0c~?"]),
        ({"context": "peer"}, ["a0~ab?", "a0~a?", "a0~a?"]),
        ({"context": "both"}, ["a0d~ab?", "a0c~a?", "a0~a?"]),
        ({"context": "gold"}, ["a0~a?", "a0~a?", "a0~a?"]),
        ({"malformed": "peer"}, ["a0d~?", "a0c~?", "a0~a?"]),
        ({"malformed": "peer", "peer": "first"}, ["a0d~?", "a0c~?", "a0~a?"]),
    ],
)
def test_what_the_teacher_holds(flags: dict, prompts: list[str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written = [write("x", "d"), write("x", "c"), "malformed"]
    lessons, _ = lessons_of(run, ["a", "ab", "c"], written, monkeypatch, **flags)
    assert [lesson.teacher_prompt for lesson in lessons] == prompts


def test_grpo_has_no_teacher_and_skips_groups_without_contrast(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lessons, quotes = lessons_of(run, ["a", "b", "c", "d"], [], monkeypatch, method="grpo")
    assert [lesson.advantage for lesson in lessons] == group_advantage(torch.tensor([[1.0, 0, 0, 0]]))[0].tolist()
    assert not any(quotes.values())
    assert lessons_of(run, ["b", "c"], [], monkeypatch, method="grpo")[0] == []
    assert make_lessons([], run.base, run.task, settle(Config(method="grpo")), 0, run)[0] == []  # a process's share


@pytest.mark.parametrize("who", ["base", "student"])
def test_reflector(who: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watch(rollouts: list, reflector: object, *rest: object) -> tuple[list, dict]:
        seen.append("student" if next(reflector.parameters()).requires_grad else "base")
        return [], {}

    monkeypatch.setattr(train_rosd, "make_lessons", watch)
    train_rosd.train(
        parse_config(Config, "", [*ROSD, "--base", base, "--out", str(tmp_path / "o"), "--reflector", who])
    )
    assert seen == [who] * 2


def test_the_oracle_knows_the_truth_and_asks_no_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lessons, _ = lessons_of(run, ["bc", "a"], [], monkeypatch, reflector="oracle")
    assert [lesson.teacher_prompt for lesson in lessons] == ["a0a~?"] * 2


def test_the_oracle_of_arithmetic_quotes_the_first_error_and_names_the_true_step() -> None:
    problem = Problem("3+8-5*2", "3+8=1;1-5=6;6*2=2;#2")
    written = parse_reflection(Arithmetic().true_reflection(problem, "3+8=1;1-5=7;7*2=4;#4"))
    assert written == Reflection("1-5=7", "1-5=6")


# ---------------------------------------------------------------------------------------------- misleading on purpose


def test_a_false_idea_has_another_result_and_nothing_else_changed() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        assert (false := falsify("3+4=7", rng))[:4] == "3+4=" and false[4] in "012345689"
        assert (false := falsify("so it is 12, then", rng))[:10] == "so it is 1" and false[10] in "013456789"
        assert falsify("1=2 and 3 = 40", rng) not in ("1=2 and 3 = 40", "")
    assert falsify("no digit", random.Random(0)) == "no digit"


def test_a_spoiled_quote_is_a_piece_of_the_rollout_no_longer_than_the_quote_was() -> None:
    wrong, quotes, spoiling = make_rollout("bcdbdc"), set(), Config(spoil_quote=1.0)
    for seed in range(50):
        (read,) = spoil_some([Reflection("cd", "e")], [wrong], Letters(), spoiling, random.Random(seed))
        assert read.idea == "e" and read.quote in "bcdbdc<end>" and 1 <= len(read.quote) <= 2
        quotes.add(read.quote)
    assert len(quotes) > 5


def test_spoiled_ideas_reach_the_lessons_of_correct_rollouts_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written = [write("x", "d1"), write("x", "c2")]
    lessons, _ = lessons_of(run, ["a", "b"], written, monkeypatch, spoil_idea=1.0)
    plain, _ = lessons_of(run, ["a", "b"], written, monkeypatch)
    for spoiled, lesson in zip(lessons, plain, strict=True):
        assert spoiled.teacher_prompt != lesson.teacher_prompt
        assert spoiled.teacher_prompt[:3] == lesson.teacher_prompt[:3]
        assert (spoiled.start, spoiled.end) == (lesson.start, lesson.end)


def test_ideas_of_other_problems_are_exchanged(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        train_rosd.reflect, "write_reflections", lambda *_, **__: [write("x", idea) for idea in "ddccc"]
    )
    rollouts = [
        make_rollout("a"),
        make_rollout("b"),
        *(make_rollout("b", problem=Problem("b0", "b")) for _ in range(3)),
    ]
    pairs = [(rollout, rollouts[0]) for rollout in rollouts]
    config = settle(Config(spoil_idea=1.0, spoil_kind="other"))
    read = train_rosd.reflect_on(pairs, run.base, run.task, config, 0, run)
    assert [reflection.idea for reflection in read] == list("ccddd")


def test_an_idea_without_another_problem_stays(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lessons, _ = lessons_of(
        run, ["a", "b"], [write("x", "d"), write("x", "c")], monkeypatch, spoil_idea=1.0, spoil_kind="other"
    )
    assert [lesson.teacher_prompt for lesson in lessons] == ["a0d~?", "a0c~?"]


def test_spoiled_quotes_change_only_where_wrong_rollouts_are_masked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written = [write("b", "c")] * 8
    lessons, _ = lessons_of(run, ["a"] + ["bcdbcdb"] * 7, written, monkeypatch, spoil_quote=1.0)
    assert lessons[0].start == 0 and {lesson.teacher_prompt for lesson in lessons} == {"a0c~?"}
    assert len({lesson.start for lesson in lessons[1:]}) > 1


# ---------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("rosd", ("reflection", "suffix", "shortest", "base", False, "keep", "drop", 0.0, 1, 1e-3)),
        ("sdpo", ("peer", "whole", "shortest", "base", False, "keep", "drop", 0.0, 1, 1e-3)),
        ("opsd", ("gold", "whole", "shortest", "base", False, "keep", "drop", 0.0, 1, 1e-3)),
        ("grpo", ("reward", "whole", "shortest", "base", False, "keep", "drop", 0.0, 1, 1e-3)),
        ("rosd released", ("reflection", "suffix", "first", "student", True, "drop", "peer", 0.0, 1, 1e-3)),
        ("sdpo released", ("peer", "whole", "first", "base", False, "drop", "drop", 0.05, 1, 1e-3)),
        ("opsd released", ("gold", "whole", "shortest", "base", False, "drop", "drop", 0.0, 1, 1e-3)),
        ("grpo released", ("reward", "whole", "shortest", "base", False, "keep", "drop", 0.0, 4, 1e-4)),
    ],
)
def test_presets_are_the_table_of_paper_and_released_code(method: str, expected: tuple) -> None:
    name, preset = [*method.split(), "paper"][:2]
    names = ("context", "mask", "peer", "reflector", "give_answer", "solved", "malformed", "ema", "minibatches")
    config = settle(Config(method=name, preset=preset))
    assert tuple(getattr(config, field) for field in (*names, "learning_rate")) == expected


def test_a_flag_wins_over_preset_and_method() -> None:
    flags = {"context": "both", "peer": "shortest", "give_answer": False, "ema": 0.0, "learning_rate": 0.5}
    config = settle(Config(preset="released", **flags))
    assert {name: getattr(config, name) for name in flags} == flags and config.reflector == "student"
