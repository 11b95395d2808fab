"""CONTRIBUTING.md says that a domain, a method and an ablation take one place to change: here they are added."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import runs

TINY = ["--steps", "1", "--batch", "2", "--group", "2", "--eval-problems", "1", "--eval-samples", "1"]
TINY += ["--no-baseline", "--threads", "1", "--out", "out"]
ADDITIONS = {  # what: (file, line after which to add, the added line, the flags that use it)
    "domain": ("data/arithmetic.py", '    "long": (', '    "tiny": ("+", (2,)),', ["--domain", "tiny"]),
    "method": ("train_rosd.py", '    "opsd": (', '    "late": ("gold", "quote"),', ["--method", "late"]),
    "ablation": (
        "train_rosd.py",
        "    updates: int",
        '    patience: int = option(1, "a setting of one line", minimum=1)',
        ["--patience", "2"],
    ),
}


@pytest.mark.parametrize("what", ADDITIONS)
def test_an_addition_is_one_line_in_one_place(what: str, tmp_path: Path) -> None:
    file, after, added, flags = ADDITIONS[what]
    shutil.copytree(runs.ROOT / "data", tmp_path / "data")
    for script in runs.ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    lines = (tmp_path / file).read_text().splitlines()
    (place,) = [i for i, line in enumerate(lines) if line.startswith(after)]
    (tmp_path / file).write_text("\n".join([*lines[: place + 1], added, *lines[place + 1 :]]) + "\n")
    command = [sys.executable, "train_rosd.py", *TINY, *flags]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    result = json.loads(next((tmp_path / "out").glob("*/results.json")).read_text())
    assert result["config"][flags[0].strip("-")] in (flags[1], int(flags[1]) if flags[1].isdigit() else None)
    assert what != "domain" or ("tiny" in printed and result["after"]["tiny"]["problems"] == 1)
