"""The shipped base model has the accuracies the README states."""

import pytest
import torch

import pretrain
import runs


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    return pretrain.measure(runs.load_checkpoint(runs.BASE_CHECKPOINT)[0], "mix", count=600, seed=1)


def test_the_checkpoint_is_small_and_loads_without_running_code() -> None:
    assert runs.BASE_CHECKPOINT.stat().st_size < 3_000_000
    assert set(torch.load(runs.BASE_CHECKPOINT, weights_only=True)) == {"config", "model"}


def test_plain_solutions_are_right_in_50_to_70_percent(measured: dict[str, float]) -> None:
    assert 0.5 <= measured["plain"] <= 0.7


@pytest.mark.parametrize("part", ["with a hint", "with a reference", "first error quoted"])
def test_teacher_and_reflector_are_right_in_95_percent(part: str, measured: dict[str, float]) -> None:
    assert measured[part] >= 0.95


def test_the_second_base_has_to_guess_and_its_teacher_knows_more() -> None:
    gaps = pretrain.measure(runs.load_checkpoint(runs.ROOT / "data" / "gaps.pt")[0], "gap", count=150, seed=1)
    assert gaps["plain"] < 0.2
    assert gaps["with a hint"] > 0.6 and gaps["with a reference"] >= 0.95
    assert gaps["first error quoted"] >= 0.8
