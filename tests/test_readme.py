"""What the README says can be done: its commands run, its map from equation to code leads where it says."""

import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest

import runs

README = (runs.ROOT / "README.md").read_text()
COMMANDS = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
COMMANDS += re.findall(r"`(python [^`]+)`", README)
EXERCISES = README.split("## Exercises\n")[1].split("\n## ")[0]
SMALL = {
    "train_rosd.py": "--steps 1 --batch 2 --group 2 --eval-problems 1 --eval-samples 1 --no-baseline",
    "train_spd.py": "--prompts 4 --epochs 1 --calibration-size 4 --eval-problems 1 --eval-samples 1 --no-baseline",
}
LONG = ("-m pytest", "pretrain.py", "study.py ", "plots.py", "bench.py", "torchrun", "--seed S", "pip")


def runnable() -> list[str]:
    short = [command for command in dict.fromkeys(COMMANDS) if not any(part in command for part in LONG)]
    flags = [flags for flags in re.findall(r"`(train_\w+\.py [^`]+)`", EXERCISES) if "..." not in flags]
    return [*short, *(f"python {command}" for command in flags)]


@pytest.mark.parametrize("command", runnable())
def test_every_short_command_of_the_readme_runs(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = command.split()[1:]
    extra = SMALL.get(arguments[0], "").split()
    if extra and "--help" not in arguments:
        arguments = [arguments[0], *extra, *arguments[1:], "--out", str(tmp_path)]
    if "--html" in arguments:
        arguments[arguments.index("--html") + 1] = str(tmp_path / "page.html")
    monkeypatch.setattr(sys, "argv", arguments)
    try:
        importlib.import_module(arguments[0].removesuffix(".py")).main()
    except SystemExit as end:  # of --help
        assert end.code == 0


@pytest.mark.parametrize("command", [c for c in dict.fromkeys(COMMANDS) if any(p in c for p in LONG[1:5])])
def test_the_flags_of_every_long_command_are_known(command: str) -> None:
    script, *flags = command.split()[1:]
    config = importlib.import_module(script.removesuffix(".py"))
    if hasattr(config, "Config"):
        runs.parse_config(config.Config, "", [flag.replace("NAME", "rosd") for flag in flags])


@pytest.mark.parametrize(("name", "file", "line"), re.findall(r"\[`(\w+\.\w+)`\]\((\w+\.py)#L(\d+)\)", README))
def test_the_map_from_equation_to_code_names_the_line(name: str, file: str, line: str) -> None:
    module, function = name.split(".")
    lines, start = inspect.getsourcelines(getattr(importlib.import_module(module), function))
    while not lines[0].startswith(("def ", "class ")):
        lines, start = lines[1:], start + 1
    assert (file, int(line)) == (f"{module}.py", start)
