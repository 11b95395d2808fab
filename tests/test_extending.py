"""CONTRIBUTING.md says that a domain, a method and an ablation take one place to change: here they are added."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import runs

TINY = ["--steps", "1", "--batch", "2", "--group", "2", "--eval-problems", "1", "--eval-samples", "1"]
TINY += ["--no-baseline", "--threads", "1", "--out", "out"]
ADDITIONS = [  # file, line after which to add, the added line, the flags that use it
    ("data/arithmetic.py", '    "long": (', '    "tiny": ("+", (2,)),', ["--domain", "tiny"]),
    ("train_rosd.py", '    "opsd": (', '    "late": ("gold", "quote"),', ["--method", "late"]),
    ("train_rosd.py", "    updates: int", '    patience: int = option(1, "a setting", minimum=1)', ["--patience", "2"]),
]


def test_an_addition_is_one_line_in_one_place(tmp_path: Path) -> None:
    shutil.copytree(runs.ROOT / "data", tmp_path / "data")
    for script in runs.ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    command = [sys.executable, "train_rosd.py", *TINY]
    for file, after, added, flags in ADDITIONS:
        lines = (tmp_path / file).read_text().splitlines()
        (place,) = [i for i, line in enumerate(lines) if line.startswith(after)]
        (tmp_path / file).write_text("\n".join([*lines[: place + 1], added, *lines[place + 1 :]]) + "\n")
        command += flags
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    result = json.loads(next((tmp_path / "out").glob("*/results.json")).read_text())
    assert {"domain": "tiny", "method": "late", "patience": 2}.items() <= result["config"].items()
    assert "tiny" in printed and result["after"]["tiny"]["problems"] == 1
