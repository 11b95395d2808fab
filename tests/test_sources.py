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
from data.sources import Gym, WordProblem, is_test
from errors import UserError

# ---------------------------------------------------------------------------------------------- answers


def right(response: str, golden: str) -> bool:
    found = final_answer(response, golden)
    return found is not None and equal(found, golden)


RIGHT = {
    "42": r"Answer: 42|**Answer:** 42 apples.|The answer is $42.00.|The answer is **42**.|\boxed{42} remain; 7 are gone"
    r"|\(\boxed{42\text{ apples}}\)|Answer: 4.2e1|x = 42|The answer is 42, because 6 * 7 = 42|12 and 18 make 42",
    "1/2": r"Answer: \(\boxed{\frac{1}{2}}\)|\frac12|Answer: .5|½|The answer is 0.5",
    "1 1/2": r"1.5|1½|1\frac{1}{2}|1 1/2 cups",
    "1234567": r"Answer: 1,234,567|1{,}234{,}567|1 234 567|1,\!234,\!567 €",
    "-5": r"Answer: −5|Answer: - 5|–5|negative 5|-$5",
    "7": "Answer: 3 + 4 = 7|Answer: 7 (as 3 + 4 = 7)"
    "|Answer: 5. No, wait. Answer: 7|first 3, then 7|The GCD of 14 and 21 is 7",
    "$42 dollars": "Answer: 42|42 dollars",
    "½": "0.5",
    "50%": "50|Answer: 50%",
    "x^2": "The answer is x^2",
    r"\frac{\pi}{4}": r"so \boxed{\frac{\pi}{4}}.",
    "Friday": r"Answer: friday.|The answer is **Friday**.|Answer: “Friday”.|It falls on a:Friday|\boxed{\text{Friday}}",
    "x > 3": "The answer is x > 3.",
    "*": "The answer is *",
}
# A number that belongs to something larger is not the answer: a wrong verdict is worse than none.
WRONG = {
    "1": r"1 1/2|1 234|1,\!234|1e400|1½|1.5|1,5|1:30|1_000|1'000|10|The answer is 1 or 2|1/0",
    "2": r"\sqrt{2}|\sqrt 2|√2|√ 2|2**3|2 ** 3|2x|2 x|2 pi|2⁵|2^5|2·3|2 squared|2/|±2|log 2|5 ÷ 2|2-3|2+",
    "3": "–3|negative 3|minus 3|−3|- 3|3 million|The answer is 3 hours and 20 minutes"
    "|(3, 4)|3!|more than 3|3 and a half|3k",
    "12": r"\frac12|2 12|The answer is 12 out of 20",
    "10": "10^3|10³|It is 20-10",
    "23": "2**3|2 3",
    "42": "Answer: 43|Answer: -42|Answer: 84/2|Answer: 421|no number"
    "|6 * 7 = 42. The answer is unknown|1e9999999999|0x42",
    "42 apples": "42 pears|The answer is 42 pears",
    "12 May": "The answer is 12 June",
    "x^2": "2|x^3",
    "2x": "2|2",
    r"\sqrt{2}": "2",
    r"\frac{\pi}{4}": "4",
    "x > 3": "x < 3|3",
    "*": "?|.|**",
    "Friday": "Monday",
}


@pytest.mark.parametrize(("cases", "verdict"), [(RIGHT, True), (WRONG, False)], ids=["right", "wrong"])
def test_an_answer_is_the_golden_one_only_as_a_whole(cases: dict[str, str], verdict: bool) -> None:
    pairs = [(golden, text.replace(":F", ":\nF")) for golden in cases for text in cases[golden].split("|")]
    assert [pair for pair in pairs if right(pair[1], pair[0]) != verdict] == []
    assert not any(right(text, golden) for golden in ("42", "Friday") for text in ("", " ", "9" * 5000))


# ---------------------------------------------------------------------------------------------- files


def test_files_are_split_by_question_and_drawn_without_repetition(task: Task) -> None:
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


def test_a_response_that_was_cut_off_has_no_answer(task: Task) -> None:
    problem = find(task, "eggs", "Ann")
    whole, cut = (task.verify(problem, "The answer is 72", ended) for ended in (True, False))
    assert (whole.correct, whole.finished) == (True, True) and (cut.correct, cut.finished) == (False, False)


@pytest.mark.parametrize(
    ("rows", "cause"),
    [
        ([], "0 problems, none of them for the"),
        ([*ROWS, '{"question": '], "line 19, is not of the form"),
        ([*ROWS, {"question": "Why?"}], "line 19, is not of the form"),
        ([{"question": " ", "answer": "3"}], "line 1, has an empty question"),
        (["3"], "line 1, is not of the form"),
        ([{"question": "How many?", "answer": "work ####"}], "line 1, has an empty question or answer"),
        *(([{"question": "Why?", "answer": bad}], "line 1, is not of the form") for bad in (None, True, ["4"])),
        *(([f'{{"question": "Why?", "answer": {bad}}}'], "line 1, .* no finite number") for bad in ("NaN", "1e999")),
        ([r'{"question": "Which?", "answer": "\udfff"}'], "line 1, is not of the form.*surrogates not allowed"),
        (ROWS[:1], "none of them for the"),
        ([*ROWS, {"question": "egg " * 3000, "answer": "3"}], "problem 19 of bad"),
    ],
    ids=range(14),
)
def test_broken_files_are_named_with_their_line(folder: Path, tmp_path: Path, rows: list[Any], cause: str) -> None:
    with pytest.raises(UserError, match=cause) as error:
        load_task(str(write_lines(tmp_path / "bad.jsonl", rows)), folder)
    assert "\n" not in str(error.value)


def test_other_bad_input_is_refused_in_one_sentence(folder: Path, tmp_path: Path, file: Path) -> None:
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
    for task in ("arithmetic", "exams", "facts"):
        with pytest.raises(UserError, match=f"the task {task} takes none of --shots"):
            load_task(task, shots=2)


def test_characters_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "Qwen3")
    raw = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    del raw["model"]["vocab"]["ó"]  # the byte F3, as SmolLM2 lacks some
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    write_model(tmp_path, "Llama", max_position_embeddings=2048)
    path = write_lines(tmp_path / "odd.jsonl", [*ROWS, {"question": "Is \U000f0000 a word?", "answer": "no"}])
    with pytest.raises(UserError, match=r"problem 19 of odd.*outside the tokenizer's vocabulary"):
        load_task(str(path), tmp_path)


# ---------------------------------------------------------------------------------------------- Reasoning Gym

INTEGRATION = {"intermediate_integration", "simple_integration"}
REFUSED = {
    "running it as code": {"countdown", "polynomial_multiplication", "puzzle24", *INTEGRATION},
    "no golden answers": {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"},
    "at least one dataset": {"composite"},  # its settings are datasets
}
SMALL = {"acre": ":size=50", "word_ladder": ":size=50"}  # these two make all their problems at once


def judged(gym: Gym, problem: WordProblem, response: str) -> bool:
    answer = final_answer(response, problem.answer)
    return answer is not None and gym.right(problem, answer)


@pytest.mark.filterwarnings("ignore")
def test_every_dataset_accepts_its_golden_answers_and_no_others_or_is_refused() -> None:
    factory, refused = pytest.importorskip("reasoning_gym.factory"), {}
    for name in factory.DATASETS:
        domain = name + SMALL.get(name, "")
        try:
            gym = Gym(domain)
        except UserError as error:
            refused[name] = str(error)
            continue
        for problem in gym.draw(domain, 2, random.Random(0), test=False):
            golden = problem.answer
            for response in (golden, f"{golden}.", f"The answer is {golden}", f"So the answer is **{golden}**."):
                assert judged(gym, problem, response), (name, response)
            assert not any(judged(gym, problem, text) for text in ("The answer is ?", "I do not know.", ""))
    assert {cause: {name for name in refused if cause in refused[name]} for cause in REFUSED} == REFUSED
    assert refused.keys() == set.union(*REFUSED.values())


def test_gym_draws_disjoint_splits(folder: Path) -> None:
    pytest.importorskip("reasoning_gym")
    task = load_task("gym:chain_sum:max_digits=1,gcd,spell_backward", folder)
    assert task.domains == ("chain_sum:max_digits=1", "gcd", "spell_backward")
    for domain in task.domains:
        train, test = (task.problems(domain, 60, random.Random(0), split) for split in (False, True))
        assert {p.question for p in train}.isdisjoint(p.question for p in test)
        assert train == task.problems(domain, 60, random.Random(0))


def test_a_number_is_right_only_if_the_whole_of_it_is() -> None:
    """The scorer of gsm_symbolic takes the first digits of a text as its number."""
    pytest.importorskip("reasoning_gym")
    gym = Gym("gsm_symbolic,time_intervals:task_types=['date']")
    for domain in gym.domains:
        for problem in gym.draw(domain, 5, random.Random(0), test=False):
            number = int(problem.answer.split()[0]) or 1
            wrong = (-number, f"{number}/7", f"{number} 1/2", f"{number}e2", f"{number},000", f"{number}^2", number + 1)
            assert judged(gym, problem, f"It is {problem.answer}.")
            assert not any(judged(gym, problem, f"The answer is {text}") for text in wrong)


def test_partial_marks_are_not_enough() -> None:
    """The scorer of time_intervals gives 0.99999 to a time that is a second off."""
    pytest.importorskip("reasoning_gym")
    gym = Gym("time_intervals:task_types=['time_seconds']")
    for problem in gym.draw(gym.domains[0], 5, random.Random(0), test=False):
        minutes, seconds = problem.answer[:-2], int(problem.answer[-2:])
        assert judged(gym, problem, problem.answer)
        assert not judged(gym, problem, f"{minutes}{(seconds + 1) % 60:02}")


# Each would run for hours, take all memory, end the run or do as it likes, if a scorer evaluated it.
HARMFUL = ["9**9**9**9", "2**(9**9)", "99999999!", "((((((9**99)**99)**99)**99)**99)**99)", "factorial(99999999)"]
HARMFUL += ["sum(range(10**11))", "'a'*10**12", "[0 for _ in range(10**11)]", "1e999999999", "exit()"]
HARMFUL += ["(" * 4000, "-" * 4000 + "1", "__import__('pathlib').Path('made').touch()"]
EVALUATE = ("n_queens", "binary_matrix", "spiral_matrix", "string_insertion", "bitwise_arithmetic", "number_sorting")


@pytest.mark.parametrize("name", [*EVALUATE, "coin_flip", "codeio", "power_function"])
def test_what_a_model_wrote_is_never_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    monkeypatch.chdir(tmp_path)
    gym = Gym(name)
    problems = gym.draw(name, 3, random.Random(0), test=False)
    for problem in problems:
        assert not any(gym.right(problem, text) for text in HARMFUL if final_answer(text, problem.answer))
    assert not Path("made").exists() and eval("1 + 1") == 2


def test_partial_marks_of_long_answers_are_not_computed() -> None:
    """codeio compares two JSON trees in a time that grows with the fourth power of their size."""
    pytest.importorskip("reasoning_gym")
    gym = Gym("codeio")
    problem = gym.draw("codeio", 1, random.Random(0), test=False)[0]
    problem.entry["answer"] = json.dumps({"grid": [[*range(30)]] * 30})
    assert not gym.right(problem, json.dumps({"grid": [[*range(1, 31)]] * 30}))


@pytest.mark.parametrize(
    ("spec", "cause"),
    [
        ("gym:chainsum", "no dataset 'chainsum' .*; give another name"),
        ("gym:", "no dataset ''"),
        ("gym:gcd:size=0", "no dataset 'gcd:size=0'"),
        ("gym:gcd:most=3", "no dataset 'gcd:most=3' .*'most'"),
        ("gym:gcd:max_value", "name=value"),
        ("gym:countdown", "running it as code; choose another one"),
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
