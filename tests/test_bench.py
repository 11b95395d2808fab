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


@pytest.mark.parametrize("may_end", [False, True], ids=["all full", "to their ends"])
def test_both_sides_write_as_many_tokens_as_they_are_timed_for(
    may_end: bool, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "LONGEST", 96)  # the folder's model reads 1,024 tokens
    monkeypatch.setattr(bench, "timed_rollouts", lambda run, stop, _: (run(0), stop))
    (ours, stop), (theirs, _) = bench.our_rollouts(may_end, folder, 1), bench.their_rollouts(may_end, folder, 1)
    assert len(ours) == len(theirs) == bench.BATCH * bench.GROUP
    if not may_end:
        assert {len(response) for response in ours + theirs} == {bench.NEW}
    for response in ours if may_end else []:
        assert len(response) == bench.LONGEST or response[-1] in stop


def test_rollouts_that_end_are_timed_per_thousand_tokens_up_to_their_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "timed", lambda run, steps: [float(run(step) is None) for step in range(steps)])  # 1 s
    responses = [[5, 5, 5, 9, 0, 0], [5] * 6]  # the first ends with its stop token, 9: 10 tokens in 1 s
    assert bench.timed_rollouts(lambda _: responses, (9,), 3)[1] == pytest.approx(100)
    assert bench.timed_rollouts(lambda _: responses, (-1,), 3) == [1, 1, 1]
