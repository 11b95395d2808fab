"""A full disk is one sentence and destroys nothing."""

import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROSD, both_scripts, sentence, train

import train_rosd
from errors import UserError
from harness.cli import run_script
from harness.files import lock_folder


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def full_for_torch(*_: object, **__: object) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0")


FAILURES = [(torch, "save", full), (torch, "save", full_for_torch), (os, "replace", full)]
FAILURES += [(Path, "write_text", full), (Path, "mkdir", full), (tempfile, "TemporaryFile", full)]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure[1])
@both_scripts
def test_a_full_disk_is_one_sentence_and_destroys_nothing(
    script: ModuleType, failure: tuple, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(script, base, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*/*") if path.name != ".lock"}
    with monkeypatch.context() as patch:
        patch.setattr(*failure)
        with pytest.raises(UserError, match=r"free some space|choose another folder"):
            train(script, base, tmp_path / "out")
    assert {path: path.read_bytes() for path in before} == before
    assert not list((tmp_path / "out").glob("*/*.tmp"))
    train(script, base, tmp_path / "out", "--resume")


def test_a_lock_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match="choose another folder"):
        lock_folder(tmp_path)


def test_a_bad_batch_that_cannot_be_written_is_told(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_rosd, "lesson_loss", lambda student, *_: student.norm.weight.sum() * math.nan)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"bad_batch\.json.*free some space"):
        train(train_rosd, base, tmp_path / "out", "--method", "opsd")


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("free", range(0, 400, 40))
def test_a_disk_that_is_really_full_is_one_sentence(
    free: int, small_disk: Path, base: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small_disk / "filler").write_bytes(bytes((400 - free) * 1000))
    flags = [*ROSD, "--base", base, "--out", str(small_disk / "out")]
    monkeypatch.setattr(sys, "argv", ["train_rosd.py", *flags])
    try:
        run_script(train_rosd.main)
    except SystemExit as end:
        assert end.code == 2
        assert "free some space" in (told := sentence(capsys)) or "choose another folder" in told
