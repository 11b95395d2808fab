"""Sums in steps: the verifier finds the first wrong step of any working, and stays silent where it cannot be sure."""

import json
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import train_rosd
import train_spd
from data import falsify, load_task
from data.sources import WordProblem, is_test
from data.steps import Steps, Sums, expression, solve
from data.working import Term
from errors import UserError
from harness.cli import run_script
from reflect import locate, parse_reflection, token_at


@pytest.fixture(scope="module")
def task(folder: Path) -> Steps:
    return load_task("steps", folder, max_response=48)


def problem(*terms: Term | int) -> WordProblem:
    terms = [term if isinstance(term, tuple) else (term,) for term in terms]
    answer = str(sum(map(math.prod, terms)))
    return WordProblem(f"What is {expression(terms)}?", solve(terms), answer, "sums", 0, {"terms": terms})


A, B, C = problem(8, 5, -2), problem(3, (4, 2), -6), problem(9, -4, 7, 3)  # 11, 5, 15
NOWHERE = [  # wrong, but nobody can say where for certain
    (A, "No idea."),
    (A, "The answer is 12 or 13."),
    (A, "Thirteen minus two makes ten. 10 - 2 = 8\nThe answer is 8"),
    (A, "He has 14 now.\n14 - 2 = 12\nThe answer is 12"),  # 14 was not computed in a step
    (A, "8 + 5 = 13"),  # it stops
    (A, "8 + x = 14\nThe answer is 14"),
    (A, "8 + 5 = 2^4\n16 - 2 = 14\nThe answer is 14"),
    (A, "8 + 5 = 14 percent\n8 + 5 = 13\n13 - 2 = 12\nThe answer is 12"),  # corrected afterwards
    (A, "8 + 2 = 10\n10 + 3 = 13\n13 - 2 = 12\nThe answer is 12"),  # 5 was split
    (A, "5 = 2 + 3\n8 + 2 = 10\n10 + 3 = 13\n14 - 3 = 11\nThe answer is 12"),
    (C, "16 - 4 = 12\nThe answer is 12"),  # 9 + 7 in the head
    (B, "2 x 4 = 8\n8 - 3 = 5\nThe answer is 4"),  # 8 - (6 - 3)
    (A, "8 + 5 = 13\n8 - 2 = 6\n13 + 6 = 19\nThe answer is 19"),
    (problem(5, 8, 3), "5 + 3 = 8\n8 + 3 = 11\nThe answer is 11"),  # 5 + 3 is right by accident
    (problem(6, -3, 7), "6 - 3 = 3\n3 - 7 = -4\nThe answer is -4"),  # 3 - 7 is -(7 - 3)
    (B, "2 + 2 = 4\n4 + 2 = 6\nThe answer is 6"),  # a product as a sum
    (A, "8 + 5 - 2 = ((13 - 2\nThe answer is )(13"),
    (A, "08 + 5 = 14\nThe answer is 14"),
    (A, "- 8 + 5 = 14\nThe answer is 14"),  # a list, or a negative number
    (A, "8 are there and 5 are eaten"),  # no step at all
    (A, "Some - 2\nThe answer is 2"),
    (A, "Adding 5 to x results in 13.\n13 - 2 = 12\nThe answer is 12"),
    (A, "8 + 5 = 13\nThe answer is 13. Now 13 - 2 = 12\nThe answer is 12"),  # two answers
    (A, "There are 8. One leaves. So now there are 7."),
    (problem(5, 2, 3), "One lamp plus 2 lamps plus 3 lamps equals 5 lamps. The answer is 13"),
]
FOUND = [  # the first wrong step is what stands between the angle quotes
    (A, "«8 + 5 = 14»\n14 - 2 = 12\nThe answer is 12"),
    (A, "8 + 5 = 13\n«13 - 2 = 12»\nThe answer is 12"),
    (A, "8 + 5 = 13\n13 - 2 = 11\n«The answer is 12»"),
    (A, "8 + 5 = 13\n13 - 2 = 11\n«So, the answer is: **12»**."),
    (A, "8 + 5 = 13\n«The answer is 13»"),
    (A, "«The answer is 13»"),
    (A, "8 + 5 = 13\n«13 + 2 = 15»\nThe answer is 15"),  # the sign
    (A, "«9 + 5 = 14»\n14 - 2 = 12\nThe answer is 12"),  # a foreign number
    (A, "8 + 5 = 13\n«13 + 5 = 18»\n18 - 2 = 16\nThe answer is 16"),  # a term twice
    (A, "8 + 5 = 13\n«13 + 8 = 21»\nThe answer is 21"),
    (A, "8 + 5 = 13\n8 + 5 = 13\n«13 - 2 = 12»\n13 - 2 = 12\nThe answer is 12"),  # repeated lines
    (A, "5 + 8 = 13\n«13 - 2 = 10»\nThe answer is 10"),  # another order
    (A, "5 - 2 = 3\n«8 + 3 = 12»\nThe answer is 12"),
    (A, "(8 + 5) - 2 = 13 - 2 = 11\n«The answer is 10»"),
    (A, "8 + 5 - 2 = «13 - 2 = 10»\nThe answer is 10"),
    (A, "«8 + 5 - 2 = 12»\nThe answer is 12"),
    (A, "8 + 5 = 13 - 2 = 11\n«The answer is 13»"),  # a running total
    (A, "8 + 5 = 13\n13 = «13 - 2 = 12»\nThe answer is 12"),
    (A, "1.25 = «1.25 * 4 = 6»\nThe answer is 6"),
    (A, "8 + 5 = «13 - 2 = 10»\nThe answer is 10"),
    (A, "8 + 5 - 2\n= «13 - 2\n= 12»\nThe answer is 12"),
    (A, "8 + 5 = 13, «13 - 2 = 12», so the answer is 12."),
    (A, "8 + 5 = 13. «13 - 2 = 12». The answer is 12."),
    (A, "Step 1: 8 + 5 = 13\nStep 2: «13 - 2 = 12»\nThe answer is 12"),
    (A, "1. 8 + 5 = 13\n2. «13 - 2 = 12»\nThe answer is 12"),
    (A, "* 8 + 5 = 13\n* «13 - 2 = 12»\nThe answer is 12"),
    (A, "First, there are 8 and 5: $8 + $5 = $13. Then $«13 - $2 = $12». The answer is $12."),
    (A, "8 marbles + 5 marbles = 13 marbles\n«13 marbles - 2 marbles = 12» marbles\nThe answer is 12"),
    (A, "8 plus 5 equals 13.\n«13 minus 2 is 12».\nThe answer is 12"),
    (A, "8 + 5 − 2 = «13 − 2 = 12»\nThe answer is 12"),
    (A, r"\(8 + 5 = 13\), \(«13 - 2 = 12»\). The answer is 12."),
    (A, "13 - 2 = 11\n«The answer is 12»"),  # 8 + 5 in the head
    (A, "13 = 8 + 5\n«12 = 13 - 2»\nThe answer is 12"),
    (A, "There are 8, then 5 more, so 13.\n«13 - 2 = 12»\nThe answer is 12"),
    (A, "8 + 5 = 13\n- 2 = 11\n«The answer is 13»"),  # the total is not repeated
    (A, "«18 + 5 = 23»\n23 - 2 = 21\nThe answer is 21"),
    (A, "«3 - 2 = 1»\nThe answer is 1"),
    (A, "8 + 5 = 13\n«3 - 2 = 1»\nThe answer is 1"),
    (A, "«1,008 - 1,000 = 8»\nThe answer is 8"),
    (A, "«8 + 5 = 13.5»\nThe answer is 13.5"),
    (B, "«3 + 4 = 7»\n7 * 2 = 14\n14 - 6 = 8\nThe answer is 8"),  # precedence
    (B, "4 * 2 = 8\n3 + 8 = 11\n«11 - 6 = 6»\nThe answer is 6"),
    (B, "2 x 4 = 8\n«8 * 3 = 24»\n24 - 6 = 18\nThe answer is 18"),
    (B, "«4 * 3 = 12»\n12 + 2 = 14\n14 - 6 = 8\nThe answer is 8"),
    (B, "3 + 4 * 2 - 6 = 3 + 8 - 6 = «11 - 6 = 4»\nThe answer is 4"),
    (C, "9 + 7 + 3 = 19\n19 - 4 = 15\n«The answer is 16»"),
    (C, "7 + 3 = 10\n9 - 4 = 5\n«10 + 5 = 16»\nThe answer is 16"),
    (C, "4 - 7 = -3\n9 - (-3) = 12\n«12 + 3 = 16»\nThe answer is 16"),
    (C, "9 - 4 = 5\n5 + 7 = 12\n«The answer is 12»"),  # a term is missing
]


@pytest.mark.parametrize(("asked", "response"), NOWHERE)
def test_what_cannot_be_read_hides_the_error(asked: WordProblem, response: str, task: Steps) -> None:
    verdict = task.verify(asked, response)
    assert not verdict.correct and verdict.error is None


@pytest.mark.parametrize(("asked", "marked"), FOUND)
def test_the_first_wrong_step_is_found(asked: WordProblem, marked: str, task: Steps) -> None:
    response = marked.replace("«", "").replace("»", "")
    verdict = task.verify(asked, response)
    assert not verdict.correct and verdict.error == (marked.index("«"), marked.index("»") - 1)
    read, tokens = parse_reflection(task.true_reflection(asked, response)), task.encode(response)
    pieces = task.pieces([*tokens, task.end()])
    assert locate(read.quote, pieces)[0] == token_at(verdict.error[0], pieces)  # what quote accuracy compares
    assert eval(read.idea.replace("The answer is", f"{asked.answer} ==").replace(" = ", " == "))


def test_the_remedy_is_the_step_that_belongs_there(task: Steps) -> None:
    for response, remedy in (
        ("8 + 5 = 14\nThe answer is 14", "8 + 5 = 13"),
        ("9 + 5 = 14\nThe answer is 14", "8 + 5 = 13"),
        ("8 + 5 = 13\n13 + 2 = 15\nThe answer is 15", "13 - 2 = 11"),
        ("5 - 2 = 3\n3 + 8 = 12\nThe answer is 12", "3 + 8 = 11"),
        ("8 + 5 = 13\n13 - 2 = 11\nThe answer is 9", "The answer is 11"),
    ):
        idea = parse_reflection(task.true_reflection(A, response)).idea
        assert idea == remedy
        false = falsify(idea, random.Random(0))
        assert false != idea and false[:-1] == idea[:-1]
    assert parse_reflection(task.true_reflection(A, A.solution)) == (None, "8 + 5 = 13, 13 - 2 = 11")


def test_any_text_is_read(task: Steps) -> None:
    rng = random.Random(0)
    words = ["8", "5", "13", "2", " ", "+", "-", "*", "/", "=", "(", ")", ".", ",", "\n", "$", "is", "answer is", "0"]
    for _ in range(3000):
        response = "".join(rng.choices(words, k=rng.randrange(30)))
        verdict = task.verify(A, response, ended=rng.random() < 0.5)
        start, end = verdict.error or (0, 1)
        assert 0 <= start < end <= max(1, len(response))
        task.true_reflection(A, response)
    for response in ("(" * 500 + "8 = 5", "-" * 500 + "8 = 5", "9" * 5000 + " + 1 = 2", "8 / 0 = 5", "9 ** 9 ** 9 = 1"):
        assert task.verify(A, response).error is None


def test_a_response_that_was_cut_off_is_not_right_and_its_last_number_no_error(task: Steps) -> None:
    cut = task.verify(A, "8 + 5 = 13\n13 - 2 = 1", ended=False)
    assert (cut.correct, cut.finished, cut.error) == (False, False, None)
    assert task.verify(A, "8 + 5 = 14\n14 - 2 = 1", ended=False).error == (0, 10)
    assert not task.verify(A, "8 + 5 = 13\n13 - 2 = 11\nThe answer is 11", ended=False).correct


def test_golden_solutions_are_right_and_a_changed_digit_is_found_where_it_is(task: Steps) -> None:
    rng = random.Random(0)
    for spec in ("steps", "steps:least=3:most=5:largest=99"):
        sums = Sums(spec)
        for asked in (p for domain in sums.domains for p in sums.draw(domain, 100, rng, False)):
            assert task.verify(asked, asked.solution) == task.verify(asked, asked.solution, ended=True)
            assert task.verify(asked, asked.solution).correct
            lines = asked.solution.split("\n")
            changed, at = rng.randrange(len(lines)), 0
            at = rng.choice([m.start() for m in re.finditer(r"\d", lines[changed])])
            digit = rng.choice([d for d in "123456789" if d != lines[changed][at]])
            lines[changed] = lines[changed][:at] + digit + lines[changed][at + 1 :]
            start, response = len("\n".join(lines[:changed])) + (changed > 0), "\n".join(lines)
            right = asked.solution.split("\n")[changed]
            if any(line.partition(" =")[0] in response[start + len(line) :] for line in (right, lines[changed])):
                continue  # a later line corrects it
            verdict = task.verify(asked, response if changed == len(lines) - 1 else response[:-1] + "x")
            assert verdict.error == (start, start + len(lines[changed])), (asked.question, response)


def working(asked: WordProblem, rng: random.Random) -> list[str]:
    """The steps of a right working in any order: every step joins two or three running totals."""
    totals, steps = [math.prod(term) for term in asked.entry["terms"]], []
    while len(totals) > 1:
        first = totals.pop(totals.index(rng.choice([total for total in totals if total >= 0])))
        joined = rng.sample(totals, min(len(totals), rng.choice((1, 1, 2))))
        for total in joined:
            totals.remove(total)
        signed = [f"{'+-'[total < 0]} {abs(total)}" for total in joined]
        written = f"({first} {signed[0]}) {signed[1]}" if len(signed) == 2 and rng.random() < 0.5 else None
        totals.append(first + sum(joined))
        steps.append(f"{written or ' '.join([str(first), *signed])} = {totals[-1]}")
        if totals[-1] < 0 and all(total < 0 for total in totals):
            return []
    return steps


def test_any_order_of_work_is_right_and_a_wrong_result_is_found_in_it(task: Steps) -> None:
    rng, found = random.Random(1), 0
    for asked in task.source.draw("longer", 400, rng, False):
        if not (steps := working(asked, rng)):
            continue
        for separator in ("\n", ", ", ". "):
            right = task.verify(asked, separator.join([*steps, "The answer is 999"]))
            assert right.error[0] == len(separator.join([*steps, ""])), (asked.question, steps)
            i = rng.randrange(len(steps))
            written, _, result = steps[i].rpartition(" = ")
            wrong = [*steps[:i], f"{written} = {int(result) + rng.choice((-10, -1, 1, 2))}"]
            response = separator.join([*wrong, "The answer is 999"])
            start = len(separator.join([*steps[:i], ""]))
            assert task.verify(asked, response).error == (start, start + len(wrong[-1])), (asked.question, response)
            found += 1
    assert found > 300


def test_reflections_are_taught_by_slips_in_any_step(task: Steps) -> None:
    rng, quoted = random.Random(0), set()
    for asked in task.problems("longer", 40, rng):
        wrong = task.wrong_solution(asked)
        assert not task.verify(asked, wrong).correct and wrong.count("\n") == asked.solution.count("\n")
        read = parse_reflection(task.true_reflection(asked, wrong))
        assert read.quote in wrong.split("\n") and read.idea in asked.solution.split("\n")
        quoted.add(wrong.split("\n").index(read.quote))
    assert quoted == {0, 1, 2}


def test_the_teachers_examples_hold_what_the_teacher_holds(folder: Path) -> None:
    """Examples without a hint teach the teacher to stop behind the step that its own hint names."""
    task = load_task("steps", folder, shots=2, max_response=48, reflect_shots=0)
    asked = task.problem("sums", random.Random(0))
    others, request = task.others(asked, 2), "\nWork step by step."
    student, hinted, shown = task.prompt(asked), task.prompt(asked, "6 * 7 = 42"), task.prompt(asked, None, "It is 42.")
    assert student.count("?" + request) == 3 and "Hint" not in student
    for i, other in enumerate(others):
        assert f"{other.question}\n\nHint: {other.solution.splitlines()[i]}{request}" in hinted
        assert f"{other.question}\n\nOne way to solve it, known to be right:\n{other.solution}{request}" in shown
        assert all(other.solution in text for text in (student, hinted))
    assert f"{asked.question}\n\nHint: 6 * 7 = 42{request}" in hinted


def test_problems_are_many_and_different_and_split_by_the_question(task: Steps) -> None:
    for domain in task.domains:
        for test in (False, True):
            drawn = task.source.draw(domain, 400, random.Random(0), test)
            assert all(is_test(p.question) == test for p in drawn)
            assert len({p.question for p in drawn}) == 400
            assert all(int(number) >= 0 for p in drawn for number in re.findall(r"= (-?\d+)", p.solution))
    assert task.problem("stories", random.Random(1)).question.count("?") == 1
    few = Sums("steps:least=2:most=2:largest=5").draw("sums", 200, random.Random(0), True)
    assert len(few) == 200 > len({p.question for p in few})  # there are no more


def test_other_domains_are_harder_by_one_thing_and_have_smaller_numbers(task: Steps) -> None:
    for domain, count in (("sums", 3), ("longer", 4), ("stories", 3), ("products", 3)):
        terms = [p.entry["terms"] for p in task.problems(domain, 300, random.Random(0))]
        assert {len(each) for each in terms} == {count}
        assert max(abs(t[0]) for each in terms for t in each[1:]) == (9 if domain == "sums" else 5)
        assert all((len(each[0]) == 2) == (domain == "products") for each in terms)


def test_step_results_and_the_answer_are_decisive(task: Steps) -> None:
    pieces = task.pieces([*task.encode(A.solution), task.end()])
    assert "".join(pieces[i].strip() for i in task.decisive(pieces)) == "131111"


def test_settings_out_of_range_are_refused(folder: Path) -> None:
    for spec in ("steps:most=9", "steps:least=1", "steps:largest=x", "steps:terms=3", "steps:least=4:most=3"):
        with pytest.raises(UserError, match="needs 2 <= least"):
            load_task(spec, folder)


@pytest.mark.parametrize("script", [train_rosd, train_spd], ids=lambda script: script.__name__)
def test_both_loops_run(script: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Steps.verify
    wrong = "8 + 5 = 14\nThe answer is 14"

    def verify(self: Steps, asked: WordProblem, response: str, ended: bool = True) -> Any:
        """A random model is never right: here every even response is, and the others have their error at the start."""
        even = len(response) % 2 == 0
        verdict = real(self, asked, asked.solution if even else wrong)
        return verdict if even else type(verdict)(False, True, (0, 1))

    monkeypatch.setattr(Steps, "verify", verify)
    flags = ["--task", "steps", "--shots", "1", "--base", folder, "--out", tmp_path, "--max-response", "8"]
    flags += ["--eval-problems", "2", "--eval-samples", "1", "--no-baseline", "--device", "cpu"]
    own = ["--steps", "1", "--batch", "2", "--group", "4", "--reflector", "oracle", "--mask", "oracle"]
    if script is train_spd:
        own = ["--epochs", "1", "--prompts", "2", "--batch", "2", "--calibration-size", "4", "--rank", "2"]
        own += ["--layers", "last"]
    monkeypatch.setattr(sys, "argv", ["train", *map(str, flags), *own])
    run_script(script.main)
    results = json.loads(next(tmp_path.glob("*/results.json")).read_text(encoding="utf-8"))
    assert set(results["after"]) == {"sums", "longer", "stories", "products"}
    if script is train_rosd:
        (row,) = next(tmp_path.glob("*/metrics.jsonl")).read_text(encoding="utf-8").splitlines()
        assert "quote_accuracy" in json.loads(row)
