"""The benchmark: both sides do the same work, and the table has every part."""

import re
import sys
from pathlib import Path

import pytest

from data import load_task
from harness import files
from tools import bench, stats


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PROMPTS": 2, "GROUP": 2, "NEW": 4, "BATCH": 2, "GRID": [("width", 32, 2, 8)]}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(stats, "RESULTS", tmp_path)


def test_the_table_has_both_comparisons_and_every_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", ["bench", "--repeats", "1"])
    bench.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [bool(re.search(r"\d x|\dx", row)) for row in rows] == [True] * 3 + [False] * 5
    assert "4 sequences of 16 + 4 tokens" in rows[0] and "4 rollouts" in rows[4] and "MB" in rows[-1]


def test_scaling_writes_what_the_picture_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--scaling"])
    bench.main()
    (row,) = files.read_json(tmp_path / "scaling.json")["rows"]
    assert row["rollouts"] > 0 and row["training"] > 0 and row["varied"] == "width"


def test_each_work_is_warmed_up_once_and_its_best_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = iter([0, 100, 0, 5, 0, 3, 0, 4]), []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.fastest({"a": lambda: calls.append(1)}, repeats=3) == {"a": 3}
    assert len(calls) == 4


def test_documents_are_the_same_each_time_and_of_unequal_lengths() -> None:
    pairs = bench.documents(load_task("arithmetic"), 20)
    assert pairs == bench.documents(load_task("arithmetic"), 20)
    assert len({len(prompt) + len(completion) for prompt, completion in pairs}) > 3
    assert all(token < bench.VOCAB for pair in pairs for tokens in pair for token in tokens)
