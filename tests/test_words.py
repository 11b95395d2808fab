"""Tasks in words on a tiny random folder: prompts, tokens, both loops end to end, what runs leave and refuse."""

import json
import random
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, WORKED, find, write_lines
from test_hub import write_model
from test_hub_tokenizer import write_tokenizer

import reflect
import train_rosd
import train_spd
from data import Task, load_task
from data.sources import WordProblem, is_test
from data.words import Words
from harness.cli import run_script
from harness.run import Run
from model import GPT
from reflect import locate, parse_reflection

# ---------------------------------------------------------------------------------------------- prompts and tokens


def test_a_prompt_has_its_own_context_and_nothing_else(folder: Path, file: Path) -> None:
    task = load_task(str(file), folder)
    problem, other = find(task, "eggs", "Ann"), "Tom has"
    contexts = ((), ("IDEA",), (None, "SOLUTION"), ("IDEA", "SOLUTION"))
    prompts = [task.prompt(problem, *context) for context in contexts]
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
        prompt = task.prompt(problem)
        assert prompt.count("<|im_start|>user") == 3 and prompt.count(problem.question) == 1
        used = [row["question"] for row in [*ROWS, WORKED] if row["question"] in prompt]
        assert len(used) == 3 and not any(is_test(question) for question in used if question != problem.question)


def test_examples_of_a_reflector_are_as_wrong_or_right_as_the_attempt(folder: Path, file: Path) -> None:
    task = load_task(str(file), folder, shots=2, max_response=16)
    problem = find(task, "eggs", "Ann")
    for peer in ("PEER", None):
        turns = re.split("<.im_start.>(?:user|assistant)", task.reflector_prompt(problem, "ATTEMPT", peer, False))
        for request, written, other in zip(turns[1:5:2], turns[2:6:2], task.others(problem, 2), strict=True):
            attempt = re.search(r"The attempt, .*?:\n(.*?)\n\n", request, re.DOTALL)[1]
            assert other.question in request and task.verify(other, attempt).correct == (peer is None)
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
def test_a_wrong_example_ends_wrongly(folder: Path, tmp_path: Path, answer: str, attempt: str, quote: str) -> None:
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
        ("48 + 24 = 72", None),
        ("No idea", None),
    ],
)
def test_the_oracle_quotes_the_wrong_result_and_names_the_right(task: Task, response: str, quote: str | None) -> None:
    read = parse_reflection(task.true_reflection(find(task, "eggs", "Ann"), response))
    assert (read.quote, read.idea) == (quote, "The result is 72.")
    assert quote is None or locate(quote, list(response)) is not None


def test_what_a_model_wrote_cannot_pass_for_special_tokens(task: Task) -> None:
    problem = find(task, "eggs", "Ann")
    plain, odd = (task.encode(task.reflector_prompt(problem, text, None, False)) for text in ("a", "a<|im_end|>\ufffd"))
    assert plain.count(task.end()) == odd.count(task.end()) == 1


def test_a_response_ends_at_its_stop_token(task: Task) -> None:
    tokens = task.encode("It is 日 72.")
    assert task.decode([*tokens, task.end(), *tokens]) == "".join(task.pieces(tokens)) == "It is 日 72."


def test_decisive_tokens_are_results_and_the_answer(task: Task) -> None:
    def chosen(solution: str, rule: str) -> str:
        pieces = task.pieces([*task.encode(solution), task.end()])
        return "|".join(pieces[i].strip() for i in task.decisive(pieces, rule) if pieces[i].strip())

    text = "She sold 48/2 = 24 clips.\nThey cost 24 * $3 = $72.\nThe answer is 72"
    assert chosen(text, "results").replace("|", "") == "247272"
    assert chosen(text, "steps").replace("|", "") == "48/2=2424*$3=$72.72"
    assert chosen("The answer is 日 7", "results").replace("|", "") == "日7"
    pieces = task.pieces([*task.encode(text), task.end()])
    assert task.decisive(pieces, "full") == list(range(len(pieces)))
    assert len(task.decisive(pieces)) == 6  # one token a digit; the end is not decisive
    solution = task.encode("The answer is \U0001d518")  # the last four tokens are one character
    last = range(len(solution) - 4, len(solution))
    assert task.decisive(task.pieces([*solution, task.end()]))[-4:] == list(last)


# ---------------------------------------------------------------------------------------------- the loops

SMALL = ["--eval-problems", "2", "--eval-samples", "1", "--max-response", "6", "--no-baseline", "--device", "cpu"]
ROSD = ["--steps", "2", "--batch", "2", "--group", "2"]
SPD = ["--epochs", "2", "--prompts", "4", "--batch", "2", "--calibration-size", "8", "--layers", "last", "--rank", "2"]
LOOPS = {
    "rosd": (train_rosd, ROSD),
    "opsd": (train_rosd, ["--method", "opsd", *ROSD]),
    "spd": (train_spd, SPD),
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a loop with flags; if interrupted, to the first state that it saves."""
    save = Run.save

    def save_and_stop(self: Run) -> None:
        save(self)
        raise KeyboardInterrupt

    def run(loop: str, *flags: object, interrupted: bool = False) -> None:
        script, own = LOOPS[loop]
        with monkeypatch.context() as patch, pytest.raises(SystemExit) if interrupted else nullcontext():
            patch.setattr(sys, "argv", ["train", *SMALL, *own, *map(str, flags)])
            patch.setattr(Run, "save", save_and_stop if interrupted else save)
            run_script(script.main)

    return run


@pytest.fixture
def right_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model is never right: here every even response is."""
    real = Words.verify

    def verify(self: Words, problem: WordProblem, response: str, ended: bool = True) -> Any:
        return real(self, problem, problem.solution if len(response) % 2 else response)

    monkeypatch.setattr(Words, "verify", verify)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.usefixtures("right_half_of_the_time")
def test_the_loops_run_and_resume_on_a_file(loop: str, folder: Path, file: Path, tmp_path: Path, run: Callable) -> None:
    flags = ["--base", folder, "--task", file]
    run(loop, *flags, "--out", tmp_path / "whole")
    results = json.loads(next(tmp_path.glob("whole/*/results.json")).read_text(encoding="utf-8"))
    assert results["after"]["eggs"].keys() >= {"mean", "marked", "terse", "unfinished"}
    whole = next(tmp_path.glob("whole/*/metrics.jsonl")).read_text(encoding="utf-8")
    assert "quote_accuracy" not in whole
    run(loop, *flags, "--out", tmp_path / "cut", interrupted=True)
    run(loop, *flags, "--out", tmp_path / "cut", "--resume")
    assert next(tmp_path.glob("cut/*/metrics.jsonl")).read_text(encoding="utf-8") == whole


@pytest.mark.parametrize("loop", ["opsd", "spd"])
def test_both_loops_run_on_reasoning_gym_with_examples(loop: str, folder: Path, tmp_path: Path, run: Callable) -> None:
    pytest.importorskip("reasoning_gym")
    run(loop, "--base", folder, "--task", "gym:chain_sum,gcd", "--shots", 1, "--out", tmp_path)
    results = json.loads(next(tmp_path.glob("*/results.json")).read_text(encoding="utf-8"))
    assert results["config"]["domain"] == "chain_sum" and set(results["after"]) == {"chain_sum", "gcd"}


def test_a_file_that_changed_is_another_run(folder: Path, tmp_path: Path, run: Callable, capsys: Any) -> None:
    file = write_lines(tmp_path / "rows.jsonl", ROWS)
    flags = ["--base", folder, "--task", file, "--out", tmp_path / "out"]
    run("opsd", *flags, interrupted=True)
    write_lines(file, [{**ROWS[0], "answer": "99"}, *ROWS[1:]])
    with pytest.raises(SystemExit):
        run("opsd", *flags, "--resume")
    assert "comes from a run with another problems" in capsys.readouterr().err
    write_lines(file, ROWS)
    run("opsd", *flags, "--resume")
    assert list(tmp_path.glob("out/*/results.json"))


def test_transformers_reads_a_trained_model(folder: Path, file: Path, tmp_path: Path, run: Callable) -> None:
    transformers = pytest.importorskip("transformers")
    flags = ["--task", file, "--learning-rate", "0.01", "--finetune", "lora"]
    run("opsd", *flags, "--base", folder, "--out", tmp_path / "one")
    written = next(tmp_path.glob("one/*/model"))
    ours, base = GPT.from_pretrained(written), GPT.from_pretrained(folder)
    assert not torch.equal(ours.blocks[0].attn.q_proj.weight, base.blocks[0].attn.q_proj.weight)
    tokens = torch.randint(300, (2, 20))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(written)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    run("opsd", *flags, "--base", written, "--out", tmp_path / "two")
    assert len(list(tmp_path.glob("two/*/model/tokenizer.json"))) == 1


@pytest.mark.usefixtures("right_half_of_the_time")
def test_the_demo_runs_without_a_true_first_error(folder: Path, file: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(Words, "max_reflection", 6)
    monkeypatch.setattr(reflect, "parse_reflection", lambda _: reflect.Reflection("x", "It is\n5."))
    monkeypatch.setattr(sys, "argv", ["reflect.py", "--base", str(folder), "--task", str(file)])
    run_script(reflect.main)
    printed = capsys.readouterr().out
    assert "D(pi_S || pi_T)" in printed and "verifier's own first error" not in printed


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (["--mask", "oracle"], "knows no true first error"),
        (["--max-response", "3000"], "of the model's 2048 tokens"),
        (["--domain", "add"], "give one of eggs"),
        (["--task", "arithmetic"], "none of --shots, --max-response and --reflect-shots"),
    ],
    ids=" ".join,
)
def test_a_refused_run_leaves_no_folder(
    flags: list[str], cause: str, folder: Path, file: Path, tmp_path: Path, run: Callable, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as stop:
        run("rosd", "--base", folder, "--task", file, "--out", tmp_path / "out", *flags)
    printed = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and cause in printed[-1] and printed[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_too_small_a_vocabulary_is_refused(file: Path, tmp_path: Path, run: Callable, capsys: Any) -> None:
    write_tokenizer(tmp_path, "Qwen3")
    write_model(tmp_path, "Qwen3", vocab_size=100, max_position_embeddings=2048)
    with pytest.raises(SystemExit):
        run("rosd", "--base", tmp_path, "--task", file, "--out", tmp_path / "out")
    assert "has a vocabulary of 100 tokens" in capsys.readouterr().err
