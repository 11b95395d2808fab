"""Two processes make the update that one makes with the same global batch, and train to the end."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROSD, SPD, Letters, tiny_gpt

import harness.run
import train_rosd
import train_spd
from harness import files, parallel
from harness.cli import parse_config, run_script
from harness.files import lock_folder
from harness.run import run_name
from model import GPT
from reflect import Rollout

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
TASK = Letters()


def rosd_update() -> GPT:
    """One ROSD update on a fixed batch of five lessons, shared between the processes."""
    rng, lessons = random.Random(0), []
    for start in range(5):
        problem = TASK.problem("two", rng)
        text = "".join(rng.choices("abcd!", k=5 + start))
        tokens = [*TASK.encode(text), TASK.end()]
        rollout = Rollout(problem, tokens, [-2.0] * len(tokens), text, TASK.verify(problem, text))
        lessons.append(train_rosd.Lesson(rollout, TASK.teacher_prompt(problem, "c"), start, len(tokens)))
    student, teacher = tiny_gpt(TASK), tiny_gpt(TASK).requires_grad_(False)
    config = train_rosd.settle(train_rosd.Config(learning_rate=1.0, warmup=0))
    optimizer = torch.optim.SGD(student.parameters())  # AdamW's first update knows only the gradient's sign
    train_rosd.update(student, teacher, optimizer, parallel.share(lessons), TASK, config, step=0)
    return student


def spd_update() -> GPT:
    """The gradient of SPD's fine-tuning on a fixed batch of five completions of unequal length."""
    rng, pairs = random.Random(1), []
    for i in range(5):
        prompt = TASK.encode(TASK.student_prompt(TASK.problem("one", rng)))
        pairs.append((prompt, [*TASK.encode("".join(rng.choices("abcd!", k=2 + i))), TASK.end()]))
    model = tiny_gpt(TASK)
    train_spd.next_token_loss(model, parallel.share(pairs), completion_only=False).backward()
    parallel.sum_gradients(model.parameters())
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    return model


UPDATES = {"rosd": rosd_update, "spd": spd_update}
RUNS = {  # the second process has nothing to do with one problem, and no rollout of its own
    "rosd": (train_rosd, [*ROSD, "--batch", "3"]),
    "one problem": (train_rosd, [*ROSD, "--batch", "1", "--method", "opsd", "--seed", "1"]),
    "one problem, grpo": (train_rosd, [*ROSD, "--batch", "1", "--group", "8", "--method", "grpo"]),
    "spd": (train_spd, [*SPD, "--prompts", "9"]),
}


def torchrun(folder: Path) -> subprocess.CompletedProcess:
    paths = os.pathsep.join((str(files.ROOT), str(files.ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run([*TORCHRUN, str(folder)], capture_output=True, encoding="utf-8", env=environment)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    files.save_checkpoint(folder / "tiny.pt", tiny_gpt(TASK))
    done = torchrun(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", UPDATES)
def test_two_processes_make_the_update_of_one(name: str, two_processes: Path) -> None:
    two = files.load_checkpoint(two_processes / f"{name}.pt").state_dict()
    one, before = UPDATES[name]().state_dict(), tiny_gpt(TASK).state_dict()
    assert max((one[key] - before[key]).abs().max() for key in one) > 1e-3
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_two_processes_is_written_by_one(name: str, two_processes: Path) -> None:
    (result,) = (two_processes / name).glob("*/results.json")
    rows = [json.loads(line) for line in files.read_text(result.with_name("metrics.jsonl")).splitlines()]
    assert [row["step"] for row in rows] == [0, 1] and json.loads(files.read_text(result))["processes"] == 2
    if name != "one problem, grpo":
        assert all(row["loss"] > 0 for row in rows)


def test_shares_of_all_processes_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "RANK", rank)
        monkeypatch.setattr(parallel, "WORLD", 3)
        parts += parallel.share(list(range(10)))
    assert sorted(parts) == list(range(10))


def test_batches_smaller_than_the_processes_are_told(
    monkeypatch: pytest.MonkeyPatch, base: str, tmp_path: Path
) -> None:
    monkeypatch.setattr(parallel, "WORLD", 2)
    monkeypatch.setattr(parallel, "LOCAL_WORLD", 2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    flags = [*SPD, "--batch", "1", "--base", base, "--out", str(tmp_path / "out")]
    with pytest.raises(harness.run.UserError, match=r"--batch 1 .* 2 processes"):
        train_spd.train(parse_config(train_spd.Config, "", flags))


def test_a_locked_folder_stops_all_processes(two_processes: Path, tmp_path: Path) -> None:
    files.save_checkpoint(tmp_path / "tiny.pt", tiny_gpt(TASK))
    script, flags = RUNS["rosd"]
    config = parse_config(script.Config, "", [*flags, "--base", str(tmp_path / "tiny.pt")])
    folder = files.make_folder(tmp_path / "rosd" / run_name(config))
    with lock_folder(folder):
        done = torchrun(tmp_path)
    assert done.returncode != 0 and "another process is running in" in done.stderr
    assert [path.name for path in folder.iterdir()] == [".lock"]


def main() -> None:
    """One of the processes that torchrun starts."""
    folder = Path(sys.argv[1])
    harness.run.load_task = lambda *_: TASK
    parallel.start("cpu")
    for name, make in UPDATES.items():
        updated = make()
        if parallel.FIRST:
            files.save_checkpoint(folder / f"{name}.pt", updated)
    for name, (script, flags) in RUNS.items():
        script.train(
            parse_config(script.Config, "", [*flags, "--base", f"{folder}/tiny.pt", "--out", f"{folder}/{name}"])
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_script(main)
