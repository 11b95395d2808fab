"""A task, a domain, a method and a setting take one place each: here they are added to a copy of the repository."""

import ast
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
from conftest import ROSD, SPD, Letters, tiny_gpt

from harness import files

CORE = [f"{name}.py" for name in ("errors", "losses", "lora", "model", "evaluate", "reflect", "subspace")]
CORE += ["train_rosd.py", "train_spd.py"]
IMPORTS = "from typing import ClassVar\nimport random\nimport re\n\nfrom data.task import Problem, Task, Verdict\n\n\n"
LOADED = '    if spec == "letters":\n        from data.letters import Letters\n\n        return Letters()'
ADDITIONS = [  # file, line after which to add, the added line
    ("data/__init__.py", '    """The task that', LOADED),
    ("data/letters.py", "    domains = ", '    domains = ("one", "two", "three")'),
    ("train_rosd.py", '    "opsd": {"context"', '    "late": {"context": "gold", "mask": "suffix"},'),
    ("train_rosd.py", "    updates: int", '    patience: int = option(1, "a setting", minimum=1)'),
]


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("copy")
    for folder in ("data", "harness", "hub"):
        (copy / folder).mkdir()
        for path in (files.ROOT / folder).glob("*.py"):
            shutil.copy(path, copy / folder)
    shutil.copy(files.BASE_CHECKPOINT, copy / "data")
    for name in CORE:
        shutil.copy(files.ROOT / name, copy)
    files.write_text(copy / "data" / "letters.py", IMPORTS + inspect.getsource(conftest.Letters))
    for file, after, added in ADDITIONS:
        lines = files.read_text(copy / file).splitlines()
        (place,) = [i for i, line in enumerate(lines) if line.startswith(after)]
        files.write_text(copy / file, "\n".join([*lines[: place + 1], added, *lines[place + 1 :]]) + "\n")
    files.save_checkpoint(copy / "tiny.pt", tiny_gpt(Letters()))
    return copy


@pytest.mark.parametrize(
    "command",
    [
        ["train_rosd.py", *ROSD, "--domain", "three", "--method", "late", "--patience", "2"],
        ["train_spd.py", *SPD, "--domain", "two"],
    ],
    ids=lambda command: command[0],
)
def test_an_addition_is_one_line_in_one_place(command: list[str], extended: Path) -> None:
    command = [sys.executable, *command, "--task", "letters", "--base", "tiny.pt", "--out", command[0] + ".out"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=extended)
    assert done.returncode == 0, done.stderr
    (path,) = (extended / f"{command[1]}.out").glob("*/results.json")
    result = json.loads(files.read_text(path))
    assert result["config"]["task"] == "letters" and set(result["after"]) == {"one", "two", "three"}
    if command[1] == "train_rosd.py":
        assert {"domain": "three", "method": "late", "patience": 2}.items() <= result["config"].items()
        assert "LATE" in done.stdout and "three" in done.stdout


@pytest.mark.parametrize("file", [*CORE, *(f"harness/{name}.py" for name in ("cli", "files", "parallel", "run"))])
def test_loops_reflection_subspace_and_evaluation_know_nothing_of_a_task_but_what_a_task_is(file: str) -> None:
    tree = ast.parse(files.read_text(files.ROOT / file))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] in ("data", "tools") for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("data", "tools"):
            assert node.module == "data"
            assert {alias.name for alias in node.names} <= {"Problem", "Task", "Verdict", "falsify", "load_task"}
