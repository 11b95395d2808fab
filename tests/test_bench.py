"""The benchmark: both sides do the same work."""

import sys
from pathlib import Path

import pytest
from test_hub import write_model
from test_hub_tokenizer import write_tokenizer

from errors import UserError
from tools import bench


def test_without_a_folder_the_flag_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(UserError, match="--real"):
        bench.main()


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
    monkeypatch.setattr(bench.train_rosd, "update", lambda *given: lessons.append(given[3]))
    assert len(bench.our_step(method, folder, 2)) == 2
    for batch in lessons:
        assert [(x.start, x.end) for x in batch] == [(0, bench.NEW)] * bench.BATCH * bench.GROUP


def test_both_sides_write_the_same_number_of_tokens(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "timed", lambda run, _: run(0))
    ours, theirs = bench.our_rollouts(folder, 1), bench.their_rollouts(folder, 1)
    task, count = bench.open_task(folder), bench.BATCH * bench.GROUP
    longest = max(len(task.encode(task.student_prompt(problem))) for problem in bench.draw(task, 0))
    assert list(map(len, ours)) == [bench.NEW] * count
    assert theirs.shape == (count, longest + bench.NEW)
