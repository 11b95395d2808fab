"""Problems in words and their answers: found, compared, read from files or drawn from Reasoning Gym."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS, WORKED, find, write_lines
from test_hub import write_model
from test_hub_tokenizer import write_tokenizer

from data import Task, load_task
from data.answers import equal, final_answer
from data.sources import is_test
from errors import UserError

# ---------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("response", "golden", "right"),
    [
        ("Answer: 42", "42", True),
        ("**Answer:** 42 apples.", "42", True),
        ("The answer is $42.00.", "42", True),
        ("so that \\boxed{42} remain; 7 are gone", "42", True),
        ("Answer: \\(\\boxed{\\frac{1}{2}}\\)", "1/2", True),
        ("Answer:\n1,234,567", "1234567", True),
        ("#### 1{,}200 €", "1200", True),
        ("Answer: −5", "-5", True),
        ("Answer: - 5", "-5", True),
        ("It is 10-5", "5", True),
        ("Answer: 50%", "50", True),
        ("Answer: .5", "1/2", True),
        ("Answer: 3 + 4 = 7", "7", True),
        ("Answer: 7 (as 3 + 4 = 7)", "7", True),
        ("Answer: 5. No, wait. Answer: 6", "6", True),
        ("first 3, then 9", "9", True),
        ("Answer: 42", "$42 dollars", True),
        ("Answer: 4.2e1", "42", True),
        ("Answer: 43", "42", False),
        ("Answer: -42", "42", False),
        ("Answer: 84/2", "42", False),
        ("Answer: 421", "42", False),
        ("Answer: 1/0", "42", False),
        ("Answer: " + "9" * 5000, "42", False),
        ("Answer: 1e99999999999", "42", False),
        ("no number at all", "42", None),
        ("", "42", None),
        ("Answer: friday.", "Friday", True),
        ("It falls on a\nFriday", "Friday", True),
        ("Answer: Monday", "Friday", False),
        ("", "Friday", None),
    ],
)
def test_answers_are_found_and_compared(response: str, golden: str, right: bool | None) -> None:
    found = final_answer(response, golden)
    assert (found is None) == (right is None)
    assert found is None or equal(found, golden) == right


# ---------------------------------------------------------------------------------------------- files


def test_files_are_split_by_question_and_drawn_without_repetition(task: Task, tmp_path: Path) -> None:
    rng = random.Random(0)
    train, test = ({p.question for p in task.problems("eggs", 40, rng, split)} for split in (False, True))
    assert train.isdisjoint(test) and train | test == {row["question"] for row in [*ROWS, WORKED]}
    assert all(map(is_test, test)) and len(task.problems("eggs", len(train), rng)) == len(train)


def test_gsm8k_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    task = load_task(str(write_lines(tmp_path / "gsm.jsonl", [*ROWS, WORKED])), folder)
    problem = find(task, "gsm", "Ann")
    assert problem.answer == "72"
    assert problem.solution == "She sold 48/2 = 24 clips.\nShe got 24 * 3 = 72 dollars.\nThe answer is 72"
    assert task.verify(problem, problem.solution).correct and not task.verify(problem, "Answer: 24").correct


@pytest.mark.parametrize(
    ("rows", "cause"),
    [
        ([], "0 problems, none of them for the"),
        ([*ROWS, '{"question": '], "line 19, is not of the form"),
        ([*ROWS, {"question": "Why?"}], "line 19, is not of the form"),
        ([{"question": " ", "answer": "3"}], "line 1, has an empty question"),
        (["3"], "line 1, is not of the form"),
        ([{"question": "How many?", "answer": "work ####"}], "line 1, has an empty question or answer"),
        ([{"question": "How many?", "answer": None}], "line 1, is not of the form"),
        ([{"question": {"text": "a"}, "answer": ["4"]}], "line 1, is not of the form"),
        (ROWS[:1], "none of them for the"),
        ([*ROWS, {"question": "egg " * 3000, "answer": "3"}], "problem 19 of bad"),
    ],
    ids=range(10),
)
def test_broken_files_are_named_with_their_line(folder: Path, tmp_path: Path, rows: list[Any], cause: str) -> None:
    with pytest.raises(UserError, match=cause) as error:
        load_task(str(write_lines(tmp_path / "bad.jsonl", rows)), folder)
    assert "\n" not in str(error.value)


def test_other_bad_input_is_told_in_one_sentence(folder: Path, tmp_path: Path, file: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    for spec, base, cause in (
        ("eggs", folder, "there is no task 'eggs'"),
        ("gone.jsonl", folder, "gone.jsonl cannot be read"),
        (str(tmp_path / "latin.jsonl"), folder, "cannot be read"),
        (str(file), "data/base.pt", "give one with --base"),
        (str(file), tmp_path, r"tokenizer\.json is missing"),
    ):
        with pytest.raises(UserError, match=cause):
            load_task(spec, base)
    with pytest.raises(UserError, match="neither --shots"):
        load_task("arithmetic", shots=2)


def test_characters_outside_the_vocabulary_are_told(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "Qwen3")
    raw = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    del raw["model"]["vocab"]["ó"]  # the byte F3, as SmolLM2 lacks some
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    write_model(tmp_path, "Llama", max_position_embeddings=2048)
    path = write_lines(tmp_path / "odd.jsonl", [*ROWS, {"question": "Is \U000f0000 a word?", "answer": "no"}])
    with pytest.raises(UserError, match=r"problem 19 of odd.*outside the tokenizer's vocabulary"):
        load_task(str(path), tmp_path)


# ---------------------------------------------------------------------------------------------- Reasoning Gym


def test_gym_draws_disjoint_splits_and_judges_by_its_own_scores(folder: Path) -> None:
    pytest.importorskip("reasoning_gym")
    task = load_task("gym:chain_sum:max_digits=1,gcd,spell_backward", folder)
    assert task.domains == ("chain_sum:max_digits=1", "gcd", "spell_backward")
    for domain in task.domains:
        train, test = (task.problems(domain, 60, random.Random(0), split) for split in (False, True))
        assert {p.question for p in train}.isdisjoint(p.question for p in test)
        assert train == task.problems(domain, 60, random.Random(0))
        for problem in train:
            assert task.verify(problem, problem.solution).correct
            assert task.verify(problem, f"Let me see.\nSo the answer is: {problem.answer}").correct
            assert not task.verify(problem, "Answer: 12345").correct


@pytest.mark.parametrize(
    ("spec", "cause"),
    [
        ("gym:chainsum", "no dataset 'chainsum' .*; give another name"),
        ("gym:", "no dataset ''"),
        ("gym:gcd:size=0", "no dataset 'gcd:size=0'"),
        ("gym:gcd:most=3", "no dataset 'gcd:most=3' .*'most'"),
        ("gym:gcd:max_value", "name=value"),
        ("gym:rush_hour", "no golden answers"),
        ("gym:products:max_digits=1:size=2", "in 1000 draws"),
    ],
)
def test_gym_refusals_are_one_sentence(folder: Path, spec: str, cause: str) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UserError, match=cause) as error:
        task = load_task(spec, folder)
        for test in (False, True):
            task.problem(task.domains[0], random.Random(0), test)
    assert "\n" not in str(error.value)


def test_gym_without_the_package_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="pip install"):
        load_task("gym:gcd", folder)
