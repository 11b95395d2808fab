"""Gradients, singular directions and projectors compared with direct computation; projection with folding."""

import math
import random

import numpy as np
import pytest
import torch
from conftest import Letters, tiny_gpt
from torch import Tensor

import subspace
from data import load_task
from errors import UserError
from evaluate import golden_likelihoods
from harness import files
from harness.cli import run_script
from model import GPT
from sampling import generate
from subspace import (
    COORDINATES,
    LOSSES,
    Example,
    aligned_loss,
    calibration_set,
    capability_gradients,
    choose_rank,
    fold,
    make_projectors,
    principal_directions,
    project_kv,
    projector,
    site_module,
    target_layers,
    target_sites,
)
from train_spd import SubspaceConfig

TASK = Letters()
PROMPTS = [TASK.encode(question) for question in ("a0?", "bd2~abc!?")]
TOKENS = torch.tensor([PROMPTS[1]])
SITES = [(layer, kind) for layer in range(3) for kind in "kv"]


@pytest.fixture
def model() -> GPT:
    return tiny_gpt(TASK, n_layer=3)


def examples_of(size: int = 20, loss: str = "results", domains: tuple[str, ...] = ("two",)) -> list[Example]:
    return calibration_set(TASK, domains, size, loss, seed=0)


# ---------------------------------------------------------------------------------------------- settings


def test_rank_is_a_number_or_a_share_of_the_dimensions() -> None:
    ranks = {"16": 16, "50%": 32, "35%": 22, "100%": 64, "64": 64, "0.1%": 1, "12.5%": 8}
    assert {spec: choose_rank(spec, 64) for spec in ranks} == ranks


@pytest.mark.parametrize("spec", ["101%", "65", "0", "0%", "1.5", "", "-1", "-5%", "%", "1e1", "nan"])
def test_a_rank_outside_the_dimensions_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match="give a number from 1 to 64"):
        choose_rank(spec, 64)


def test_layers_are_counted_from_one() -> None:
    layers = {"paper": [1, 3], "last": [3], "all": [0, 1, 2, 3], "3,4": [2, 3], "4,1,4": [0, 3]}
    assert {spec: target_layers(spec, 4) for spec in layers} == layers
    assert (target_layers("paper", 5), target_layers("paper", 1)) == ([1, 4], [0])


@pytest.mark.parametrize("project", ["kv", "k", "v"])
def test_sites_are_what_is_projected_of_every_target_layer(project: str, model: GPT) -> None:
    expected = [(layer, kind) for layer in (0, 2) for kind in project]
    assert target_sites(SubspaceConfig(layers="1,3", project=project), model) == expected


@pytest.mark.parametrize("spec", ["5", "0", "", "1,", "first", "-1", "1.0"])
def test_layers_that_do_not_exist_are_refused(spec: str) -> None:
    with pytest.raises(UserError, match="numbers from 1 to 4"):
        target_layers(spec, 4)


# ---------------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("loss", LOSSES)
def test_calibration_takes_problems_solutions_and_positions_from_the_task(loss: str) -> None:
    for i, example in enumerate(examples_of(4, loss, ("one", "two"))):
        solution = TASK.pieces(example.solution)
        assert solution[-1] == "<end>" and len(solution) == 2 + i % 2  # the domains in turn
        assert TASK.decode(example.prompt)[: 1 + i % 2] == "".join(solution[:-1])
        assert list(example.S) == ([0] if loss == "results" else list(range(2 + i % 2)))


def test_a_solution_without_a_decisive_position_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Letters, "decisive", lambda self, solution, rule: [])
    with pytest.raises(UserError, match="no position that decides"):
        examples_of()


def test_aligned_loss_is_a_mean_over_each_examples_positions() -> None:
    logits, tokens = torch.randn(2, 4, 5), torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    weights = torch.tensor([[0, 0, 0.5, 0.5], [0, 1.0, 0, 0]])
    logp = logits.log_softmax(-1)
    expected = -(logp[0, 1, 3] + logp[0, 2, 4]) / 2 - logp[1, 0, 3]
    torch.testing.assert_close(aligned_loss(logits, tokens, weights), expected)
    torch.testing.assert_close(aligned_loss(6 * logits, tokens, weights, temperature=6.0), expected)


def test_the_temperature_gives_a_gradient_where_the_model_is_sure() -> None:
    """d log p / d logits is one-hot - p: no more than 1e-6 at p = 1 - 1e-6, but 0.2 / 6 or so at temperature 6."""
    logits = torch.tensor([[[0.0, 0.0, 14.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    tokens, weights = torch.tensor([[0, 2]]), torch.tensor([[0.0, 1.0]])
    sure, warm = (
        torch.autograd.grad(aligned_loss(logits, tokens, weights, each), logits)[0][0, 0, 2] for each in (1.0, 6.0)
    )
    p = 1 / (1 + 2 * math.exp(-14 / 6))
    assert -1e-5 < sure < 0 and warm.item() == pytest.approx(-(1 - p) / 6, rel=1e-4)


# ---------------------------------------------------------------------------------------------- gradients


def test_batched_gradients_are_those_of_each_example_by_itself(model: GPT) -> None:
    examples = examples_of(6, domains=("one", "two"))
    together = capability_gradients(model, examples, SITES, batch=4)
    alone = [capability_gradients(model, [example], SITES) for example in examples]
    for site, rows in together.items():
        torch.testing.assert_close(rows, torch.cat([one[site] for one in alone]), rtol=1e-4, atol=1e-7)
        assert rows.shape == (sum(len(e.prompt) + len(e.solution) for e in examples), 16)


@pytest.mark.parametrize("coordinate", COORDINATES)
@pytest.mark.parametrize("kind", ["k", "v"])
def test_gradient_rows_are_the_derivative_of_the_aligned_loss(model: GPT, kind: str, coordinate: str) -> None:
    """Moving the keys or values of one position by epsilon u changes the loss by epsilon <row, u>."""
    (example,), site, t = examples_of(1, "full"), (1, kind), 2
    row = capability_gradients(model.double(), [example], [site], coordinate)[site][t]
    u, epsilon = torch.randn(16, dtype=torch.float64), 1e-5

    def loss(shift: float) -> float:
        def nudge(module: object, inputs: tuple, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, t] += (shift * u).view_as(output[0, t])
            return output

        handle = site_module(model, site, coordinate).register_forward_hook(nudge)
        tokens = torch.tensor([example.prompt + example.solution])
        logp = model(tokens).log_softmax(-1)[0]
        handle.remove()
        at = [len(example.prompt) + position for position in example.S]
        return -sum(logp[i - 1, tokens[0, i]].item() for i in at) / len(at)

    assert row.abs().max() > 1e-6
    assert (loss(epsilon) - loss(-epsilon)) / (2 * epsilon) == pytest.approx((row @ u).item(), rel=1e-4, abs=1e-9)


def test_a_site_is_the_output_that_the_coordinate_names(model: GPT) -> None:
    attention = model.blocks[1].attn
    modules = {"linear": attention.k_proj, "head": attention.k_proj, "norm": attention.k_norm, "rope": attention.k_out}
    for coordinate in COORDINATES:
        assert site_module(model, (1, "k"), coordinate) is modules[coordinate]
        assert site_module(model, (1, "v"), coordinate) is attention.v_proj


def test_last_layer_keys_get_no_gradient_after_the_last_position_of_s(model: GPT) -> None:
    rows = capability_gradients(model, examples_of(1), [(2, "k")])[(2, "k")]
    assert rows[-3:].abs().sum() == 0  # the whole solution: its first token is what counts
    assert rows[:-3].abs().sum() > 0


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_leave_the_model_as_it_was(frozen: bool, model: GPT) -> None:
    model.requires_grad_(not frozen)
    capability_gradients(model, examples_of(3), SITES)
    assert all(p.grad is None and p.requires_grad != frozen for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


# ---------------------------------------------------------------------------------------------- directions, projectors


@pytest.mark.parametrize("rows", [5, 20, 400])
def test_principal_directions_are_those_of_numpy_up_to_sign(rows: int) -> None:
    G = torch.randn(rows, 8) * torch.arange(1, 9)
    s, V = principal_directions(G)
    _, expected, Vt = np.linalg.svd(G.double().numpy(), full_matrices=False)
    np.testing.assert_allclose(s.numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(abs((V.T.numpy() * Vt).sum(1)), np.ones(min(rows, 8)), rtol=1e-8)


def test_projector_is_orthogonal_of_its_rank_and_keeps_the_most_energy() -> None:
    G = torch.randn(200, 8) * torch.arange(1, 9)
    P = projector(principal_directions(G)[1], 3)
    torch.testing.assert_close(P @ P, P, rtol=0, atol=1e-5)
    torch.testing.assert_close(P, P.T, rtol=0, atol=1e-6)
    assert P.trace().item() == pytest.approx(3, abs=1e-4)
    other = projector(torch.linalg.qr(torch.randn(8, 8)).Q, 3)
    assert (G @ P).norm() > (G @ other).norm()


def test_projectors_of_heads_are_those_of_each_heads_gradients(model: GPT) -> None:
    G = capability_gradients(model, examples_of(), [(1, "k")], "head")[(1, "k")]
    P = make_projectors({(1, "k"): G}, "2", blocks=2)[(1, "k")]
    assert not P[:8, 8:].any() and not P[8:, :8].any()
    for part in (slice(0, 8), slice(8, 16)):
        V = np.linalg.svd(G[:, part].double().numpy())[2][:2].T
        torch.testing.assert_close(P[part, part], torch.tensor(V @ V.T).float(), rtol=0, atol=1e-5)


def test_random_subspaces_have_the_rank_differ_between_sites_and_follow_the_seed(model: GPT) -> None:
    gradients = {site: torch.zeros(1, 16) for site in SITES}  # which need not span anything
    one, again, other = (make_projectors(gradients, "25%", "random", seed=seed) for seed in (1, 1, 2))
    assert all(round(P.trace().item()) == 4 for P in one.values())
    assert all(torch.equal(one[site], again[site]) and not torch.allclose(one[site], other[site]) for site in SITES)
    assert not torch.allclose(one[(0, "k")], one[(0, "v")])


@pytest.mark.parametrize("broken", ["too few", "zero"])
def test_gradients_that_span_too_little_are_refused_and_never_filled_up(broken: str, model: GPT) -> None:
    if broken == "zero":
        torch.nn.init.zeros_(model.blocks[2].attn.o_proj.weight)
    gradients = capability_gradients(model, examples_of(2), [(2, "k")])
    with pytest.raises(UserError, match=r"layer 3 K span \d+ of the 16 directions of --rank 100%"):
        make_projectors(gradients, "100%")


def test_the_smallest_rank_that_keeps_steps_keeps_them_and_the_next_lower_does_not() -> None:
    model, task = files.load_checkpoint(files.BASE_CHECKPOINT), load_task("exams")
    sites = target_sites(SubspaceConfig(), model)
    examples = calibration_set(task, ("exam",), 60, "steps", 0)
    G = capability_gradients(model, examples, sites, temperature=subspace.TEMPERATURE)
    rank = int(subspace.smallest_rank("keep80%", model, task, ("exam",), G))
    rng = random.Random("rank")
    problems = [task.problem("exam", rng) for _ in range(100)]
    plain, kept = golden_likelihoods(model, task, problems)["step"], []
    for each in range(1, rank + 1):
        with project_kv(model, make_projectors(G, str(each))):
            kept.append(math.exp(golden_likelihoods(model, task, problems)["step"] - plain))
    assert 1 < rank < 32 and kept[-1] >= 0.8 and max(kept[:-1]) < 0.8
    assert subspace.smallest_rank("50%", model, task, ("exam",), G) == "50%"
    for spec in ("keep0%", "keep100%"):
        with pytest.raises(UserError, match="above 0 and below 100"):
            subspace.smallest_rank(spec, model, task, ("exam",), G)


# ---------------------------------------------------------------------------------------------- projection


@pytest.mark.parametrize("coordinate", COORDINATES)
def test_full_rank_projection_changes_nothing_and_low_rank_does(model: GPT, coordinate: str) -> None:
    gradients, plain = capability_gradients(model, examples_of(), SITES, coordinate), model(TOKENS)
    blocks = subspace.heads(SubspaceConfig(coordinate=coordinate), model)
    assert blocks == (2 if coordinate == "head" else 1)
    with project_kv(model, make_projectors(gradients, "100%", blocks=blocks), coordinate):
        torch.testing.assert_close(model(TOKENS), plain, rtol=0, atol=1e-4)
    with project_kv(model, make_projectors(gradients, "1", blocks=blocks), coordinate):
        assert (model(TOKENS) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("biased", [False, True])
def test_hooked_and_folded_generation_agree(biased: bool, model: GPT) -> None:
    projectors = make_projectors(capability_gradients(model, examples_of(), SITES), "50%")
    for block in model.blocks if biased else ():
        for linear in (block.attn.k_proj, block.attn.v_proj):
            linear.bias = torch.nn.Parameter(torch.randn(16))
    plain = model(TOKENS)
    with project_kv(model, projectors):
        hooked, logits = generate(model, PROMPTS, 12, TASK.stop, temperature=0), model(TOKENS)
    fold(model, projectors)
    assert generate(model, PROMPTS, 12, TASK.stop, temperature=0) == hooked
    torch.testing.assert_close(model(TOKENS), logits, rtol=0, atol=1e-5)
    assert (logits - plain).abs().max() > 0.1


def test_the_model_is_restored_even_after_an_error(model: GPT) -> None:
    plain = model(TOKENS)
    with pytest.raises(ZeroDivisionError), project_kv(model, {(0, "k"): torch.zeros(16, 16)}):
        assert not torch.equal(model(TOKENS), plain)
        raise ZeroDivisionError
    assert torch.equal(model(TOKENS), plain)


def test_the_worked_example_runs_on_any_task(
    letters: Letters, base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--domain", "one", "--calibration-domain", "two", "one", "--layers", "paper", "--rank", "2"]
    monkeypatch.setattr("sys.argv", ["subspace.py", "--base", base, *flags, "--project", "kv"])
    run_script(subspace.main)
    printed = capsys.readouterr().out
    assert printed.count("projected") == 4 and "with projection:" in printed
