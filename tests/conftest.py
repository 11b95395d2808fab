"""What the tests share: a second task, and models of random weights so small that a step takes milliseconds."""

import random
import re
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import harness.run
from data import Problem, Task, Verdict
from harness import files
from model import GPT, GPTConfig

SMALL = ["--eval-problems", "2", "--eval-samples", "2", "--threads", "1", "--no-baseline", "--device", "cpu"]
ROSD = ["--steps", "2", "--batch", "3", "--group", "4", "--warmup", "0", *SMALL]
SPD = [
    "--domain",
    "one",
    "--layers",
    "paper",
    "--project",
    "kv",
    "--rank",
    "50%",
    "--prompts",
    "8",
    "--batch",
    "4",
    "--epochs",
    "2",
    "--calibration-size",
    "20",
]
SPD += SMALL


class Letters(Task):
    """Write the letters that are asked for: nothing in common with arithmetic, and nobody knows the first error.

    A token may be a whole reflection, so that a model of random weights now and then writes one.
    """

    WRITTEN = tuple(
        f"<error_quote>{q}</error_quote><explanation>{e}</explanation>" for q, e in ("ab", "bc", "cd", "da")
    )
    WORDS = (*"abcd0123?!~", *WRITTEN, "<error_quote>", "</error_quote>", "<explanation>", "</explanation>", "<end>")
    domains = ("one", "two")
    habits: ClassVar = {"loud": "capital letters"}
    max_response, max_reflection = 8, 8
    vocab_size, stop = len(WORDS), len(WORDS) - 1
    FORM = re.compile("|".join(map(re.escape, sorted(WORDS, key=len, reverse=True))))

    def problem(self, domain: str, rng: random.Random, test: bool = False) -> Problem:
        letters = "".join(rng.sample("abcd", 1 + self.domains.index(domain)))
        return Problem(letters + str(rng.randrange(2) * 2 + test), letters)

    def verify(self, problem: Problem, response: str) -> Verdict:
        correct = set(problem.solution) <= set(response)
        return Verdict(correct, len(response) < self.max_response, None, ("loud",) if "!" in response else ())

    def decisive(self, solution: list[str], rule: str = "aligned") -> list[int]:
        return [0] if rule == "aligned" else list(range(len(solution)))

    def student_prompt(self, problem: Problem) -> str:
        return problem.question + "?"

    def teacher_prompt(self, problem: Problem, idea: str | None = None, solution: str | None = None) -> str:
        return f"{problem.question}{idea or ''}~{solution or ''}?"

    def reflector_prompt(self, problem: Problem, attempt: str, peer: str | None, told_answer: bool) -> str:
        return f"{problem.question}{problem.solution if told_answer else ''}~{attempt}~{peer or ''}?"

    def encode(self, text: str) -> list[int]:
        words = self.FORM.findall(text)
        if "".join(words) != text:
            raise ValueError(text)
        return [self.WORDS.index(word) for word in words]

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.pieces(tokens)).split("<end>")[0]

    def pieces(self, tokens: list[int]) -> list[str]:
        return [self.WORDS[token] for token in tokens]


def tiny_gpt(task: Task, seed: int = 0, **shape: int) -> GPT:
    """Random weights, large enough for clear preferences."""
    torch.manual_seed(seed)
    shape = {"n_layer": 2, "n_embd": 16, "n_head": 4, "n_kv_head": 2, "head_dim": 8, "n_hidden": 32} | shape
    model = GPT(GPTConfig(task.vocab_size, **shape)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> Letters:
    """The second task, in the place of every task that a script asks for."""
    task = Letters()
    monkeypatch.setattr(harness.run, "load_task", lambda *_: task)
    return task


@pytest.fixture
def base(letters: Letters, tmp_path: Path) -> str:
    """A checkpoint for it."""
    path = tmp_path / "tiny.pt"
    files.save_checkpoint(path, tiny_gpt(letters))
    return str(path)
