"""Gradients, singular directions and projectors compared with direct computation; projection with folding."""

import pytest
import torch
from conftest import Letters, tiny_gpt
from torch import Tensor

import subspace
from errors import UserError
from harness.cli import run_script
from lora import add_lora, merge_lora
from model import GPT, generate
from subspace import (
    COORDINATES,
    LOSSES,
    Example,
    SubspaceConfig,
    aligned_loss,
    calibrate,
    calibration_set,
    capability_gradients,
    choose_rank,
    fold,
    make_projectors,
    principal_directions,
    project_kv,
    projector,
    target_layers,
)

TASK = Letters()
PROMPTS = [TASK.encode(question) for question in ("a0?", "bd2~abc!?")]


@pytest.fixture
def model() -> GPT:
    return tiny_gpt(TASK, n_layer=3)


def examples_of(domain: str = "two", size: int = 20, **settings: str) -> list[Example]:
    return calibration_set(TASK, (domain,), SubspaceConfig(calibration_size=size, **settings), seed=0)


def places(model: GPT) -> list[tuple[int, str]]:
    return [(layer, kind) for layer in range(model.config.n_layer) for kind in "kv"]


def projectors_of(gradients: dict, rank: str, coordinate: str = "linear") -> dict:
    return make_projectors(gradients, SubspaceConfig(rank=rank, coordinate=coordinate), n_kv_head=2)


def greedy(model: GPT) -> list[list[int]]:
    return generate(model, PROMPTS, 12, TASK.stop, temperature=0)


@pytest.mark.parametrize("rows", [5, 20, 400])
def test_principal_directions_equal_the_direct_svd_up_to_sign(rows: int) -> None:
    G = torch.randn(rows, 8) * torch.arange(1, 9)
    singular_values, V = principal_directions(G)
    _, expected, Vt = torch.linalg.svd(G, full_matrices=False)
    rank = min(rows, 8)
    torch.testing.assert_close(singular_values[:rank], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((V[:, :rank] * Vt.T).sum(0).abs(), torch.ones(rank), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(V.T @ V, torch.eye(8), rtol=0, atol=1e-5)


def test_projector_is_orthogonal_of_its_rank_and_keeps_the_most_energy() -> None:
    G = torch.randn(200, 8) * torch.arange(1, 9)
    _, V = principal_directions(G)
    P = projector(V, 3)
    torch.testing.assert_close(P @ P, P, rtol=0, atol=1e-5)
    torch.testing.assert_close(P, P.T, rtol=0, atol=1e-6)
    assert P.trace().item() == pytest.approx(3, abs=1e-4)
    other = projector(torch.linalg.qr(torch.randn(8, 8)).Q, 3)
    assert (G @ P).norm() > (G @ other).norm()


def test_rank_by_number_fraction_and_energy() -> None:
    singular_values = torch.tensor([3.0, 2.0, 1.0, 0.0])  # energies 9, 4, 1 of 14
    assert choose_rank("2", singular_values) == 2
    with pytest.raises(UserError, match="only 4 dimensions"):
        choose_rank("9", singular_values)
    assert choose_rank("75%", singular_values) == 3
    assert choose_rank("energy:0.6", singular_values) == 1
    assert choose_rank("energy:0.9", singular_values) == 2
    assert choose_rank("energy:1.0", singular_values) <= 4


def test_target_layers() -> None:
    assert target_layers("paper", 4) == [1, 3]
    assert target_layers("paper", 5) == [1, 4]
    assert target_layers("last", 4) == [3]
    assert target_layers("paper", 1) == [0]
    assert target_layers("3,4", 4) == [2, 3]
    for wrong in ("5", "0", "", "1,", "first"):
        with pytest.raises(UserError, match="numbers from 1 to 4"):
            target_layers(wrong, 4)


def test_batched_gradients_are_those_of_each_example_by_itself(model: GPT) -> None:
    examples = calibration_set(TASK, ("one", "two"), SubspaceConfig(calibration_size=6), seed=0)
    together = capability_gradients(model, examples, places(model), batch=6)
    alone = [capability_gradients(model, [example], places(model)) for example in examples]
    for place, rows in together.items():
        torch.testing.assert_close(rows, torch.cat([one[place] for one in alone]), rtol=1e-4, atol=1e-7)
        assert rows.shape == (sum(len(e.prompt) + len(e.solution) for e in examples), 16)


def test_gradient_rows_are_the_derivative_of_the_aligned_loss(model: GPT) -> None:
    """Moving the values of one position by epsilon u changes the loss by epsilon <row, u>."""
    (example,) = examples_of(size=1, loss="full")
    place, t = (1, "v"), 2
    row = capability_gradients(model.double(), [example], [place])[place][t]
    u, epsilon = torch.randn(16, dtype=torch.float64), 1e-5

    def loss(shift: float) -> float:
        def nudge(module: object, inputs: tuple, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, t] += shift * u
            return output

        handle = model.blocks[1].attn.v_proj.register_forward_hook(nudge)
        tokens = torch.tensor([example.prompt + example.solution])
        logp = model(tokens).log_softmax(-1)[0]
        handle.remove()
        at = [len(example.prompt) + position for position in example.S]
        return -sum(logp[i - 1, tokens[0, i]].item() for i in at) / len(at)

    assert (loss(epsilon) - loss(-epsilon)) / (2 * epsilon) == pytest.approx((row @ u).item(), rel=1e-4, abs=1e-9)


def test_last_layer_keys_get_no_gradient_after_the_last_position_of_s(model: GPT) -> None:
    rows = capability_gradients(model, examples_of(size=1), [(2, "k")])[(2, "k")]
    assert rows[-3:].abs().sum() == 0  # the whole solution: its first token is what counts
    assert rows[:-3].abs().sum() > 0


@pytest.mark.parametrize("coordinate", COORDINATES)
def test_full_rank_projection_changes_nothing_and_low_rank_does(model: GPT, coordinate: str) -> None:
    gradients = capability_gradients(model, examples_of(), places(model), coordinate)
    tokens = torch.tensor([PROMPTS[1]])
    plain = model(tokens)
    with project_kv(model, projectors_of(gradients, "100%", coordinate), coordinate):
        torch.testing.assert_close(model(tokens), plain, rtol=0, atol=1e-4)
    with project_kv(model, projectors_of(gradients, "1", coordinate), coordinate):
        assert (model(tokens) - plain).abs().max() > 1e-3


def test_projected_keys_and_values_lie_in_the_subspace_of_their_head(model: GPT) -> None:
    gradients = capability_gradients(model, examples_of(), [(1, "k")], "head")
    P = projectors_of(gradients, "2", "head")[(1, "k")]
    assert P[:8, 8:].abs().sum() == 0 and torch.linalg.matrix_rank(P) == 4


def test_hooked_and_folded_generation_agree(model: GPT) -> None:
    projectors = projectors_of(capability_gradients(model, examples_of(), places(model)), "50%")
    with project_kv(model, projectors):
        hooked, logits = greedy(model), model(torch.tensor([PROMPTS[0]]))
    fold(model, projectors)
    assert greedy(model) == hooked
    torch.testing.assert_close(model(torch.tensor([PROMPTS[0]])), logits, rtol=0, atol=1e-5)


def test_the_model_is_restored_even_after_an_error(model: GPT) -> None:
    tokens, projectors = torch.tensor([PROMPTS[0]]), {(0, "k"): torch.zeros(16, 16)}
    plain = model(tokens)
    with pytest.raises(ZeroDivisionError), project_kv(model, projectors):
        raise ZeroDivisionError
    assert torch.equal(model(tokens), plain)


def test_random_subspaces_have_the_rank_and_differ_between_places(model: GPT) -> None:
    gradients = capability_gradients(model, examples_of(), places(model))
    projectors = make_projectors(gradients, SubspaceConfig(rank="25%", subspace="random"), 2, seed=1)
    assert all(round(P.trace().item()) == 4 for P in projectors.values())
    assert not torch.allclose(projectors[(0, "k")], projectors[(0, "v")])


def test_lora_starts_as_the_model_trains_only_its_updates_and_merges_exactly(model: GPT) -> None:
    tokens = torch.tensor([PROMPTS[1]])
    plain = model(tokens)
    weight = model.blocks[0].attn.q_proj.weight.clone()
    parameters = add_lora(model, rank=2, alpha=4, dropout=0.5)
    torch.testing.assert_close(model(tokens), plain)
    assert {p for p in model.parameters() if p.requires_grad} == set(parameters)
    assert sum(p.numel() for p in parameters) == 3 * 2 * ((16 + 32) + 2 * (16 + 16) + (32 + 16))
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for _ in range(2):
        model(tokens).square().mean().backward()
        optimizer.step()
    trained = model.eval()(tokens)
    assert (trained - plain).abs().max() > 1e-4
    assert torch.equal(model.blocks[0].attn.q_proj.linear.weight, weight)
    merge_lora(model)
    torch.testing.assert_close(model(tokens), trained, rtol=0, atol=1e-5)
    assert isinstance(model.blocks[0].attn.q_proj, torch.nn.Linear)


def test_fold_takes_the_bias_along(model: GPT) -> None:
    projectors = projectors_of(capability_gradients(model, examples_of(), places(model)), "50%")
    for block in model.blocks:
        for linear in (block.attn.k_proj, block.attn.v_proj):
            linear.bias = torch.nn.Parameter(torch.randn(16))
    tokens = torch.tensor([PROMPTS[0]])
    with project_kv(model, projectors):
        hooked = model(tokens)
    fold(model, projectors)
    torch.testing.assert_close(model(tokens), hooked, rtol=0, atol=1e-5)


def test_aligned_loss_is_a_mean_over_each_examples_own_positions() -> None:
    logits, tokens = torch.randn(2, 4, 5), torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    weights = torch.tensor([[0, 0, 0.5, 0.5], [0, 1.0, 0, 0]])
    logp = logits.log_softmax(-1)
    expected = -(logp[0, 1, 3] + logp[0, 2, 4]) / 2 - logp[1, 0, 3]
    torch.testing.assert_close(aligned_loss(logits, tokens, weights), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_calibration_asks_the_task_for_problems_solutions_and_positions(loss: str) -> None:
    for example in examples_of("one", 4, loss=loss):
        solution = TASK.pieces(example.solution)
        assert TASK.decode(example.prompt)[0] == solution[0] and solution[1] == "<end>"
        assert TASK.decisive(solution, loss) == example.S


def test_a_solution_without_a_decisive_position_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Letters, "decisive", lambda self, solution, rule: [])
    with pytest.raises(UserError, match="no position that decides"):
        examples_of()


@pytest.mark.parametrize("broken", ["too few", "zero", "nan"])
def test_gradients_that_span_too_little_are_told_and_never_filled_up(broken: str, model: GPT) -> None:
    with torch.no_grad():
        if broken == "zero":
            model.blocks[2].attn.o_proj.weight.zero_()
        if broken == "nan":
            model.norm.weight.fill_(torch.inf)
    cause = "not finite" if broken == "nan" else r"span \d+ of the 16 directions"
    with pytest.raises(UserError, match=cause):
        calibrate(model, examples_of(size=2), SubspaceConfig(layers="3", rank="100%"))


def test_a_random_subspace_needs_no_gradients_that_span_it(model: GPT) -> None:
    config = SubspaceConfig(layers="3", project="kv", rank="100%", subspace="random")
    assert len(calibrate(model, examples_of(size=1), config)) == 2


def test_the_worked_example_is_of_any_task(
    letters: Letters, base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    flags = [
        "--domain",
        "one",
        "--calibration-domain",
        "two",
        "one",
        "--layers",
        "paper",
        "--rank",
        "2",
        "--project",
        "kv",
    ]
    monkeypatch.setattr("sys.argv", ["subspace.py", "--base", base, *flags])
    run_script(subspace.main)
    printed = capsys.readouterr().out
    assert printed.count("projected") == 4 and "with projection:" in printed
