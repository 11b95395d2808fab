"""Responses of a model, sampled token by token, many side by side.

>>> [round(p, 2) for p in next_token_probs(torch.tensor([[2.0, 0.0, 1.0]]), temperature=0.5, top_k=2)[0].tolist()]
[0.88, 0.0, 0.12]
"""

import itertools
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.progress import inner_bar
from model import GPT, read_prompts, select_rows


def next_token_probs(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Sampling distribution over the next token, not renormalized: logits (B, V) -> (B, V), float32.

    top_k = 0 and top_p = 1 keep every token; temperatures below 0.001 keep only the likeliest.
    """
    if temperature < 1e-3:  # a division by less can overflow, and would leave no other token
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).float()
    logits = logits.float() / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], float("-inf"))
    probs = logits.softmax(dim=-1)
    if top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p  # the tokens before this one already reach top_p
        outside[:, 0] = False  # the likeliest token always stays
        probs = probs.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), 0.0)
    return probs


@torch.inference_mode()
def sample(
    model: GPT, prompts: list[list[int]], max_new_tokens: int, stop: tuple[int, ...], samples: int = 1,
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, generator: torch.Generator | None = None,
) -> tuple[list[list[int]], list[list[float]]]:  # fmt: skip
    """Sample responses, `samples` per prompt, side by side -> their tokens, and the log-probability of each token.

    A response ends with its first stop token. Log-probabilities are those of the sampling distribution: after
    temperature, top_k and top_p. Raises UserError if the longest prompt and max_new_tokens exceed block_size.
    Each row inverts the cumulative distribution at uniform numbers of its own: neither padding nor the other rows
    change what it samples. The generator must be a CPU generator.
    """
    if not prompts:
        return [], []
    model.check_length(max(map(len, prompts)) + max_new_tokens)
    device, total = model.device, len(prompts) * samples
    uniform = torch.rand(max_new_tokens, total, generator=generator).to(device)
    stops = torch.tensor(stop, device=device)
    tokens = torch.full((total, max_new_tokens), -1, device=device)
    logprobs = torch.zeros(total, max_new_tokens, device=device)

    last_hidden, is_token, caches = read_prompts(model, prompts)
    rows = torch.arange(total, device=device)  # the responses that are not finished
    logits, is_token = model.logits(last_hidden)[rows // samples], is_token[rows // samples]  # (rows, V), (rows, P)
    position, padded = is_token.sum(dim=1, keepdim=True), not is_token.all()  # (rows, 1)
    select_rows(caches, rows // samples)
    for t in range(max_new_tokens):
        probs = next_token_probs(logits, temperature, top_k, top_p)  # (rows, V)
        cdf = probs.cumsum(dim=-1)
        token = torch.searchsorted(cdf, uniform[t, rows, None] * cdf[:, -1:], right=True)  # (rows, 1)
        token = token.clamp(max=cdf.size(1) - 1)
        tokens[rows, t] = token[:, 0]
        logprobs[rows, t] = (probs.gather(1, token) / cdf[:, -1:]).log()[:, 0]
        going = (token != stops).all(dim=1).nonzero()[:, 0]
        if len(going) == 0 or t == max_new_tokens - 1:
            break
        if len(going) < len(rows):  # finished responses leave the batch
            rows, token, position, is_token = rows[going], token[going], position[going], is_token[going]
            select_rows(caches, going)
        is_token = F.pad(is_token, (0, 1), value=True)
        mask = is_token[:, None, None] if padded else None  # (rows, 1, 1, S)
        logits = model.logits(model.hidden(token, position, mask, caches))[:, 0]  # (rows, V)
        position = position + 1
    lengths = (tokens >= 0).sum(dim=1).tolist()
    cut = [[row[:n] for row, n in zip(rows, lengths, strict=True)] for rows in (tokens.tolist(), logprobs.tolist())]
    return cut[0], cut[1]


def generate(
    model: GPT, prompts: list[list[int]], max_new_tokens: int, stop: tuple[int, ...], samples: int = 1,
    label: str = "responses", **sampling: Any,
) -> list[list[int]]:  # fmt: skip
    """The tokens that `sample` draws, for any number of prompts: under a progress bar where that takes long."""
    parts = inner_bar(list(batches(model, prompts, max_new_tokens, samples)), label)
    return [tokens for part in parts for tokens in sample(model, part, max_new_tokens, stop, samples, **sampling)[0]]


def batches(model: GPT, prompts: list[list[int]], max_new_tokens: int, samples: int) -> Iterator[list[list[int]]]:
    """The prompts in order, as many at a time as there is room for; other worked examples may begin another batch.

    They do where that saves reading. What a batch no longer shares is read for every row, and another batch makes up to
    max_new_tokens more steps, each of which takes about as long as reading 16 tokens (SmolLM2-135M, CPU).
    """
    batch: list[list[int]] = []
    common = longest = 0  # tokens with which all prompts of the batch begin, and of the longest
    for prompt in prompts:
        if batch:
            same = sum(itertools.takewhile(bool, map(operator.eq, batch[0], prompt)))
            before, common, longest = common, min(common, same), max(longest, len(prompt))
            full = (len(batch) + 1) * samples > rows_at_once(model, longest - common + max_new_tokens)
            if full or len(batch) * (before - common) > 16 * max_new_tokens:
                yield batch
                batch = []
        if not batch:
            common = longest = len(prompt)
        batch.append(prompt)
    if batch:
        yield batch


def rows_at_once(model: GPT, length: int) -> int:
    """How many responses to write side by side: their caches take at most 256 MB, on a GPU a quarter of its memory."""
    shape, weight = model.config, model.embed.weight
    row = 2 * shape.n_layer * shape.n_kv_head * shape.head_dim * length * weight.element_size()  # bytes
    room = torch.cuda.get_device_properties(weight.device).total_memory // 4 if weight.is_cuda else 256 << 20
    return max(1, min(512, room // row))  # more than 512 are no faster on a CPU
