"""What the README says can be done: its commands run, its map from equation to code leads where it says."""

import importlib
import inspect
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
import evaluate
import plots
import pretrain
import runs
import study

README = (runs.ROOT / "README.md").read_text()
COMMANDS = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
COMMANDS += re.findall(r"`(python [^`]+)`", README + (runs.ROOT / "data" / "README.md").read_text())
EXERCISES = README.split("## Exercises\n")[1].split("\n## ")[0]
SMALL = {
    "train_rosd.py": "--steps 1 --batch 2 --group 2 --eval-problems 1 --eval-samples 1 --no-baseline",
    "train_spd.py": "--prompts 4 --calibration-size 4 --eval-problems 1 --eval-samples 1 --no-baseline",
}
SMALL |= {
    "pretrain.py": "--steps 1 --batch 2 --layers 2 --width 8 --out base.pt",
    "bench.py": "--repeats 1",
    "study.py": "--out studies --processes 1",
}
# Run by CI or by test_parallel.py, or no whole command:
ELSEWHERE = ("-m pytest", "torchrun", "--seed S", "pip", "NAME")


def runnable() -> list[str]:
    commands = [command for command in dict.fromkeys(COMMANDS) if not any(part in command for part in ELSEWHERE)]
    flags = re.findall(r"`((?:train_\w+|pretrain)\.py [^`]+)`", EXERCISES)
    return [*commands, *(f"python {command}" for command in flags)]


class InThisProcess:
    """Takes the place of subprocess.Popen in a study: the run is over as soon as it is made."""

    returncode = 0

    def __init__(self, command: list[str], **_: object) -> None:
        script, *flags = command[1:]
        arguments, sys.argv = sys.argv, [script, *flags]
        importlib.import_module(script.removesuffix(".py")).main()
        sys.argv = arguments

    def poll(self) -> int:
        return 0


@pytest.fixture
def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies of one run, timings of a few tokens, and nothing written into the repository."""
    monkeypatch.chdir(tmp_path)
    for copy in ("data/base.pt", "data/gaps.pt", "out/mine.pt"):
        (tmp_path / copy).parent.mkdir(exist_ok=True)
        shutil.copy(runs.ROOT / copy.replace("out/mine", "data/gaps"), tmp_path / copy)
    monkeypatch.setattr(pretrain, "measure", partial(pretrain.measure, count=2))
    monkeypatch.setattr(evaluate, "BUDGET", 8)  # tokens, of answers nobody counts
    for name, declared in study.STUDIES.items():
        variant, flags = next(iter(declared.variants.items()))
        few = SMALL[declared.script].replace("--no-baseline", "").split()
        smaller = replace(declared, variants={variant: flags}, seeds=(0,), flags=[*declared.flags, *few])
        monkeypatch.setitem(study.STUDIES, name, smaller)
    monkeypatch.setattr(study, "subprocess", SimpleNamespace(Popen=InThisProcess))
    monkeypatch.setattr(study, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    for name, value in {"PROMPTS": 2, "GROUP": 2, "NEW": 4, "BATCH": 2, "GRID": [("width", 32, 2, 8)]}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(runs, "put_into_readme", lambda name, text: True)
    monkeypatch.setattr(plots, "PICTURES", ())  # test_plots.py draws them


@pytest.mark.parametrize("command", runnable())
def test_every_command_of_the_readme_runs(
    command: str, small_world: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, *flags = command.split()[1:]
    if script == "bench.py":
        pytest.importorskip("transformers")
    if "--help" not in flags and "--check-only" not in flags:
        flags = [*flags, *SMALL.get(script, "").split()]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # a compiler is not everywhere
    monkeypatch.setattr(sys, "argv", [script, *flags])
    try:
        importlib.import_module(script.removesuffix(".py")).main()
    except SystemExit as end:  # of --help
        assert end.code == 0


@pytest.mark.parametrize(("name", "file", "line"), re.findall(r"\[`(\w+\.\w+)`\]\((\w+\.py)#L(\d+)\)", README))
def test_the_map_from_equation_to_code_names_the_line(name: str, file: str, line: str) -> None:
    module, function = name.split(".")
    lines, start = inspect.getsourcelines(getattr(importlib.import_module(module), function))
    while not lines[0].startswith(("def ", "class ")):
        lines, start = lines[1:], start + 1
    assert (file, int(line)) == (f"{module}.py", start)
