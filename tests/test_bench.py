"""The benchmark: both sides do the same work, and the table has every part."""

import re
import sys
from pathlib import Path

import pytest
from test_hub import write_model
from test_hub_tokenizer import write_tokenizer

from tools import bench, peers


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


@pytest.fixture
def folder(tmp_path: Path) -> str:
    pytest.importorskip("reasoning_gym")
    write_tokenizer(tmp_path, "Qwen3")
    write_model(tmp_path, "Qwen3", vocab_size=640, max_position_embeddings=1024)
    return str(tmp_path)


@pytest.mark.parametrize("method", ["grpo", "sdpo"])
def test_our_step_on_real_weights_teaches_every_rollout_over_its_full_length(
    method: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lessons = []
    monkeypatch.setattr(peers, "update", lambda *given: lessons.append(given[3]))
    assert len(peers.our_step(method, folder, 2)) == 2
    for batch in lessons:
        assert [(x.start, x.end) for x in batch] == [(0, peers.NEW)] * peers.BATCH * peers.GROUP


def test_both_sides_write_the_same_number_of_tokens(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "timed", lambda run, _: run(0))
    ours, theirs = peers.our_rollouts(folder, 1), peers.their_rollouts(folder, 1)
    task, count = peers.open_task(folder), peers.BATCH * peers.GROUP
    longest = max(len(task.encode(task.student_prompt(problem))) for problem in peers.draw(task, 0))
    assert list(map(len, ours)) == [peers.NEW] * count
    assert theirs.shape == (count, longest + peers.NEW)
