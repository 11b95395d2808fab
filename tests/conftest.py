"""What the tests share: other tasks, models so small that a step takes milliseconds, and runs that are stopped."""

import dataclasses
import json
import os
import random
import re
import signal
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

import harness.run
import train_rosd
import train_spd
from data import Problem, Task, Verdict, load_task
from data.chains import DOMAINS, make_problem
from data.sources import WordProblem
from harness import files
from harness.cli import parse_config
from harness.run import Run
from model import GPT, GPTConfig
from reflect import Rollout

SMALL = ["--eval-problems", "2", "--eval-samples", "2", "--no-baseline", "--device", "cpu"]
ROSD = ["--steps", "2", "--batch", "3", "--group", "4", "--warmup", "0", *SMALL]
SPD = ["--calibration-size", "20", "--prompts", "8", "--batch", "4", "--epochs", "2", *SMALL]
torch.set_num_threads(1)  # models this small are faster with one, and other processes do not get in the way
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the scripts go by it, and would take all cores for a folder's model
both_scripts = pytest.mark.parametrize("script", [train_rosd, train_spd], ids=lambda script: script.__name__)


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
    vocab_size, stop = len(WORDS), (len(WORDS) - 1,)
    FORM = re.compile("|".join(map(re.escape, sorted(WORDS, key=len, reverse=True))))

    def problem(self, domain: str, rng: random.Random, test: bool = False) -> Problem:
        letters = "".join(rng.sample("abcd", 1 + self.domains.index(domain)))
        return Problem(letters + str(rng.randrange(2) * 2 + test), letters)

    def verify(self, problem: Problem, response: str, ended: bool = True) -> Verdict:
        correct = set(problem.solution) <= set(response)
        return Verdict(correct, len(response) < self.max_response, None, ("loud",) if "!" in response else ())

    def decisive(self, solution: list[str], rule: str = "results") -> list[int]:
        return [0] if rule == "results" else list(range(len(solution)))

    def prompt(self, problem: Problem, idea: str | None = None, solution: str | None = None) -> str:
        if idea is None and solution is None:
            return problem.question + "?"
        return f"{problem.question}{idea or ''}~{solution or ''}?"

    def reflector_prompt(self, problem: Problem, attempt: str, peer: str | None, give_answer: bool) -> str:
        return f"{problem.question}{problem.solution if give_answer else ''}~{attempt}~{peer or ''}?"

    def true_reflection(self, problem: Problem, response: str) -> str:
        return f"<explanation>{problem.solution}</explanation>"

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


def random_problems(count: int, seed: int = 0) -> list[tuple[str, random.Random]]:
    rng = random.Random(seed)
    return [(make_problem(rng.choice(list(DOMAINS)), rng), rng) for _ in range(count)]


ONE = Problem("a0", "a")


def make_rollout(text: str, problem: Problem = ONE) -> Rollout:
    task = Letters()
    tokens = [*task.encode(text), task.end()]
    return Rollout(problem, tokens, [0.0] * len(tokens), text, task.pieces(tokens), task.verify(problem, text))


# ---------------------------------------------------------------------------------------------- runs


def settings(script: ModuleType, base: str, out: Path | str, *flags: str, **fields: Any) -> Any:
    """The config of a small run; fields are those that have no flag."""
    small = ROSD if script is train_rosd else SPD
    argv = [*small, "--base", base, "--out", str(out), *flags]
    return dataclasses.replace(parse_config(script.Config, "", argv, script.defaults_of), **fields)


def train(script: ModuleType, base: str, out: Path | str, *flags: str, **fields: Any) -> dict:
    return script.train(settings(script, base, out, *flags, **fields))


def sentence(capsys: pytest.CaptureFixture) -> str:
    """The only line a script left on stderr besides progress bars."""
    (line,) = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.startswith("error: ")]
    return line


def file_of(out: Path, name: str) -> Path:
    (path,) = out.glob(f"*/{name}")
    return path


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in files.read_text(file_of(out, "metrics.jsonl")).splitlines()]


@pytest.fixture
def optimizer_steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, list[torch.Tensor]]]:
    """The learning rate and the gradients of every step that AdamW takes."""
    steps = []

    class Recorder(torch.optim.AdamW):
        def step(self) -> None:
            (group,) = self.param_groups
            steps.append((group["lr"], [parameter.grad.clone() for parameter in group["params"]]))
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    return steps


class Stop(Exception):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int, owner: Any = Run) -> None:
    """End the run by an exception in the call-th call of a method of Run, or of another owner's function."""
    original, calls = getattr(owner, name), []

    def counted(*args: object, **settings: object) -> object:
        calls.append(name)
        if len(calls) == call:
            raise Stop
        return original(*args, **settings)

    monkeypatch.setattr(owner, name, counted)


def stopped_run(base: str, out: Path, *flags: str, script: ModuleType = train_rosd) -> None:
    """A run that leaves a state behind and nothing else."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, "log", 2)
        train(script, base, out, *flags)


# ---------------------------------------------------------------------------------------------- problems in words

ROWS = [
    {"question": f"Tom has {a} eggs and finds {b}. How many?", "answer": str(a + b)} for a in (2, 3) for b in range(9)
]
WORKED = {"question": "Ann sold 48/2 clips at $3. What did she get?"}
WORKED["answer"] = "She sold 48/2 = <<48/2=24>>24 clips.\nShe got 24 * 3 = <<24*3=72>>72 dollars.\n#### 72"


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with a tokenizer of its own; its embedding has more rows than there are tokens."""
    from test_hub import write_model
    from test_hub_tokenizer import write_tokenizer

    path = tmp_path_factory.mktemp("hub")
    write_tokenizer(path, "Qwen3")
    write_model(path, "Qwen3", vocab_size=640, max_position_embeddings=2048)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "eggs.jsonl", [*ROWS, "", WORKED])


@pytest.fixture(scope="module")
def task(folder: Path, file: Path) -> Task:
    return load_task(str(file), folder, max_response=16)


def find(task: Task, domain: str, word: str) -> WordProblem:
    drawn = [p for test in (False, True) for p in task.problems(domain, 40, random.Random(0), test)]
    return next(problem for problem in drawn if word in problem.question)


def hear_ctrl_c() -> None:
    """In a new process: undo that a job in the background was started with Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = [
        report for report in terminalreporter.stats.get("skipped", ()) if "could not import" in str(report.longrepr)
    ]
    if skipped:
        terminalreporter.write_line(
            f'{len(skipped)} tests or files need extras: pip install -e ".[dev,plots]" runs them.'
        )
