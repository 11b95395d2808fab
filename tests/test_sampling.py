"""Sampling compared with a plain loop over single rows, without cache, padding or batch."""

import pytest
import torch
from test_model import PROMPTS, SMALL, STOP, random_model, seeded
from torch import Tensor

import sampling as sampling_module
from model import GPT
from sampling import batches, generate, next_token_probs, rows_at_once, sample

EXAMPLES = [8] * 20  # a beginning long enough to be kept once


def distribution(probs: list[float], **sampling: float) -> list[float]:
    kept = next_token_probs(torch.tensor([probs]).log(), **sampling)[0]
    return (kept / kept.sum()).tolist()


def test_temperature_raises_probabilities_to_its_inverse() -> None:
    assert distribution([0.8, 0.2], temperature=0.5) == pytest.approx([0.64 / 0.68, 0.04 / 0.68])
    assert distribution([0.8, 0.2], temperature=2.0) == pytest.approx([2 / 3, 1 / 3])
    assert distribution([0.2, 0.5, 0.3], temperature=0.0) == [0, 1, 0]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.0, "b"), (0.49, "b"), (0.51, "bd"), (0.79, "bd"), (0.81, "abd"), (0.96, "abcd"), (1.0, "abcd")],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, kept: str) -> None:
    probs = {"a": 0.15, "b": 0.5, "c": 0.05, "d": 0.3}
    expected = [p * (token in kept) / sum(map(probs.get, kept)) for token, p in probs.items()]
    assert distribution([*probs.values()], top_p=top_p) == pytest.approx(expected, abs=1e-6)


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


def write_alone(
    model: GPT, prompt: list[int], uniform: Tensor, stop: tuple[int, ...], **sampling: float
) -> tuple[list[int], list[float]]:
    """One response without cache, padding or batch: the first token whose cumulative probability exceeds u."""
    response: list[int] = []
    logprobs: list[float] = []
    for u in uniform:
        probs = next_token_probs(model(torch.tensor([prompt + response]))[:, -1], **sampling)[0]
        cdf = probs.cumsum(dim=0)
        response.append(int(torch.searchsorted(cdf, u * cdf[-1], right=True)))
        logprobs.append(float((probs / probs.sum())[response[-1]].log()))
        if response[-1] in stop:
            break
    return response, logprobs


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "top_k": 6, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize(
    "prompts",
    [PROMPTS, [[1, 2], [3, 4]], [EXAMPLES + end for end in PROMPTS], [EXAMPLES + end for end in ([1], [2])]],
    ids=["ragged", "equal", "ragged behind examples", "equal behind examples"],
)
@pytest.mark.parametrize("stop", [STOP, (3, *STOP)], ids=["one stop", "two stops"])
def test_batched_sampling_equals_a_loop_over_single_rows(
    prompts: list[list[int]], stop: tuple[int, ...], sampling: dict[str, float]
) -> None:
    model, steps, samples = random_model(seed=1).double(), 16, 5
    tokens, logprobs = sample(model, prompts, steps, stop, samples, generator=seeded(3), **sampling)
    uniform = torch.rand(steps, len(prompts) * samples, generator=seeded(3))
    owners = [prompt for prompt in prompts for _ in range(samples)]
    alone = [write_alone(model, p, uniform[:, i], stop, **sampling) for i, p in enumerate(owners)]
    assert tokens == [response for response, _ in alone]
    for ours, (_, theirs) in zip(logprobs, alone, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert len(set(map(len, tokens))) > 2, "the case must hold rows that stop at different times"
    assert tokens == generate(model, prompts, steps, stop, samples, generator=seeded(3), **sampling)


def test_sampled_tokens_are_those_of_earlier_versions() -> None:
    """Results in this repository depend on which token a random number draws."""
    written = generate(random_model(seed=1).double(), [[1, 2], [3]], 6, STOP, samples=4, generator=seeded(3))
    assert written == [[0], [0], [2, 2, 9, 1, 1, 7], [0], [3, 2, 7, 3, 3, 4], [1, 2, 1, 0], [5, 0], [5, 5, 0]]


def test_finished_rows_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = random_model(seed=1), 0
    hidden = model.hidden

    def counting(tokens: Tensor, *args: object, **kwargs: object) -> Tensor:
        nonlocal read
        read += tokens.size(0)
        return hidden(tokens, *args, **kwargs)

    monkeypatch.setattr(model, "hidden", counting)
    responses = generate(model, [[1, 2]], 50, STOP, samples=100, generator=seeded(0))
    assert read < 1.5 * sum(map(len, responses)) < 0.75 * 50 * 100


@pytest.mark.parametrize("temperature", [1e-40, 1e-9, 9e-4, 1e-3, 0.01])
def test_temperatures_near_zero_take_the_likeliest_token_and_are_never_nan(temperature: float) -> None:
    logits = 30 * torch.randn(20, 12, generator=seeded(0))
    logits[0, 3] = 1e30
    probs = next_token_probs(logits, temperature)
    assert probs.isfinite().all() and torch.equal(probs.argmax(-1), logits.argmax(-1))
    torch.testing.assert_close(probs.sum(-1), torch.ones(20))
    if temperature < 1e-3:
        assert torch.equal(probs, next_token_probs(logits, 0.0))


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


def test_prompts_are_sampled_as_many_at_once_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    whole = sampling_module.sample

    def counted(model: GPT, part: list, *more: object, **named: object) -> tuple:
        seen.append(len(part))
        return whole(model, part, *more, **named)

    model, prompts = random_model(seed=1), [[1], [2], [3, 4], [5], [6]]
    greedy = generate(model, prompts, 6, STOP, temperature=0)
    monkeypatch.setattr(sampling_module, "sample", counted)
    monkeypatch.setattr(sampling_module, "rows_at_once", lambda model, length: 7 if length in (7, 8) else 1)
    assert len(generate(model, prompts, 6, STOP, samples=3, generator=seeded(0))) == 15 and seen == [2, 2, 1]
    monkeypatch.setattr(sampling_module, "rows_at_once", lambda model, length: 1)
    assert generate(model, prompts, 6, STOP, temperature=0) == greedy
    assert generate(model, [], 6, STOP) == []


def test_a_batch_ends_where_other_worked_examples_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows keep for themselves what they do not share: here at most 1 token of their prompt and 6 new ones."""
    first, second = 70 * [1], 80 * [2]
    prompts = [[*first, 3], [*first, 4], first, *([*second, end] for end in (3, 4, 5, 6))]
    room = {6: 3, 7: 3}
    monkeypatch.setattr(sampling_module, "rows_at_once", lambda model, own: room.get(own, 512 * (not room)))
    assert list(map(len, batches(random_model(), prompts, 6, 1))) == [3, 3, 1]
    room.clear()  # for all of them: reading 3 * 70 tokens costs more than 6 steps, and less than 60
    assert list(map(len, batches(random_model(), prompts, 6, 1))) == [3, 4]
    assert list(map(len, batches(random_model(), prompts, 60, 1))) == [7]


def test_long_prompts_without_worked_examples_are_sampled_together() -> None:
    prompts = [[end, *90 * [1]] for end in range(9)] + [[1, *90 * [2], end] for end in range(2)]
    assert list(batches(random_model(), prompts, 24, 1)) == [prompts]


def test_caches_of_all_rows_at_once_fit_in_256_megabytes() -> None:
    model = random_model()  # 2 layers, 2 key heads of 8, float32: 256 bytes a token
    assert rows_at_once(model, 2**12) == 2**8
    assert rows_at_once(model, 2**30) == 1 and rows_at_once(model, 1) == 512
    assert rows_at_once(model.bfloat16(), 2**12) == 2**9
