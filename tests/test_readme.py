"""What the documents say can be done: their commands run, and the map from equation to code leads where it says.

`python tests/test_readme.py` renews the line numbers of that map after a change to the code.
"""

import importlib
import inspect
import re
import sys
from functools import partial
from pathlib import Path

import pytest

import pretrain
from harness import files
from harness.cli import parse_config

README = files.read_text(files.ROOT / "README.md")
PAGES = [files.ROOT / "README.md", *(files.ROOT / "docs").glob("*.md"), files.ROOT / "data" / "README.md"]
TEXT = "".join(map(files.read_text, PAGES))
SMALL = {
    "train_rosd.py": "--steps 1 --batch 2 --group 2 --eval-problems 1 --eval-samples 1 --no-baseline",
    "train_spd.py": "--prompts 4 --calibration-size 100 --eval-problems 1 --eval-samples 1 --epochs 1 --no-baseline",
    "pretrain.py": "--steps 1 --settle 1 --batch 2 --layers 2 --width 8 --out out/base.pt",
}
# Run by CI or by the tests of tools and processes, or no whole command:
ELSEWHERE = ("-m pytest", "tests/", "-m tools", "pip", "NAME", "--base out/", "--base models/", "--base smollm2")


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    found = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    found += [re.sub(r"\s+", " ", command) for command in re.findall(r"`(python [^`]+)`", TEXT)]
    found += [f"python {command}" for command in re.findall(r"`((?:train_\w+|pretrain)\.py [^`]+)`", TEXT)]
    return [c for c in dict.fromkeys(found) if c.startswith("python ") and not any(part in c for part in ELSEWHERE)]


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_documents_runs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    script, *flags = command.split()[1:]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain, "audit", partial(pretrain.audit, count=24))
    if "--help" not in flags and "--check-only" not in flags:
        flags += SMALL.get(script, "").split()
    monkeypatch.setattr(sys, "argv", [script, *flags])
    try:
        importlib.import_module(script.removesuffix(".py")).main()
    except SystemExit as end:  # of --help
        assert end.code == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", re.findall(r"^python (.* --base models/.*)$", TEXT, re.MULTILINE))
def test_the_recipes_have_valid_settings(command: str) -> None:
    script, *flags = command.split()
    module = importlib.import_module(script.removesuffix(".py"))
    parse_config(module.Config, "", flags, module.defaults_of)


ANCHOR = re.compile(r"\[`(\w+)\.(\w+)`\]\((\w+\.py)#L(\d+)\)")


def line_of(module: str, name: str) -> int:
    """Where a function or class begins, after its decorators."""
    lines, start = inspect.getsourcelines(getattr(importlib.import_module(module), name))
    return start + next(i for i, line in enumerate(lines) if line.startswith(("def ", "class ")))


@pytest.mark.parametrize(("module", "name", "file", "line"), ANCHOR.findall(README))
def test_the_map_from_equation_to_code_names_the_line(module: str, name: str, file: str, line: str) -> None:
    remedy = "`python tests/test_readme.py` renews the README's line numbers"
    assert (file, int(line)) == (f"{module}.py", line_of(module, name)), remedy


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(files.ROOT)))
def test_links_between_the_documents_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", files.read_text(page)):
        assert (page.parent / target).exists(), target


def test_the_front_page_is_short_and_its_lines_are_readable() -> None:
    lines = README.splitlines()
    assert len(lines) <= 120 and len(README.split()) <= 1500
    assert max(map(len, lines)) <= 140


if __name__ == "__main__":
    sys.path.insert(0, str(files.ROOT))
    renewed = ANCHOR.sub(lambda m: f"[`{m[1]}.{m[2]}`]({m[1]}.py#L{line_of(m[1], m[2])})", README)
    files.write_text(files.ROOT / "README.md", renewed)
