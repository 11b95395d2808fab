"""The model against transformers and against itself without cache, padding or batch; sampling against a plain loop."""

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from model import GPT, GPTConfig, RMSNorm, generate, next_token_probs, response_logprobs

SMALL = {"vocab_size": 12, "block_size": 64, "n_layer": 2, "n_embd": 16, "n_head": 4, "head_dim": 8, "n_hidden": 24}
PROMPTS = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]
STOP = 0


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


# ---------------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize(
    ("n_head", "n_kv_head", "n_layer", "head_dim", "rope_theta"),
    [(2, 2, 1, 8, 10_000.0), (4, 2, 2, 4, 10_000.0), (4, 1, 3, 6, 1_000_000.0)],
)
def test_logits_equal_qwen3(n_head: int, n_kv_head: int, n_layer: int, head_dim: int, rope_theta: float) -> None:
    transformers = pytest.importorskip("transformers")
    model = random_model(
        n_head=n_head, n_kv_head=n_kv_head, n_layer=n_layer, head_dim=head_dim, rope_theta=rope_theta, norm_eps=1e-3
    )
    config = model.config
    qwen = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=config.n_hidden,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_kv_head,
            head_dim=config.head_dim,
            rope_theta=config.rope_theta,
            rms_norm_eps=config.norm_eps,
            max_position_embeddings=config.block_size,
            tie_word_embeddings=True,
            attention_bias=False,
            attn_implementation="eager",
        )
    )
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_its_gradients_equal_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, x, grad = RMSNorm(8, eps=1e-6), torch.randn(3, 5, 8, dtype=dtype, requires_grad=True), torch.randn(3, 5, 8)
    torch.nn.init.normal_(norm.weight)
    expected = torch.nn.functional.rms_norm(x.float(), (8,), norm.weight, 1e-6)
    assert torch.equal(norm(x), expected)
    with torch.no_grad():
        assert torch.equal(norm(x), expected)
    ours = torch.autograd.grad(norm(x), (x, norm.weight), grad)
    theirs = torch.autograd.grad(expected, (x, norm.weight), grad)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a, b, atol=1e-6 if dtype == torch.float32 else 1e-2)


def test_later_tokens_leave_earlier_logits_unchanged() -> None:
    model, tokens = random_model(), random_tokens(2, 10)
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % SMALL["vocab_size"]
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert ((before[:, 6:] - after[:, 6:]).abs().amax(dim=-1) > 1e-3).all()


def test_only_distances_between_positions_matter() -> None:
    model, tokens = random_model(), random_tokens(2, 10)
    positions = torch.arange(10)[None]
    torch.testing.assert_close(model(tokens), model(tokens, positions + 17), atol=1e-5, rtol=0)
    assert not torch.allclose(model(tokens), model(tokens, positions * 2), atol=1e-2)


def read_in_chunks(model: GPT, rows: list[Tensor], chunks: list[int]) -> list[Tensor]:
    """Every row's logits, read left-padded side by side through one cache, so many columns at a time."""
    width = sum(chunks)
    padding = torch.tensor([width - len(row) for row in rows])[:, None]
    tokens = torch.stack([torch.cat((torch.full((width - len(row),), STOP), row)) for row in rows])
    column = torch.arange(width)
    positions = (column - padding).clamp(min=0)
    may_look = (column >= padding)[:, None, :] & (column[:, None] >= column) | torch.eye(width, dtype=torch.bool)
    caches = model.make_caches(len(rows), width)
    logits = []
    for start, end in itertools.pairwise([0, *itertools.accumulate(chunks)]):
        mask = may_look[:, None, start:end, :end]
        logits.append(model(tokens[:, start:end], positions[:, start:end], mask, caches))
    return [row[pad:] for row, pad in zip(torch.cat(logits, dim=1), padding[:, 0].tolist(), strict=True)]


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("chunks", [[7, 1, 1, 1, 1], [3, 4, 2, 1, 1], [1] * 11, [11]], ids=str)
def test_cache_and_padding_leave_logits_unchanged(n_kv_head: int, chunks: list[int]) -> None:
    model = random_model(n_kv_head=n_kv_head)
    rows = [random_tokens(length, seed=length) for length in (7, 11, 9, 5)]
    for row, logits in zip(rows, read_in_chunks(model, rows, chunks), strict=True):
        torch.testing.assert_close(logits, model(row[None])[0], atol=1e-5, rtol=0)


def test_cache_without_mask_leaves_logits_unchanged() -> None:
    model, tokens = random_model(), random_tokens(3, 9)
    caches = model.make_caches(3, 9)
    logits = [model(tokens[:, :5], caches=caches)]
    for t in range(5, 9):
        logits.append(model(tokens[:, t : t + 1], torch.full((3, 1), t), caches=caches))
    torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens), atol=1e-5, rtol=0)


def test_response_logprobs_are_those_of_each_row_alone() -> None:
    model = random_model()
    responses = [[3, 4], [5, 6, 7, 8, STOP], [9]]
    together = response_logprobs(model, PROMPTS, responses)
    assert together.shape == (3, 5, SMALL["vocab_size"])
    for row, prompt, response in zip(together, PROMPTS, responses, strict=True):
        alone = model(torch.tensor([prompt + response]))[0].log_softmax(dim=-1)
        expected = alone[len(prompt) - 1 : -1]  # the token before each response token predicts it
        torch.testing.assert_close(row[: len(response)], expected, atol=1e-5, rtol=0)


def test_rows_of_response_logprobs_do_not_influence_one_another() -> None:
    model, row = random_model(), ([1, 2, 3], [4, 5, 6])
    prompts, responses = zip(row, ([7] * 9, [8] * 4), ([9], [10] * 15), strict=True)
    together = response_logprobs(model, list(prompts), list(responses))[0, :3]
    torch.testing.assert_close(together, response_logprobs(model, [row[0]], [row[1]])[0], atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------- sampling distribution


def distribution(probs: list[float], **sampling: float) -> list[float]:
    kept = next_token_probs(torch.tensor([probs]).log(), **sampling)[0]
    return (kept / kept.sum()).tolist()


def test_temperature_raises_probabilities_to_its_inverse() -> None:
    assert distribution([0.8, 0.2], temperature=0.5) == pytest.approx([0.64 / 0.68, 0.04 / 0.68])
    assert distribution([0.8, 0.2], temperature=2.0) == pytest.approx([2 / 3, 1 / 3])
    assert distribution([0.2, 0.5, 0.3], temperature=0.0) == [0, 1, 0]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.49, [0, 1, 0, 0]),
        (0.51, [0, 0.5 / 0.8, 0, 0.3 / 0.8]),
        (0.79, [0, 0.5 / 0.8, 0, 0.3 / 0.8]),
        (0.81, [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
        (0.96, [0.15, 0.5, 0.05, 0.3]),
        (1.0, [0.15, 0.5, 0.05, 0.3]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, expected: list[float]) -> None:
    assert distribution([0.15, 0.5, 0.05, 0.3], top_p=top_p) == pytest.approx(expected, abs=1e-6)


def test_top_k_keeps_the_k_likeliest_and_comes_before_top_p() -> None:
    probs = [0.15, 0.5, 0.05, 0.3]
    assert distribution(probs, top_k=2) == pytest.approx([0, 0.625, 0, 0.375])
    assert distribution(probs, top_k=0) == pytest.approx(probs)
    assert distribution(probs, top_k=9) == pytest.approx(probs)
    assert distribution(probs, top_k=3, top_p=0.83)[0] == 0  # 0.5 + 0.3 are 0.842 of the three, 0.8 of all


def test_every_row_has_a_distribution_of_its_own() -> None:
    logits = torch.randn(5, 12, generator=seeded(0))
    together = next_token_probs(logits, temperature=0.7, top_k=6, top_p=0.8)
    alone = torch.cat([next_token_probs(row[None], temperature=0.7, top_k=6, top_p=0.8) for row in logits])
    torch.testing.assert_close(together, alone)


# ---------------------------------------------------------------------------------------------- generate


def write_alone(model: GPT, prompt: list[int], uniform: Tensor, stop: int, **sampling: float) -> list[int]:
    """One response without cache, padding or batch: the first token whose cumulative probability exceeds u."""
    response: list[int] = []
    for u in uniform:
        cdf = next_token_probs(model(torch.tensor([prompt + response]))[:, -1], **sampling)[0].cumsum(dim=0)
        response.append(int(torch.searchsorted(cdf, u * cdf[-1], right=True)))
        if response[-1] == stop:
            break
    return response


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"temperature": 1.5, "top_k": 6, "top_p": 0.9}],
    ids=str,
)
@pytest.mark.parametrize("prompts", [PROMPTS, [[1, 2], [3, 4]]], ids=["ragged", "equal"])
def test_batched_sampling_equals_a_loop_over_single_rows(prompts: list[list[int]], sampling: dict[str, float]) -> None:
    model, steps, samples = random_model(seed=1).double(), 16, 5
    batched = generate(model, prompts, steps, STOP, samples, generator=seeded(3), **sampling)
    uniform = torch.rand(steps, len(prompts) * samples, generator=seeded(3))
    owners = [prompt for prompt in prompts for _ in range(samples)]
    assert batched == [write_alone(model, p, uniform[:, i], STOP, **sampling) for i, p in enumerate(owners)]
    assert len(set(map(len, batched))) > 2, "the case must hold rows that stop at different times"


def test_responses_end_with_their_first_stop_token() -> None:
    responses = generate(random_model(seed=1), PROMPTS, 12, STOP, samples=20, generator=seeded(0))
    assert len(responses) == 60
    assert all(STOP not in response[:-1] for response in responses)
    assert all(response[-1] == STOP or len(response) == 12 for response in responses)
    assert {response[-1] == STOP for response in responses} == {True, False}


def test_finished_rows_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = random_model(seed=1), 0
    hidden = model.hidden

    def counting(tokens: Tensor, *args: object) -> Tensor:
        nonlocal read
        read += tokens.size(0)
        return hidden(tokens, *args)

    monkeypatch.setattr(model, "hidden", counting)
    responses = generate(model, [[1, 2]], 50, STOP, samples=100, generator=seeded(0))
    assert read < 1.5 * sum(map(len, responses)) < 0.75 * 50 * 100


def test_seed_determines_the_samples() -> None:
    model = random_model()
    first, again, other = (generate(model, PROMPTS, 8, STOP, 3, generator=seeded(s)) for s in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_greedy_decoding_takes_the_likeliest_token(sampling: dict[str, float]) -> None:
    model = random_model(seed=2)
    greedy = generate(model, PROMPTS, 8, STOP, generator=seeded(0), **sampling)
    for prompt, response in zip(PROMPTS, greedy, strict=True):
        for t, token in enumerate(response):
            assert token == model(torch.tensor([prompt + response[:t]]))[0, -1].argmax()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_extreme_random_numbers_draw_no_excluded_token(monkeypatch: pytest.MonkeyPatch, u: float) -> None:
    model, prompts = random_model(), [[token] for token in range(SMALL["vocab_size"])]
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, u))
    for prompt, (token,) in zip(prompts, generate(model, prompts, 1, STOP, top_k=2), strict=True):
        assert token in model(torch.tensor([prompt]))[0, -1].topk(2).indices


def test_samples_are_distributed_as_the_softmax_says() -> None:
    model, samples = random_model(), 4000
    drawn = generate(model, [[1], [2, 3, 4]], 1, STOP, samples, generator=seeded(0))
    for i, prompt in enumerate(([1], [2, 3, 4])):
        tokens = torch.tensor(drawn[i * samples : (i + 1) * samples]).flatten()
        frequency = tokens.bincount(minlength=SMALL["vocab_size"]) / samples
        probs = model(torch.tensor([prompt]))[0, -1].softmax(dim=-1)
        torch.testing.assert_close(frequency, probs, atol=0.03, rtol=0)
        assert probs.max() > 2 / SMALL["vocab_size"], "the distribution must not be flat"


def test_compiled_blocks_write_the_same_and_share_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for the compiler, but run as they are: a compiler is not everywhere."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = random_model(seed=1, n_layer=4), random_model(seed=1, n_layer=4)
    compiled.compile_blocks()
    written = [generate(model, PROMPTS, 12, STOP, samples=4, generator=seeded(0)) for model in (plain, compiled)]
    assert written[0] == written[1]
    for model in (plain, compiled):
        response_logprobs(model.requires_grad_(True), [[1, 2], [3]], [[4, 5], [6]])[0].sum().backward()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4  # prompts, tokens, training; not times layers
