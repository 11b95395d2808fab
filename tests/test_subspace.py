import pytest
import torch
from torch import Tensor

import runs
from data.tokenizer import END, VOCAB_SIZE, encode, pieces
from lora import add_lora, merge_lora
from model import GPT, GPTConfig, generate
from subspace import (
    COORDINATES,
    calibration_set,
    capability_gradients,
    choose_rank,
    correctness_positions,
    fold,
    make_projectors,
    principal_directions,
    project_kv,
    projector,
    target_layers,
)

PROMPTS = [encode(f"<|user|>{problem}<|assistant|>") for problem in ("3+8-5", "1*2*3*4")]


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    shape = {"n_layer": 3, "n_embd": 16, "n_head": 4, "n_kv_head": 2, "head_dim": 8, "n_hidden": 32}
    return GPT(GPTConfig(VOCAB_SIZE, **shape)).eval()


def places(model: GPT) -> list[tuple[int, str]]:
    return [(layer, kind) for layer in range(model.config.n_layer) for kind in "kv"]


def greedy(model: GPT) -> list[list[int]]:
    return generate(model, PROMPTS, 12, END, temperature=0)


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
    with pytest.raises(runs.UserError, match="only 4 dimensions"):
        choose_rank("9", singular_values)
    assert choose_rank("75%", singular_values) == 3
    assert choose_rank("energy:0.6", singular_values) == 1
    assert choose_rank("energy:0.9", singular_values) == 2
    assert choose_rank("energy:1.0", singular_values) <= 4


def test_target_layers() -> None:
    assert target_layers("paper", 4) == [1, 3]
    assert target_layers("paper", 5) == [1, 4]
    assert target_layers("last", 4) == [3]
    assert target_layers("3,4", 4) == [2, 3]


def test_batched_gradients_are_those_of_each_example_by_itself(model: GPT) -> None:
    examples = calibration_set(("add", "mix"), 6, seed=0)
    together = capability_gradients(model, examples, places(model), batch=6)
    alone = [capability_gradients(model, [example], places(model)) for example in examples]
    for place, rows in together.items():
        torch.testing.assert_close(rows, torch.cat([one[place] for one in alone]), rtol=1e-4, atol=1e-7)
        assert rows.shape == (sum(len(e.prompt) + len(e.solution) for e in examples), 16)


def test_gradient_rows_are_the_derivative_of_the_aligned_loss(model: GPT) -> None:
    """Moving the values of one position by epsilon u changes the loss by epsilon <row, u>."""
    (example,) = calibration_set(("add",), 1, seed=0)
    place, t = (1, "v"), 4
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
        at = [len(example.prompt) + position for position in correctness_positions(pieces(example.solution))]
        return -sum(logp[i - 1, tokens[0, i]].item() for i in at) / len(at)

    assert (loss(epsilon) - loss(-epsilon)) / (2 * epsilon) == pytest.approx((row @ u).item(), rel=1e-4, abs=1e-9)


def test_last_layer_keys_get_no_gradient_after_the_last_position_of_s(model: GPT) -> None:
    examples = calibration_set(("add",), 1, seed=0)
    rows = capability_gradients(model, examples, [(2, "k")])[(2, "k")]
    assert rows[-1].abs().sum() == 0  # <|end|> is read by nobody
    assert rows[:-3].abs().sum() > 0


@pytest.mark.parametrize("coordinate", COORDINATES)
def test_full_rank_projection_changes_nothing_and_low_rank_does(model: GPT, coordinate: str) -> None:
    gradients = capability_gradients(model, calibration_set(("add",), 20, 0), places(model), coordinate=coordinate)
    tokens = torch.tensor([PROMPTS[1]])
    plain = model(tokens)
    with project_kv(model, make_projectors(gradients, "100%", coordinate, 2), coordinate):
        torch.testing.assert_close(model(tokens), plain, rtol=0, atol=1e-4)
    with project_kv(model, make_projectors(gradients, "1", coordinate, 2), coordinate):
        assert (model(tokens) - plain).abs().max() > 1e-3


def test_projected_keys_and_values_lie_in_the_subspace_of_their_head(model: GPT) -> None:
    gradients = capability_gradients(model, calibration_set(("add",), 20, 0), [(1, "k")], coordinate="head")
    P = make_projectors(gradients, "2", "head", 2)[(1, "k")]
    assert P[:8, 8:].abs().sum() == 0 and torch.linalg.matrix_rank(P) == 4


def test_hooked_and_folded_generation_agree(model: GPT) -> None:
    gradients = capability_gradients(model, calibration_set(("add",), 20, 0), places(model))
    projectors = make_projectors(gradients, "50%")
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
    gradients = capability_gradients(model, calibration_set(("add",), 20, 0), places(model))
    projectors = make_projectors(gradients, "25%", source="random", seed=1)
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
    assert torch.nn.Linear is type(model.blocks[0].attn.q_proj)
