"""The benchmark: both sides do the same work, and the table has every part."""

import re
import sys

import pytest

from tools import bench


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PROMPTS": 2, "GROUP": 2, "NEW": 4, "BATCH": 2}.items():
        monkeypatch.setattr(bench, name, value)


def test_the_table_has_both_comparisons_and_every_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", ["bench", "--repeats", "1"])
    bench.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [bool(re.search(r"\d x|\dx", row)) for row in rows] == [True] * 3 + [False]
    assert "4 sequences of 16 + 4 tokens" in rows[0] and "MB" in rows[-1]


def test_each_work_is_warmed_up_once_and_its_best_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = iter([0, 100, 0, 5, 0, 3, 0, 4]), []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.fastest({"a": lambda: calls.append(1)}, repeats=3) == {"a": 3}
    assert len(calls) == 4
