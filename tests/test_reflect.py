"""From rollouts to lessons: reading a reflection, locating its quote, the mask, and what every setting changes."""

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from conftest import ROSD, Letters

import reflect
import train_rosd
from data import Problem, Task, Verdict, load_task
from harness.cli import parse_config, run_script
from harness.run import Run, run_name
from losses import group_advantage
from reflect import (
    Reflection,
    Rollout,
    choose_peers,
    error_mask,
    false_idea,
    locate,
    locate_span,
    pair_up,
    parse_reflection,
    spoil,
    true_position,
)
from train_rosd import Config, Lesson, make_lessons, settle

TAGS = ("<error_quote>", "</error_quote>", "<explanation>", "</explanation>")
ONE = Problem("a0", "a")


def make_rollout(text: str, task: Task | None = None, problem: Problem = ONE) -> Rollout:
    task = task or Letters()
    tokens = [*task.encode(text), task.end()]
    return Rollout(problem, tokens, [0.0] * len(tokens), text, task.verify(problem, text))


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
        ("<ERROR_QUOTE>q</Error_Quote><EXPLANATION>e</explanation>", "q", "e"),
        ("<explanation> e\n</explanation>", None, "e"),
        ("<explanation> </explanation>", None, None),
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
        (" bc ", ["a", "bc", "d"], 1),  # as in the released code, without the white space around it
        (" b", ["b", " b"], 1),  # but as it is, where it occurs as it is
        ("  ", ["a", "b"], None),
        ("", ["a", "b"], None),
        (None, ["a", "b"], None),
        ("a", [], None),
    ],
)
def test_quote_is_located_at_the_token_where_it_first_begins(quote: str | None, tokens: list[str], k: int) -> None:
    assert locate(quote, tokens) == k


@pytest.mark.parametrize(
    ("quote", "tokens", "span"),
    [
        ("bc", ["a", "b", "c", "d"], (1, 3)),
        ("b", ["a", "b", "c"], (1, 2)),
        ("cd", ["ab", "cde", "f"], (1, 2)),
        ("ef", ["ab", "cde", "f"], (1, 3)),  # begins inside one token and ends with the next
        (" bc ", ["a", "b", "c", "d"], (1, 3)),
        (" b", ["a", " ", "b", "c"], (1, 3)),
        ("x", ["a", "b"], None),
    ],
)
def test_span_is_the_tokens_that_hold_the_quote(quote: str, tokens: list[str], span: tuple[int, int] | None) -> None:
    assert locate_span(quote, tokens) == span


def test_true_position_is_the_token_where_the_verifiers_error_begins() -> None:
    rollout = dataclasses.replace(make_rollout("b!c"), verdict=Verdict(False, True, (2, 5)))
    assert true_position(rollout, ["b", "!c", "d", "<end>"]) == 1
    assert true_position(make_rollout("b!c"), ["b", "!", "c", "<end>"]) == 0  # none is named


def test_random_bytes_are_read_and_located_without_exception() -> None:
    rng = random.Random(2)
    for i in range(10_000):
        parts = [rng.randbytes(rng.randrange(12)) for _ in range(rng.randrange(6))]
        if i % 2:
            parts = [part for text in parts for part in (text, rng.choice(TAGS).encode())]
        encoding = "latin-1" if i % 4 < 2 else "utf-8"
        tokens = [part.decode(encoding, errors="replace") for part in parts]
        read = parse_reflection("".join(tokens))
        assert read.quote != "" and read.idea != ""
        rng.shuffle(tokens)
        k, forms = locate(read.quote, tokens), {read.quote or "", (read.quote or "").strip()}
        assert (k is not None) == any(form and form in "".join(tokens) for form in forms)
        assert k is None or 0 <= k < len(tokens)


@pytest.mark.parametrize("task", [Letters(), load_task("arithmetic")], ids=lambda task: type(task).__name__)
def test_random_tokens_are_verified_read_and_located_without_exception(task: Task) -> None:
    rng = random.Random(3)
    for _ in range(300):
        problem = task.problem(rng.choice(task.domains), rng)
        tokens = [rng.randrange(task.vocab_size) for _ in range(1 + rng.randrange(40))]
        text, texts = task.decode(tokens), task.pieces(tokens)
        rollout = Rollout(problem, tokens, [0.0] * len(tokens), text, task.verify(problem, text))
        assert 0 <= true_position(rollout, texts) <= len(tokens)
        read = parse_reflection(text)
        k = locate(read.quote, texts)
        assert k is None or 0 <= k < len(tokens)
        task.encode(task.teacher_prompt(problem, read.idea, problem.solution))


# ---------------------------------------------------------------------------------------------- error_mask, reflect


def test_mask_covers_each_response_from_its_start_to_its_end() -> None:
    mask = error_mask([0, 2, 3, 1], [2, 4, 3, 2], [2, 4, 3, 3])
    assert torch.equal(mask, torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]))


def test_reflector_reads_a_wrong_rollout_beside_its_peer_and_a_right_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    task, shown = Letters(), []

    def write(reflector: None, prompts: list[list[int]], *args: object, **settings: object) -> list[list[int]]:
        shown.extend("".join(task.pieces(prompt)) for prompt in prompts)
        return [task.encode(f"{i}!") for i, _ in enumerate(prompts)]

    monkeypatch.setattr(reflect, "generate", write)
    rollouts = [make_rollout("bc"), make_rollout("ba")]
    for told_answer, answer in ((False, ""), (True, "a")):
        assert reflect.reflect(None, task, rollouts, ["ad", "ad"], told_answer) == ["0!", "1!"]
        assert shown == [f"a0{answer}~bc~ad?", f"a0{answer}~ba~?"]
        shown.clear()


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
        ({"method": "sdpo"}, ["a", "ab", "ac", "b", "cd"]),  # a group's only correct rollout has no peer
        ({"method": "sdpo", "solved": "drop"}, ["b", "cd"]),
        ({"method": "opsd"}, ["a", "ab", "ac", "a", "b", "cd", "b", "c", "d"]),
    ],
)
def test_groups_without_a_peer_are_skipped_and_solved_ones_where_that_is_asked(flags: dict, kept: list[str]) -> None:
    rollouts = [make_rollout(text) for text in SOLVED + MIXED + LOST]
    config = settle(Config(**flags))
    pairs = pair_up(rollouts, 3, config.peer, config.context, config.solved == "drop")
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
    monkeypatch.setattr(train_rosd, "reflect", lambda reflector, task, rollouts, *_: written[: len(rollouts)])
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


# ---------------------------------------------------------------------------------------------- misleading on purpose


def test_a_false_idea_has_another_result_and_nothing_else_changed() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        assert (false := false_idea("3+4=7", rng))[:4] == "3+4=" and false[4] in "012345689"
        assert (false := false_idea("so it is 12, then", rng))[:10] == "so it is 1" and false[10] in "013456789"
        assert false_idea("1=2 and 3 = 40", rng) not in ("1=2 and 3 = 40", "")
    assert false_idea("no digit", random.Random(0)) == "no digit"


def test_a_spoiled_quote_is_a_piece_of_the_rollout_as_long_as_the_quote_was() -> None:
    tokens, quotes = list("abcdefgh"), set()
    for seed in range(50):
        read = spoil(Reflection("cd", "e"), tokens, None, True, random.Random(seed))
        assert read.idea == "e" and read.quote in "abcdefgh" and 1 <= len(read.quote) <= 2
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
    monkeypatch.setattr(train_rosd, "reflect", lambda *_: [write("x", idea) for idea in "ddccc"])
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
        ("grpo", ("none", "whole", "shortest", "base", False, "keep", "drop", 0.0, 1, 1e-3)),
        ("rosd released", ("reflection", "suffix", "first", "student", True, "drop", "peer", 0.0, 1, 1e-3)),
        ("sdpo released", ("peer", "whole", "first", "base", False, "drop", "drop", 0.05, 1, 1e-3)),
        ("opsd released", ("gold", "whole", "shortest", "base", False, "drop", "drop", 0.0, 1, 1e-3)),
        ("grpo released", ("none", "whole", "shortest", "base", False, "keep", "drop", 0.0, 4, 1e-4)),
    ],
)
def test_presets_are_the_table_of_paper_and_released_code(method: str, expected: tuple) -> None:
    name, preset = [*method.split(), "paper"][:2]
    names = ("context", "mask", "peer", "reflector", "told_answer", "solved", "malformed", "ema", "minibatches")
    config = settle(Config(method=name, preset=preset))
    assert tuple(getattr(config, field) for field in (*names, "learning_rate")) == expected


def test_a_flag_wins_over_preset_and_method() -> None:
    flags = {"context": "both", "peer": "shortest", "told_answer": False, "ema": 0.0, "learning_rate": 0.5}
    config = settle(Config(preset="released", **flags))
    assert {name: getattr(config, name) for name in flags} == flags and config.reflector == "student"


# ---------------------------------------------------------------------------------------------- worked example


def test_the_worked_example_is_of_any_task(
    letters: Letters, base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["reflect.py", "--base", base, "--domain", "one"])
    run_script(reflect.main)
    printed = capsys.readouterr().out
    assert "wrong rollout y-" in printed and ("m_t" in printed or "malformed" in printed)
