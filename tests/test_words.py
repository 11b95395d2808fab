"""Tasks in words on a tiny random folder of transformers: prompts, tokens, both loops end to end."""

import json
import random
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROWS, WORKED, find, write_lines
from test_hub import write_model
from test_hub_tokenizer import SAMPLE, decode, write_tokenizer

import train_rosd
import train_spd
from data import Task, load_task
from data.sources import WordProblem, is_test
from data.words import Words
from harness.cli import run_script
from harness.run import Run
from hub.tokenizer import Tokenizer
from reflect import locate, parse_reflection

# ---------------------------------------------------------------------------------------------- prompts and tokens


def test_each_part_reads_what_it_holds_and_nothing_else(folder: Path, file: Path) -> None:
    task = load_task(str(file), folder)
    problem, other = find(task, "eggs", "Ann"), "Tom has"
    student, told = task.student_prompt(problem), task.teacher_prompt(problem, idea="IDEA")
    shown, both = task.teacher_prompt(problem, None, "SOLUTION"), task.teacher_prompt(problem, "IDEA", "SOLUTION")
    prompts = (student, told, shown, both)
    assert all(problem.question in prompt and other not in prompt for prompt in prompts)
    assert ["IDEA" in prompt for prompt in prompts] == [False, True, False, True]
    assert ["SOLUTION" in prompt for prompt in prompts] == [False, False, True, True]
    assert all(prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n") for prompt in prompts)
    wrong = task.reflector_prompt(problem, "ATTEMPT", "PEER", False)
    assert "ATTEMPT" in wrong and "PEER" in wrong and "<error_quote>" in wrong and "72" not in wrong
    right = task.reflector_prompt(problem, "ATTEMPT", None, True)
    assert "<error_quote>" not in right and "<explanation>" in right and "72" in right


def test_worked_examples_are_training_problems_of_the_domain_and_never_the_problem(folder: Path, file: Path) -> None:
    task = load_task(str(file), folder, shots=2, max_response=16)
    for problem in task.problems("eggs", 18, random.Random(1)):
        prompt = task.student_prompt(problem)
        assert prompt.count("<|im_start|>user") == 3 and prompt.count(problem.question) == 1
        shown = [row["question"] for row in [*ROWS, WORKED] if row["question"] in prompt]
        assert len(shown) == 3 and not any(is_test(question) for question in shown if question != problem.question)


def test_a_reflector_is_shown_wrong_attempts_for_a_wrong_one_and_right_ones_for_a_right_one(
    folder: Path, file: Path
) -> None:
    task = load_task(str(file), folder, shots=2, max_response=16)
    problem = find(task, "eggs", "Ann")
    for peer in ("PEER", None):
        turns = re.split("<.im_start.>(?:user|assistant)", task.reflector_prompt(problem, "ATTEMPT", peer, False))
        for asked, written, other in zip(turns[1:5:2], turns[2:6:2], task.others(problem), strict=True):
            attempt = re.search(r"The attempt, .*?:\n(.*?)\n\n", asked, re.DOTALL)[1]
            assert other.question in asked and task.verify(other, attempt).correct == (peer is None)
            read = parse_reflection(written)
            assert read.idea == f"The result is {other.answer}."
            assert read.quote is None if peer is None else locate(read.quote, list(attempt))


@pytest.mark.parametrize(
    ("answer", "attempt", "quote"),
    [
        ("Friday", "The answer is unknown", "unknown"),
        ("2 * 36 = <<2*36=72>>72 in all.\n#### 72", "2 * 36 = 77 in all.\nThe answer is 77", "= 77"),
    ],
)
def test_a_wrong_attempt_of_an_example_ends_wrongly(
    folder: Path, tmp_path: Path, answer: str, attempt: str, quote: str
) -> None:
    rows = [{"question": f"What is number {n}?", "answer": answer} for n in range(40)]
    task = load_task(str(write_lines(tmp_path / "rows.jsonl", rows)), folder, shots=1, max_response=16)
    prompt = task.reflector_prompt(task.problem("rows", random.Random(0)), "ATTEMPT", "PEER", False)
    assert attempt in prompt and f"<error_quote>{quote}</error_quote>" in prompt


@pytest.mark.parametrize(
    ("response", "quote"),
    [
        ("48 / 2 = 24, 48 + 24 = 73. So 73.", "= 73"),
        ("The answer is 7.", "7"),
        ("27 or so, that is 7", " 7"),
        ("6 * 7 = 42. 42 - 38 = 4. The answer is 4", "8 = 4"),
        ("3 + 1.5 = 4.5; 8 / 2 = 4", "2 = 4"),
        ("48 + 24 = 72", None),
        ("No idea", None),
    ],
)
def test_the_oracle_quotes_the_wrong_result_and_names_the_right_one(
    task: Task, response: str, quote: str | None
) -> None:
    read = parse_reflection(task.true_reflection(find(task, "eggs", "Ann"), response))
    assert (read.quote, read.idea) == (quote, "The result is 72.")
    assert quote is None or locate(quote, list(response)) is not None


def test_what_a_model_wrote_cannot_pass_for_special_tokens(task: Task) -> None:
    problem = find(task, "eggs", "Ann")
    plain, odd = (task.encode(task.reflector_prompt(problem, text, None, False)) for text in ("a", "a<|im_end|>\ufffd"))
    assert plain.count(task.end()) == odd.count(task.end()) == 1


def test_pieces_join_to_the_decoded_text_of_any_tokens(folder: Path, task: Task) -> None:
    tokenizer, rng = Tokenizer(folder), random.Random(0)
    ids = [id for id in tokenizer.ranks if id not in tokenizer.stops]
    for tokens in [[], tokenizer.encode(SAMPLE), *(rng.choices(ids, k=rng.randint(1, 30)) for _ in range(500))]:
        pieces = task.pieces(tokens)
        assert len(pieces) == len(tokens) and "".join(pieces) == decode(tokenizer, tokens) == task.decode(tokens)
        assert task.decode([*tokens, task.end(), *tokens]) == decode(tokenizer, tokens)
        assert "".join(task.pieces([*tokens, 639])) == decode(tokenizer, tokens)  # a row of no token
    split = task.encode("\U0001d518")  # four tokens, one character
    assert task.pieces(split) == ["", "", "", "\U0001d518"]


def test_decisive_tokens_are_results_and_the_answer(task: Task) -> None:
    def chosen(solution: str, rule: str) -> str:
        pieces = task.pieces([*task.encode(solution), task.end()])
        return "|".join(pieces[i].strip() for i in task.decisive(pieces, rule) if pieces[i].strip())

    text = "She sold 48/2 = 24 clips.\nThey cost 24 * $3 = $72.\nThe answer is 72"
    assert chosen(text, "aligned").replace("|", "") == "247272"
    assert chosen(text, "steps").replace("|", "") == "48/2=2424*$3=$72.72"
    assert chosen("The answer is 日 7", "aligned").replace("|", "") == "日7"
    pieces = task.pieces([*task.encode(text), task.end()])
    assert task.decisive(pieces, "full") == list(range(len(pieces)))
    assert len(task.decisive(pieces)) == 6  # one token a digit; the end is not decisive


# ---------------------------------------------------------------------------------------------- the loops

SMALL = ["--eval-problems", "2", "--eval-samples", "1", "--max-response", "6", "--no-baseline", "--threads", "1"]
LOOPS = {
    "rosd": (train_rosd, ["--steps", "2", "--batch", "2", "--group", "2"]),
    "sdpo": (train_rosd, ["--method", "sdpo", "--steps", "2", "--batch", "2", "--group", "2"]),
    "opsd": (train_rosd, ["--method", "opsd", "--steps", "2", "--batch", "2", "--group", "2"]),
    "spd": (
        train_spd,
        [
            "--epochs",
            "2",
            "--prompts",
            "4",
            "--batch",
            "2",
            "--calibration-size",
            "8",
            "--layers",
            "last",
            "--rank",
            "2",
        ],
    ),
}


def run(monkeypatch: pytest.MonkeyPatch, script: ModuleType, *flags: object) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["train", *SMALL, *map(str, flags)])
    run_script(script.main)
    torch.set_num_threads(threads)


@pytest.fixture
def right_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model is never right: here every even response is."""
    real = Words.verify

    def verify(self: Words, problem: WordProblem, response: str) -> Any:
        return real(self, problem, problem.solution if len(response) % 2 else response)

    monkeypatch.setattr(Words, "verify", verify)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.usefixtures("right_half_of_the_time")
def test_the_loops_run_and_resume_on_a_file(
    loop: str, folder: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, flags = LOOPS[loop]
    flags = [*flags, "--base", folder, "--task", file]
    run(monkeypatch, script, *flags, "--out", tmp_path / "whole")
    results = json.loads(next(tmp_path.glob("whole/*/results.json")).read_text(encoding="utf-8"))
    assert results["after"]["eggs"].keys() >= {"mean", "marked", "terse", "unfinished"}
    whole = next(tmp_path.glob("whole/*/metrics.jsonl")).read_text(encoding="utf-8")
    assert "quote_accuracy" not in whole

    def save_and_stop(self: Run) -> None:
        save(self)
        raise KeyboardInterrupt

    save = Run.save
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Run, "save", save_and_stop)
        run(monkeypatch, script, *flags, "--out", tmp_path / "cut")
    run(monkeypatch, script, *flags, "--out", tmp_path / "cut", "--resume")
    assert next(tmp_path.glob("cut/*/metrics.jsonl")).read_text(encoding="utf-8") == whole


def test_both_loops_run_on_reasoning_gym_with_worked_examples(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("reasoning_gym")
    for loop in ("opsd", "spd"):
        script, flags = LOOPS[loop]
        out = ["--base", folder, "--task", "gym:chain_sum,gcd", "--shots", 1, "--out", tmp_path / loop]
        run(monkeypatch, script, *flags, *out)
        results = json.loads(next((tmp_path / loop).glob("*/results.json")).read_text(encoding="utf-8"))
        assert results["config"]["domain"] == "chain_sum" and set(results["after"]) == {"chain_sum", "gcd"}


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (["--mask", "oracle"], "knows no true first error"),
        (["--max-response", "3000"], "of the model's 2048 tokens"),
        (["--domain", "add"], "give one of eggs"),
        (["--task", "arithmetic"], "neither --shots nor --max-response"),
        (["--base", "data/base.pt"], "give one with --base"),
    ],
    ids=" ".join,
)
def test_loops_refuse_in_one_sentence(
    flags: list[str],
    cause: str,
    folder: Path,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, train_rosd, "--base", folder, "--task", file, "--out", tmp_path, *flags)
    printed = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and cause in printed[-1] and printed[-1].startswith("error: ")


def test_a_vocabulary_too_small_for_the_tokenizer_is_told(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_tokenizer(tmp_path, "Qwen3")
    write_model(tmp_path, "Qwen3", vocab_size=100, max_position_embeddings=2048)
    with pytest.raises(SystemExit):
        run(monkeypatch, train_rosd, "--base", tmp_path, "--task", file, "--out", tmp_path / "out")
    assert "has a vocabulary of 100 tokens" in capsys.readouterr().err
