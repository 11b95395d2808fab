"""Two processes make the update that one makes with the same global batch, and train to the end."""

import json
import os
import random
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

import parallel
import runs
import train_rosd
import train_spd
from data.arithmetic import make_problem
from data.documents import hint_prompt, plain_prompt, wrong_attempt
from data.tokenizer import END, encode
from model import GPT
from reflect import Rollout, verify

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
RUN = ["--steps", "2", "--batch", "3", "--group", "4", "--eval-problems", "2", "--eval-samples", "2", "--no-baseline"]
FLAGS = ["--learning-rate", "1", "--warmup", "0", "--threads", "1"]


def rosd_update() -> GPT:
    """One ROSD update on a fixed batch of five lessons, shared between the processes."""
    rng, lessons = random.Random(0), []
    for start in range(5):
        problem = make_problem("mix", rng)
        text = wrong_attempt(problem, rng)
        rollout = Rollout(problem, [*encode(text), END], text, verify(problem, text))
        lessons.append(train_rosd.Lesson(rollout, hint_prompt(problem, "1+1=2"), start, advantage=0.0))
    base = runs.load_checkpoint(runs.BASE_CHECKPOINT)[0]
    student, teacher = deepcopy(base), deepcopy(base).requires_grad_(False)
    config = runs.parse_config(train_rosd.Config, "", FLAGS)
    optimizer = torch.optim.SGD(student.parameters())  # AdamW's first update knows only the gradient's sign
    train_rosd.update(student, teacher, optimizer, parallel.share(lessons), config, step=0)
    return student


def spd_update() -> GPT:
    """The gradient of SPD's fine-tuning on a fixed batch of five completions of unequal length."""
    rng, pairs = random.Random(1), []
    for _ in range(5):
        problem = make_problem("long", rng)
        pairs.append((encode(plain_prompt(problem)), [*encode(wrong_attempt(problem, rng)), END]))
    model = runs.load_checkpoint(runs.BASE_CHECKPOINT)[0]
    train_spd.next_token_loss(model, parallel.share(pairs), completion_only=False).backward()
    parallel.sum_gradients(model.parameters())
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    return model


UPDATES = {"rosd": rosd_update, "spd": spd_update}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    command = [*TORCHRUN, __file__, str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(runs.ROOT)})
    return folder


@pytest.mark.parametrize("name", UPDATES)
def test_two_processes_make_the_update_of_one(name: str, two_processes: Path) -> None:
    two = runs.load_checkpoint(two_processes / f"{name}.pt")[0].state_dict()
    one = UPDATES[name]().state_dict()
    before = runs.load_checkpoint(runs.BASE_CHECKPOINT)[0].state_dict()
    assert max((one[key] - before[key]).abs().max() for key in one) > 1e-4
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-5)


def test_a_run_of_two_processes_is_written_by_one(two_processes: Path) -> None:
    result = json.loads(next(two_processes.glob("*/results.json")).read_text())
    lines = next(two_processes.glob("*/metrics.jsonl")).read_text().splitlines()
    assert len(lines) == 2 and result["processes"] == 2


if __name__ == "__main__":  # one of the processes that torchrun starts
    torch.set_num_threads(1)
    parallel.start(torch.device("cpu"))
    for name, make in UPDATES.items():
        updated = make()
        if parallel.FIRST:
            runs.save_checkpoint(Path(sys.argv[1]) / f"{name}.pt", updated)
    sys.argv = ["train_rosd.py", *RUN, "--threads", "1", "--out", sys.argv[1]]
    train_rosd.main()
