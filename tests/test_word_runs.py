"""Runs with tasks in words: what they leave behind, what they refuse, what no answer may do to them."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hub import write_model
from test_hub_tokenizer import write_tokenizer

import reflect
import train_rosd
from data import load_task
from data.words import Words
from harness.cli import run_script
from harness.run import Run
from model import GPT

ROWS = [
    {"question": f"Tom has {a} eggs and finds {b}. How many?", "answer": str(a + b)} for a in (2, 3) for b in range(9)
]
OPSD = ["--method", "opsd", "--steps", "2", "--batch", "2", "--group", "2", "--no-baseline", "--device", "cpu"]
OPSD += ["--eval-problems", "2", "--eval-samples", "1", "--max-response", "6", "--threads", "1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    write_tokenizer(tmp_path / "base", "Qwen3")
    write_model(tmp_path / "base", "Qwen3", vocab_size=640, max_position_embeddings=2048)
    return tmp_path / "base"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "eggs.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return path


def run(monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train_rosd.py", *OPSD, *map(str, flags)])
    run_script(train_rosd.main)


def test_a_refused_mask_leaves_no_folder(
    folder: Path, file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    flags = ["--base", folder, "--task", file, "--out", tmp_path / "out"]
    with pytest.raises(SystemExit):
        run(monkeypatch, *flags, "--mask", "oracle")
    assert "knows no true first error" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_a_trained_model_is_a_folder_for_every_reader(
    finetune: str, folder: Path, file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    transformers = pytest.importorskip("transformers")
    flags = ["--task", file, "--learning-rate", "0.01", "--finetune", finetune]
    run(monkeypatch, *flags, "--base", folder, "--out", tmp_path / "one")
    written = next(tmp_path.glob("one/*/model"))
    ours, base = GPT.from_pretrained(written), GPT.from_pretrained(folder)
    assert not torch.equal(ours.blocks[0].attn.q_proj.weight, base.blocks[0].attn.q_proj.weight)
    tokens = torch.randint(300, (2, 20))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(written)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    run(monkeypatch, *flags, "--base", written, "--out", tmp_path / "two")
    assert len(list(tmp_path.glob("two/*/model/tokenizer.json"))) == 1


def test_a_file_that_changed_is_another_run(
    folder: Path, file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    flags, save = ["--base", folder, "--task", file, "--out", tmp_path / "out"], Run.save

    def save_and_stop(self: Run) -> None:
        save(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Run, "save", save_and_stop)
        run(monkeypatch, *flags)
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('"9"', '"8"'), encoding="utf-8")
    with pytest.raises(SystemExit):
        run(monkeypatch, *flags, "--resume")
    assert "comes from a run with another problems" in capsys.readouterr().err
    file.write_text(text, encoding="utf-8")
    run(monkeypatch, *flags, "--resume")
    assert list(tmp_path.glob("out/*/results.json"))


def test_the_worked_example_runs_without_a_true_first_error(
    folder: Path, file: Path, monkeypatch: Any, capsys: Any
) -> None:
    real = Words.verify  # a random model is never right: here every even response is
    monkeypatch.setattr(Words, "verify", lambda self, p, text: real(self, p, p.solution if len(text) % 2 else text))
    monkeypatch.setattr(Words, "max_reflection", 6)
    text = "<error_quote>x</error_quote><explanation>It is\n5.</explanation>"
    monkeypatch.setattr(reflect, "write_reflections", lambda *_: [text])
    monkeypatch.setattr(sys, "argv", ["reflect.py", "--base", str(folder), "--task", str(file)])
    run_script(reflect.main)
    printed = capsys.readouterr().out
    assert "D(pi_S || pi_T)" in printed and "verifier's own first error" not in printed


HARMFUL = ["9**9**9**9", "2**(9**9)", "99999999!", "exit()", "__import__('os').abort()"]


@pytest.mark.parametrize("name", ["n_queens", "countdown", "simple_integration", "polynomial_multiplication"])
def test_an_answer_is_not_let_to_hang_or_end_a_run(name: str, folder: Path) -> None:
    """These datasets evaluate what the model wrote."""
    pytest.importorskip("reasoning_gym")
    task = load_task(f"gym:{name}", folder)
    for problem in task.problems(name, 5, random.Random(0)):
        assert task.verify(problem, problem.solution).correct
        assert not any(task.source.right(problem, answer) for answer in HARMFUL)
