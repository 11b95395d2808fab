"""The shipped base model has the accuracies the README states, and its optimizer is the one it names."""

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


def test_muon_for_many_matrices_at_once_is_torchs_muon() -> None:
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((24, 8), (8, 24), (8, 8), (24, 8), (4, 8))]
    moved = []
    for optimizer_class in (torch.optim.Muon, pretrain.Muon):
        matrices = [matrix.clone().requires_grad_() for matrix in start]
        optimizer = optimizer_class(matrices, lr=0.1, weight_decay=0.1)
        torch.manual_seed(1)
        for _ in range(3):
            for matrix in matrices:
                matrix.grad = torch.randn_like(matrix)
            optimizer.step()
        moved.append([after - before for after, before in zip(matrices, start, strict=True)])
    for theirs, ours in zip(*moved, strict=True):  # a batch of products may round otherwise, in 8 bits
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
