"""What a score holds, which problems it is measured on, and how domains are summed up."""

import dataclasses
from pathlib import Path
from types import ModuleType

import pytest
from conftest import Letters, both_scripts, settings, tiny_gpt, train

import evaluate as module
import train_rosd
from data import Problem, load_task
from evaluate import accuracy_of_text, comparison, elsewhere, evaluate, evaluate_run
from harness import files

TASK = Letters()  # a response is right if it has the letters of the question, loud with '!', cut off with 8 tokens


def test_a_score_is_of_all_samples_of_its_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    one = ["", "a", "abcd", "a!b!"]  # two of each problem
    two = ["abcdabcda", "dcba!", "!", "!!"]
    problems = {"one": [Problem("a1", "a"), Problem("b1", "b")], "two": [Problem("ab1", "ab")] * 2}
    monkeypatch.setattr(Letters, "problems", lambda self, domain, *_, **__: problems[domain])
    written = [[*TASK.encode(text), *TASK.stop] for text in one + two]
    monkeypatch.setattr(module, "generate", lambda *_, **__: written)
    scores = evaluate(tiny_gpt(TASK), TASK, ("one", "two"), problems=2, samples=2)
    more = {"problems": 2, "samples": 2}
    assert scores["one"] == {"mean": 0.75, "loud": 0.25, "unfinished": 0.0, "length": 9 / 4} | more
    assert scores["two"] == {"mean": 0.5, "loud": 0.75, "unfinished": 0.25, "length": 17 / 4} | more


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The questions of every test, in the order of the tests."""
    seen, answer = [], module.answer

    def recorded(model: object, task: object, problems: list, samples: int, **sampling: object) -> tuple:
        seen.append([problem.question for problem in problems])
        return answer(model, task, problems, samples, **sampling)

    monkeypatch.setattr(module, "answer", recorded)
    return seen


def test_problems_differ_by_base_and_seed_and_are_those_of_every_method(drawn: list, tmp_path: Path) -> None:
    task = load_task("arithmetic")
    for i in (0, 1):
        files.save_checkpoint(tmp_path / f"{i}.pt", tiny_gpt(task, seed=i))
    model = tiny_gpt(task)
    runs = [(0, "0", "rosd"), (0, "0", "grpo"), (0, "1", "rosd"), (1, "0", "rosd"), (1, "1", "sdpo")]
    for base, seed, method in runs:
        config = settings(train_rosd, str(tmp_path / f"{base}.pt"), tmp_path, "--seed", seed, "--method", method)
        evaluate_run(model, task, dataclasses.replace(config, eval_problems=10))
    first, same, *others = map(frozenset, drawn)
    assert first == same and drawn[0] == drawn[1] and len(drawn[0]) == 10 * len(task.domains)
    for one, other in [(first, each) for each in others] + [(others[0], others[2]), (others[1], others[2])]:
        assert len(one & other) < len(one) / 4


@both_scripts
def test_a_run_tests_base_and_student_on_the_same_problems(
    script: ModuleType, base: str, tmp_path: Path, drawn: list
) -> None:
    train(script, base, tmp_path, "--eval-problems", "30")
    before, after = [questions for questions in drawn if len(questions[-1]) == 3]  # of both domains, not SPD's text
    assert before == after


def test_greedy_text_is_of_as_many_problems_as_there_would_be_samples(drawn: list, base: str, tmp_path: Path) -> None:
    config = settings(train_rosd, base, tmp_path, "--domain", "two", "--eval-problems", "3", "--eval-samples", "4")
    scores = [accuracy_of_text(tiny_gpt(TASK), TASK, config, temperature=T)["two"] for T in (0.0, 1.0)]
    assert [(score["problems"], score["samples"]) for score in scores] == [(12, 1), (3, 4)]
    assert list(map(len, drawn)) == [12, 3] and drawn[0][:3] == drawn[1]


def score(**means: float) -> dict[str, dict]:
    return {name.replace("_", "-"): {"mean": mean, "loud": 0.25, "unfinished": 0.5} for name, mean in means.items()}


def test_elsewhere_is_the_mean_of_other_domains_and_exams_are_apart_from_unmarked_problems() -> None:
    assert elsewhere(score(mix=0.9, add=0.1, exam=0.3), "mix") == {"elsewhere": pytest.approx(0.1)}
    assert elsewhere(score(mix=0.9), "mix") == {} == elsewhere({}, "mix")
    exams = score(exam=0.9, exam_add=0.1, exam_mul=0.2, add=0.4, mul=0.5, mix=0.9)
    assert elsewhere(exams, "exam") == pytest.approx({"other exams": 0.15, "unmarked": 0.6})
    assert elsewhere(exams, "exam-add") == pytest.approx({"other exams": 0.55, "unmarked": 0.6})


def test_the_closing_table_has_a_column_and_a_legend_for_every_group() -> None:
    exams = score(exam=0.9, exam_add=0.125, add=0.4)
    table, *legend = comparison({"base": exams}, "exam", {"loud": "capital letters"}).rsplit("\n", 4)
    header, _, line = table.splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (header, line)]
    assert cells[0] == ["right answers, %", "on exam", "other exams", "unmarked", "loud", "unfinished"]
    assert cells[1] == ["base", "90.0", "12.5", "40.0", "25.0", "50.0"]
    assert [row.partition(":")[0] for row in legend] == cells[0][2:]
