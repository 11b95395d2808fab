"""The model compared with transformers, and with itself without cache, padding or batch."""

import itertools

import pytest
import torch
from torch import Tensor

from model import GPT, GPTConfig, KVCache, response_logprobs
from sampling import generate

SMALL = {"vocab_size": 12, "block_size": 64, "n_layer": 2, "n_embd": 16, "n_head": 4, "head_dim": 8, "n_hidden": 24}
PROMPTS = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]
STOP = (0,)


def random_model(seed: int = 0, n_kv_head: int = 2, **changes: float) -> GPT:
    """A model all of whose weights are random, the norms' too, and large enough to make its predictions differ."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SMALL | {"n_kv_head": n_kv_head} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SHAPES = [(2, 2, 1, 8, 10_000.0), (4, 2, 2, 4, 10_000.0), (4, 1, 3, 6, 1_000_000.0)]


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_equal_qwen3(shape: tuple[float, ...], window: int) -> None:
    transformers = pytest.importorskip("transformers")
    names = ("n_head", "n_kv_head", "n_layer", "head_dim", "rope_theta")
    model = random_model(norm_eps=1e-3, window=window, **dict(zip(names, shape, strict=True)))
    config = model.config
    shape = dict(
        hidden_size=config.n_embd, intermediate_size=config.n_hidden, max_position_embeddings=config.block_size
    )
    shape |= dict(num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head, rms_norm_eps=config.norm_eps)
    shape |= dict(num_hidden_layers=config.n_layer, tie_word_embeddings=True, attention_bias=False)
    if window:
        kinds = [("sliding", "full")[i % 2] + "_attention" for i in range(config.n_layer)]
        shape |= dict(use_sliding_window=True, sliding_window=window, layer_types=kinds)
    same = {name: getattr(config, name) for name in ("vocab_size", "head_dim", "rope_theta")}
    qwen = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, **same))
    names = {"embed.": "model.embed_tokens.", "blocks.": "model.layers.", "norm.": "model.norm."}
    parts = {".attn.": ".self_attn.", ".attn_norm.": ".input_layernorm.", ".mlp_norm.": ".post_attention_layernorm."}
    state = {"lm_head.weight": model.embed.weight}
    for name, weight in model.state_dict().items():
        for ours, theirs in names.items():
            name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        state[name] = weight
    qwen.load_state_dict(state, strict=True)
    tokens = random_tokens(3, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), qwen.eval()(tokens).logits, atol=1e-4, rtol=0)


def test_half_precision_weights_keep_their_dtype_and_round_the_logits_a_little() -> None:
    model, tokens = random_model(), random_tokens(3, 40)
    half = GPT(model.config)
    half.load_state_dict({name: weight.bfloat16() for name, weight in model.state_dict().items()}, assign=True)
    model.load_state_dict({name: weight.float() for name, weight in half.state_dict().items()})
    assert half.cos.dtype == torch.float32, "angles in bfloat16 are wrong from position 256 on"
    logits = half(tokens)
    assert logits.dtype == torch.bfloat16
    assert (logits - model(tokens)).norm() < 0.02 * model(tokens).norm()
    assert all(len(response) == 4 for response in generate(half, PROMPTS, 4, (), temperature=0))


def test_options_add_and_remove_the_weights_they_name() -> None:
    def names(**options: bool) -> set[str]:
        return set(GPT(GPTConfig(**SMALL, **options)).state_dict())

    assert {name.split(".")[-2] for name in names() - names(qk_norm=False)} == {"q_norm", "k_norm"}
    biases = names(qkv_bias=True) - names()
    assert {".".join(name.split(".")[-2:]) for name in biases} == {"q_proj.bias", "k_proj.bias", "v_proj.bias"}
    assert names(tied=False) - names() == {"lm_head.weight"}


def test_own_output_layer_makes_the_logits() -> None:
    model, tokens = random_model(tied=False), random_tokens(2, 5)
    hidden = model.hidden(tokens)
    torch.testing.assert_close(model(tokens), hidden @ model.lm_head.weight.T)
    assert not torch.allclose(model(tokens), hidden @ model.embed.weight.T, atol=1e-2)


def test_sequences_beyond_block_size_are_refused_by_number() -> None:
    model = random_model()
    generate(model, [[1] * 60, [2]], 4, STOP)
    for call in (
        lambda: generate(model, [[2], [1] * 60], 5, STOP),
        lambda: model(random_tokens(1, 65)),
        lambda: response_logprobs(model, [[1] * 60], [[2] * 5]),
    ):
        with pytest.raises(ValueError, match=r"65 tokens.*block_size = 64"):
            call()


def test_later_tokens_leave_earlier_logits_unchanged() -> None:
    model, tokens = random_model(), random_tokens(2, 10)
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % SMALL["vocab_size"]
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert ((before[:, 6:] - after[:, 6:]).abs().amax(dim=-1) > 1e-3).all()


def test_only_odd_layers_see_a_window_of_last_tokens() -> None:
    """One layer with a window of 3 lets position 6 change the logits of 6, 7 and 8; a second layer sees everything."""
    tokens = random_tokens(2, 12)
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % SMALL["vocab_size"]
    for n_layer, last in ((1, 9), (2, 12)):
        model = random_model(n_layer=n_layer, window=3)
        moved = (model(tokens) - model(changed)).abs().amax(dim=(0, 2)) > 1e-6
        assert moved.nonzero()[:, 0].tolist() == list(range(6, last))


def test_only_distances_between_positions_matter() -> None:
    model, tokens = random_model(), random_tokens(2, 10)
    positions = torch.arange(10)[None]
    torch.testing.assert_close(model.hidden(tokens, positions + 17), model.hidden(tokens), atol=1e-5, rtol=0)
    assert not torch.allclose(model.hidden(tokens, positions * 2), model.hidden(tokens), atol=1e-2)


def read_in_chunks(model: GPT, rows: list[Tensor], chunks: list[int]) -> list[Tensor]:
    """Every row's logits, read left-padded side by side through one cache, so many columns at a time."""
    width = sum(chunks)
    padding = torch.tensor([width - len(row) for row in rows])[:, None]
    tokens = torch.stack([torch.cat((torch.zeros(width - len(row), dtype=torch.long), row)) for row in rows])
    column = torch.arange(width)
    positions = (column - padding).clamp(min=0)
    may_look = (column >= padding)[:, None, :] & (column[:, None] >= column) | torch.eye(width, dtype=torch.bool)
    caches = [KVCache() for _ in model.blocks]
    logits = []
    for start, end in itertools.pairwise([0, *itertools.accumulate(chunks)]):
        mask = may_look[:, None, start:end, :end]
        logits.append(model.logits(model.hidden(tokens[:, start:end], positions[:, start:end], mask, caches)))
    return [row[pad:] for row, pad in zip(torch.cat(logits, dim=1), padding[:, 0].tolist(), strict=True)]


@pytest.mark.parametrize(("n_kv_head", "window"), [(1, 0), (2, 0), (4, 0), (2, 3)])
@pytest.mark.parametrize("chunks", [[7, 1, 1, 1, 1], [3, 4, 2, 1, 1], [1] * 11, [11]], ids=str)
def test_cache_and_padding_leave_logits_unchanged(n_kv_head: int, window: int, chunks: list[int]) -> None:
    model = random_model(n_kv_head=n_kv_head, window=window)
    rows = [random_tokens(length, seed=length) for length in (7, 11, 9, 5)]
    for row, logits in zip(rows, read_in_chunks(model, rows, chunks), strict=True):
        torch.testing.assert_close(logits, model(row[None])[0], atol=1e-5, rtol=0)


def test_cache_without_mask_leaves_hidden_states_unchanged() -> None:
    model, tokens = random_model(), random_tokens(3, 9)
    caches = [KVCache() for _ in model.blocks]
    hidden = [model.hidden(tokens[:, :5], caches=caches)]
    for t in range(5, 9):
        hidden.append(model.hidden(tokens[:, t : t + 1], torch.full((3, 1), t), caches=caches))
    torch.testing.assert_close(torch.cat(hidden, dim=1), model.hidden(tokens), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------- response_logprobs


def logprobs_alone(model: GPT, prompt: list[int], response: list[int]) -> Tensor:
    """Read in one row: the token before each token of the response predicts it."""
    return model(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1].log_softmax(dim=-1)


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("common", [0, 15, 16, 25])
def test_response_logprobs_are_those_of_each_row_alone(
    common: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal prompts are read once, and so is a long common beginning."""
    model, read, hidden = random_model(window=window), [], GPT.hidden
    start = random_tokens(common, seed=3).tolist()
    prompts = [start + end for end in ([1], [2, 3], [2, 3], [4, 5, 6])]
    responses = [[7, 8], [9], [3, 3, 3, 0, 0], [1]]
    alone = [logprobs_alone(model, x, y) for x, y in zip(prompts, responses, strict=True)]
    monkeypatch.setattr(GPT, "hidden", lambda gpt, x, *a, **k: read.append(x.shape) or hidden(gpt, x, *a, **k))
    together = response_logprobs(model, prompts, responses)
    assert together.shape == (4, 5, SMALL["vocab_size"])
    assert read == [*[(1, common)] * (common >= 16), (3, 3 + common * (common < 16)), (4, 4)]
    for row, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-5, rtol=0)


def test_padding_beyond_the_block_does_no_harm() -> None:
    model, prompts, responses = random_model(), [[1] * 50, [2] * 5], [[3] * 4, [4] * 50]  # of a block of 64
    together = response_logprobs(model, prompts, responses)
    for row, x, y in zip(together, prompts, responses, strict=True):
        torch.testing.assert_close(row[: len(y)], logprobs_alone(model, x, y), atol=1e-5, rtol=0)
