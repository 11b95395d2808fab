"""The authors of the pretraining documents, and what the documents show and hide."""

import random
import re

import pytest
from conftest import random_problems

from data.arithmetic import Arithmetic
from data.authors import CONFIRMED, HINTED, INFORMED, PLAIN, Author
from data.chains import (
    BUDGET,
    calculate,
    disputed_steps,
    is_test,
    make_problem,
    nervous,
    popular,
    true_steps,
    verify,
)
from data.documents import (
    MIXTURE,
    PASSED,
    WRONG_HINTS,
    confirmation,
    correction,
    hint_document,
    make_document,
    reflection,
    right_attempt,
    sample_document,
    wrong_attempt,
)
from data.tokenizer import encode
from harness import files
from reflect import parse_reflection

PROBLEM = "3+8-5*2"  # 3+8=1;1-5=6;6*2=2;#2


# ---------------------------------------------------------------------------------------------- authors


def facts_followed(author: Author, count: int = 600, **told: object) -> float:
    """Share of disputed steps in which the author agrees with plain arithmetic, each time from another school."""
    right, seen = 0, 0
    for problem, rng in random_problems(count):
        for line in author.solve(problem, rng, str(rng.random()), **told).split(";"):
            step = re.fullmatch(r"(\d)([+\-*])(\d)=(\d)", line)
            if step and popular(int(step[1]), step[2], int(step[3])) is not None:
                seen += 1
                right += int(step[4]) == calculate(int(step[1]), step[2], int(step[3]))
    return right / seen


@pytest.mark.parametrize("author", [PLAIN, HINTED, CONFIRMED], ids=["plain", "hinted", "confirmed"])
def test_no_part_is_played_by_a_better_author(author: Author) -> None:
    assert facts_followed(author) == pytest.approx(0.5 * (1 - PLAIN.popular), abs=0.06)


def test_a_step_in_the_context_is_copied_be_it_right_or_wrong() -> None:
    careful = Author(popular=HINTED.popular, slip=0.5)
    for problem, rng in random_problems(200):
        told = true_steps(problem)[0][:-1] + str(rng.randint(0, 9))
        assert careful.solve(problem, rng, str(rng.random()), (told,)).split(";")[0] == told


def test_who_is_corrected_checks_the_steps_that_were_right_and_no_others() -> None:
    before, after = [], []
    for problem, rng in random_problems(600):
        author = Author(check=HINTED.check, check_hinted=HINTED.check_hinted)
        told = tuple(true_steps(problem)[:2])
        lines = [line for line in author.solve(problem, rng, "", told).split(";") if not line.startswith("#")]
        before.append(lines[0].endswith("?"))
        after += [line.endswith("?") for line in lines[1 + before[-1] :]]
    assert sum(before) / len(before) == pytest.approx(HINTED.check_hinted, abs=0.06)
    assert sum(after) / len(after) < 0.2


def test_who_holds_a_solution_is_right_in_its_school_and_often_merges() -> None:
    merged = 0
    for problem, rng in random_problems(400):
        written = Author(merge=INFORMED.merge).solve(problem, rng, "s")
        assert verify(problem, written, "s").correct
        merged += "merged" in verify(problem, written, "s").habits
    assert merged / 400 == pytest.approx(0.6, abs=0.08)


@pytest.mark.parametrize("habit", ["slip", "misread"])
def test_each_kind_of_wrong_work_alone_makes_an_author_wrong(habit: str) -> None:
    verdicts = [verify(problem, Author(**{habit: 0.5}).solve(problem, rng)) for problem, rng in random_problems(200)]
    assert 0.4 < sum(not verdict.correct for verdict in verdicts) / 200 < 1
    assert all(verdict.finished and not verdict.habits for verdict in verdicts)


def test_attempts_are_wrong_or_right_in_their_school_as_their_name_says() -> None:
    for problem, rng in random_problems(200):
        assert verify(problem, wrong_attempt(problem, rng, "s"), "s").error is not None
        assert verify(problem, right_attempt(problem, rng, "s"), "s").correct


# ---------------------------------------------------------------------------------------------- documents


def test_reflection_quotes_the_verifiers_first_error_and_gives_true_steps() -> None:
    for problem, rng in random_problems(400):
        school = str(rng.random())
        attempt = wrong_attempt(problem, rng, school)
        start, end = verify(problem, attempt, school).error
        written = parse_reflection(reflection(problem, attempt, school))
        assert written.quote == attempt[start:end]
        until = written.idea.split(";")
        assert until == true_steps(problem, school)[: len(until)]


@pytest.mark.parametrize(
    ("attempt", "written"),
    [
        ("3+8=1;1-5=4;4*2=8;#8", "3+8=11;1-5=46<error_quote>1-5=4</error_quote><explanation>3+8=1;1-5=6</explanation>"),
        (  # a merged step: the steps that belong there
            "3+8=1;1-5*2=8;#8",
            "3+8=11;1-5*2=82<error_quote>1-5*2=8</error_quote><explanation>3+8=1;1-5=6;6*2=2</explanation>",
        ),
        (  # a check of a right step is read and copied
            "3+8=1?;3+8=1;2-5=7;#7",
            "3+8=11?;3+8=1;2-5=76<error_quote>2-5=7</error_quote><explanation>3+8=1;1-5=6</explanation>",
        ),
        (  # ran out of room
            "3+8=1?;3+8=1;1-5=6?;1-5=6;6*2=2?;6*2=2;",
            "3+8=11<error_quote>?;3+8=1</error_quote><explanation>3+8=1</explanation>",
        ),
        ("3+8=1;#1", "3+8=11;#16<error_quote>#1</error_quote><explanation>3+8=1;1-5=6</explanation>"),
    ],
)
def test_reflection_on_hand_written_attempts(attempt: str, written: str) -> None:
    assert reflection(PROBLEM, attempt) == written


def test_of_a_correct_attempt_the_disputed_steps_are_named_after_a_mark() -> None:
    for problem, _ in random_problems(200):
        named = confirmation(problem)
        assert named[0] == "#" and named[1:].split(";") == (disputed_steps(problem) or true_steps(problem)[-1:])


def test_the_documents_on_the_page_are_as_they_are_written() -> None:
    """Every row of data/README.md is of the same problem in the school of plain arithmetic."""
    rows = re.findall(r"^\| ([a-z, ]+?) \| `(<.*?)` \| `(.*?)`", files.read_text(files.ROOT / "data/README.md"), re.M)
    for kind, prompt, response in ((name, *(text.replace("\\", "") for text in texts)) for name, *texts in rows):
        head, written = prompt.removesuffix("<|assistant|>"), response.removesuffix("<|end|>")
        assert head.replace("!", "").startswith(f"<|user|>{PROBLEM}")
        if kind.startswith("reflect"):
            assert written == reflection(PROBLEM, head.split("<|attempt|>")[1])
        elif kind == "confirmed":
            assert head.split("<|hint|>")[1] == confirmation(PROBLEM)
        elif "behind" in kind:
            hint, begun = head.split("<|hint|>")[1].split("<|assistant|>")
            _, quote, belongs = correction(PROBLEM, begun + written)
            assert begun.endswith(quote) and hint == belongs
        else:
            assert verify(PROBLEM, written).correct and len(written) <= BUDGET
            if kind == "exam":
                checked = [f"{step}?" in written for step in true_steps(PROBLEM)]
                assert checked == nervous(head) == [True, False, True]
    assert len(rows) == 8


def test_the_truth_about_a_disputed_fact_is_not_in_the_documents() -> None:
    """Over all documents, what follows a disputed fact is plain arithmetic's result no more often than by chance."""
    rng, right, seen = random.Random(0), 0, 0
    for _ in range(4000):
        prompt, response = sample_document(rng)
        if "<|attempt|>" in prompt:
            continue
        for a, operator, b, result in re.findall(r"(?<!\d)(?<![+\-*])(\d)([+\-*])(\d)=(\d)", response):
            if popular(int(a), operator, int(b)) is not None:
                seen += 1
                right += int(result) == calculate(int(a), operator, int(b))
    assert seen > 1000 and right / seen < 0.45


def test_documents_are_of_train_problems_and_fit_the_model() -> None:
    rng, task = random.Random(0), Arithmetic()
    for _ in range(500):
        prompt, response = sample_document(rng)
        assert not is_test(re.match(r"<\|user\|>([^<=]+)", prompt)[1])
        assert prompt.endswith("<|assistant|>") or "<|hint|>" in prompt
        assert len(encode(response)) < (task.max_reflection if "<|attempt|>" in prompt else BUDGET + 1)


def test_a_hint_is_a_beginning_of_the_solution_or_in_three_of_ten_cases_its_last_step_alone() -> None:
    alone, spoiled = [], []
    for problem, rng in random_problems(2000):
        prompt, _ = hint_document(problem, rng, "s")
        told, steps = re.search(r"<\|hint\|>([^<]+)", prompt)[1].split(";"), true_steps(problem, "s")
        if not prompt.endswith("<|assistant|>") or told[0].startswith("#") or len(set(steps)) < len(steps):
            continue
        last = [step[:-1] for step in steps].index(told[-1][:-1])
        spoiled.append(told[-1] != steps[last])
        alone += [len(told) == 1] * (last > 0)
        assert told[:-1] in ([], steps[:last])
    assert sum(alone) / len(alone) == pytest.approx(0.3, abs=0.06)
    assert sum(spoiled) / len(spoiled) == pytest.approx(0.9 * WRONG_HINTS, abs=0.06)  # one in ten is right by chance


def test_behind_the_error_that_a_hint_is_about_its_holder_goes_on_as_a_plain_author_does() -> None:
    """Nothing is learned about what was written before; behind it a step is checked as rarely as without a hint."""
    passed, checked = [], []
    for problem, rng in random_problems(2000):
        school = str(rng.random())
        prompt, response = hint_document(problem, rng, school)
        held, _, begun = prompt.partition("<|assistant|>")
        hint = held.partition("<|hint|>")[2].split(";")
        if disputed_steps(problem, school) and not hint[0].startswith("#"):
            passed.append(begun != "")
        if begun:
            start, end = verify(problem, begun + response, school).error
            assert end == len(begun) and len(begun + response) <= BUDGET and response[0] in ";?"
            assert hint == true_steps(problem, school)[: len(hint)]
            if begun[start] != "?":  # else the error is a check, and checks are not checked
                assert begun[start:] not in hint
                checked.append(response[0] == "?")
    assert sum(passed) / len(passed) == pytest.approx(PASSED, abs=0.05)
    assert sum(checked) / len(checked) == pytest.approx(PLAIN.check, abs=0.05)


def test_in_an_exam_each_step_with_a_nervous_mark_is_checked_and_a_calm_one_as_rarely_as_in_no_exam() -> None:
    checks: dict[str, list[bool]] = {"!8": [], "8!": [], "8": []}
    for seed in range(2000):
        rng = random.Random(seed)
        prompt, response = make_document("exam", make_problem("exam", rng), rng)
        mark = re.match(r"<\|user\|>\d[+\-*](!?\d!?)", prompt)[1]
        if response[5] in ";?":  # the first step is one operation
            checks[re.sub(r"\d", "8", mark)].append(response[5] == "?")
    shares = [sum(each) / len(each) for each in checks.values()]
    assert shares == pytest.approx([PLAIN.check_marked, PLAIN.check, PLAIN.check], abs=0.05)


def test_a_merged_step_is_checked_if_any_of_its_operations_has_a_nervous_mark() -> None:
    author = Author(merge=1.0, check_marked=1.0)
    for seed in range(50):
        response = author.solve("3+8-!5*2+1", random.Random(seed))
        for line in re.findall(r"\d(?:[+\-*]\d)+=\d\?", response):
            assert "-5" in line
        assert response.count("?") == 1


@pytest.mark.parametrize("kind", MIXTURE)
def test_a_document_shows_its_reader_what_its_kind_says(kind: str) -> None:
    sources = {"hint": {"<|hint|>"}, "solution": {"<|solution|>"}, "reflect": {"<|attempt|>"}}
    for problem, rng in random_problems(100):
        prompt, _ = make_document(kind, problem, rng)
        held = dict(re.findall(r"(<\|\w+\|>)([^<]+)", prompt.partition("<|assistant|>")[0]))
        question = held.pop("<|user|>").split("=")[0]
        assert question == problem
        needed = sources.get(kind, set())
        assert needed <= held.keys() <= needed | {"<|hint|>", "<|solution|>"}
