"""A GPT in one file, shaped like Qwen3, the family both papers train.

Every block normalizes its input (RMSNorm), attends with rotary positions and grouped queries, and ends in a SwiGLU.
Three options of GPTConfig make it a Qwen2, a Llama or a SmolLM2; `GPT.from_pretrained` reads their weights from disk.
With equal weights its logits equal those of `transformers` (tests/test_model.py, tests/test_hub.py).

>>> model = GPT(GPTConfig(vocab_size=10, n_layer=1, n_embd=8, n_head=2, n_kv_head=1, head_dim=4, n_hidden=16))
>>> model(torch.tensor([[1, 2, 3]])).shape
torch.Size([1, 3, 10])
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from errors import UserError
from hub.weights import read_shape, read_weights


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    block_size: int = 256  # longest sequence, prompt and response together
    n_layer: int = 6
    n_embd: int = 64
    n_head: int = 4
    n_kv_head: int = 2  # each key/value head serves n_head / n_kv_head query heads
    head_dim: int = 32
    n_hidden: int = 192  # width of the SwiGLU
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qk_norm: bool = True  # normalize queries and keys: Qwen3 does, Qwen2 and Llama do not
    qkv_bias: bool = False  # biases on queries, keys and values: Qwen2 has them
    tied: bool = True  # the output layer is the embedding; or else a matrix of its own, lm_head


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, (..., in) and (out, in) -> (..., out)."""
    if x.dtype == torch.bfloat16 and x.dim() == 3 and x.size(1) == 1 and bias is None:
        return (weight @ x[:, 0].T).T[:, None]  # for x W^T a CPU would first copy W into another order
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 inside; the result has weight's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        return (x * torch.rsqrt(norm.square() / x.size(-1) + self.eps)).to(self.weight.dtype) * self.weight


Rope = tuple[Tensor, Tensor]  # cos and sin
Caches = list["KVCache"]  # one per layer


class KVCache:
    """One layer's keys and values so far, (B, n_kv_head, S, head_dim) each."""

    def __init__(self) -> None:
        self.k, self.v, self.length, self.reserved = None, None, 0, False

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v (B, n_kv_head, T, head_dim) behind what is there -> all of it, (B, n_kv_head, S, head_dim)."""
        start, self.length = self.length, self.length + k.size(2)
        if self.reserved:
            self.k[:, :, start : self.length], self.v[:, :, start : self.length] = k, v
            return self.k[:, :, : self.length], self.v[:, :, : self.length]
        if start:
            k, v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        self.k, self.v = k, v
        return k, v

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) these rows of the batch."""
        self.k, self.v = self.k.index_select(0, rows), self.v.index_select(0, rows)

    def reserve(self, room: int) -> None:
        """Make room for so many more positions, to be filled in place: faster, and without gradients."""
        empty = self.k.new_empty(*self.k.shape[:2], room, self.k.size(3))
        self.k, self.v, self.reserved = torch.cat((self.k, empty), dim=2), torch.cat((self.v, empty), dim=2), True


def rope_tables(config: GPTConfig) -> Rope:
    """cos and sin of the angle position * theta^(-2i / D), both (block_size, D), float32, the sign of sin included."""
    frequency = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    angles = torch.outer(torch.arange(config.block_size), frequency)  # (block_size, D / 2)
    return torch.cat((angles.cos(), angles.cos()), dim=-1), torch.cat((-angles.sin(), angles.sin()), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) by their position's angles; x (B, T, H, D), cos and sin (1 or B, T, >= H, D).

    sin is negative in its first half: (x_i cos - x_{i + D/2} sin, x_{i + D/2} cos + x_i sin).
    """
    return torch.addcmul(x * cos[:, :, : x.size(2)], x.roll(x.size(3) // 2, dims=-1), sin[:, :, : x.size(2)])


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.q_proj = Linear(config.n_embd, config.n_head * config.head_dim, bias=config.qkv_bias)
        self.k_proj = Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=config.qkv_bias)
        self.v_proj = Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=config.qkv_bias)
        self.o_proj = Linear(config.n_head * config.head_dim, config.n_embd, bias=False)
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_out = nn.Identity()  # the finished keys pass through it: a place for the hooks of subspace.py

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, head_dim)
        q = apply_rope(self.q_norm(q), *rope).transpose(1, 2)  # (B, n_head, T, head_dim)
        k = self.k_out(apply_rope(self.k_norm(k), *rope)).transpose(1, 2)  # (B, n_kv_head, T, head_dim)
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, n_kv_head, S, head_dim)
        many = True  # a bool even where T is symbolic, as torch.compile needs
        if T == 1:  # the queries that share a key head can pass as its tokens: (B, n_kv_head, n_head / n_kv_head, ..)
            q, many = q.contiguous().view(B, self.n_kv_head, -1, self.head_dim), False
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=many and mask is None, enable_gqa=many)
        return self.o_proj(y.reshape(B, self.n_head, T, self.head_dim).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rope, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, eps=config.norm_eps)
        if not config.tied:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        for name, table in zip(("cos", "sin"), rope_tables(config), strict=True):
            self.register_buffer(name, table, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not parameter.is_meta:  # for those torch would load its compiler, for 2 s
                nn.init.normal_(parameter, std=0.02 if name == "embed.weight" else 0.5 * parameter.size(1) ** -0.5)

    @classmethod
    def from_pretrained(cls, folder: Path | str, dtype: torch.dtype | None = None, block_size: int = 4096) -> "GPT":
        """The model of a Hugging Face folder on this disk, in its config's dtype or the given one; or UserError."""
        with torch.device("meta"):  # allocates and initializes nothing
            model = cls(GPTConfig(**read_shape(folder, block_size)))
        model.load_state_dict(read_weights(folder, model.state_dict(), dtype), assign=True)
        model.cos, model.sin = rope_tables(model.config)
        return model.eval()

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def check_length(self, length: int) -> None:
        """Raise UserError if a sequence of this length does not fit."""
        if length > self.config.block_size:
            raise UserError(f"{length} tokens do not fit in block_size = {self.config.block_size}; give another --base")

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, caches: Caches | None = None
    ) -> Tensor:
        """Last hidden states, before the output layer: tokens (B, T) -> (B, T, n_embd).

        positions (B, T), below block_size, count from 0 by default. mask, True where a query may look, broadcasts to
        (B, heads, T, S) and is causal by default. caches hold the keys and values of all earlier positions; a call
        that reads several tokens into filled ones must give the mask. Raises UserError if T exceeds block_size.
        """
        self.check_length(tokens.size(1))
        if positions is None:
            positions = torch.arange(tokens.size(1), device=tokens.device)[None]
        heads = (-1, -1, self.config.n_head, -1)  # a copy for every head is faster than broadcasting over them
        x = self.embed(tokens)  # (B, T, n_embd)
        cos, sin = (f[positions].to(x).unsqueeze(2).expand(heads).contiguous() for f in (self.cos, self.sin))
        if mask is not None:
            mask = x.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))  # from here on: added to the scores
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, (cos, sin), mask, cache)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer: (..., n_embd) -> (..., vocab_size)."""
        return product(hidden, self.embed.weight if self.config.tied else self.lm_head.weight)

    def forward(self, tokens: Tensor, *args: Any, **named: Any) -> Tensor:
        """Logits of every next token: tokens (B, T) -> (B, T, vocab_size); the rest as for `hidden`."""
        return self.logits(self.hidden(tokens, *args, **named))


def read_prompts(model: GPT, prompts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor, Caches]:
    """Read prompts -> hidden state after each (B, n_embd), lengths (B, 1), True where not padding (B, P), caches."""
    caches, device, mask = [KVCache() for _ in model.blocks], model.device, None
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
    tokens = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)
    position = torch.arange(tokens.size(1), device=device)  # (P,), padding on the right, where no token looks
    shared = min(int((tokens == tokens[0]).all(dim=0).cumprod(dim=0).sum()), int(lengths.min()) - 1)
    same = shared if len(prompts) > 1 and shared >= 16 else 0  # a beginning that all share is read once, if it is long
    if same:
        model.hidden(tokens[:1, :same], caches=caches)
        for cache in caches:
            cache.select(torch.zeros_like(lengths[:, 0]))
        mask = (position <= position[same:, None])[None, None]  # (1, 1, P - same, P)
    hidden = model.hidden(tokens[:, same:], position[None, same:], mask, caches)  # (B, P - same, n_embd)
    after = hidden[torch.arange(len(prompts), device=device), lengths[:, 0] - 1 - same]
    return after, lengths, position < lengths, caches


def response_hidden(model: GPT, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
    """The hidden states that predict every token of every response -> (B, longest response, n_embd).

    Values beyond a row's response are arbitrary. Raises UserError if a prompt and response exceed block_size.
    """
    model.check_length(max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)))
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    rows = torch.tensor([numbers[tuple(prompt)] for prompt in prompts], device=model.device)  # (B,)
    last, lengths, real, caches = read_prompts(model, list(map(list, numbers)))
    first = last.index_select(0, rows)[:, None]  # (B, 1, n_embd): it predicts response token 0
    before = pad_sequence([torch.tensor(response[:-1], dtype=torch.long) for response in responses], batch_first=True)
    T = before.size(1)  # one less than the longest response, whose last token predicts nothing that is wanted
    for cache in caches:
        cache.select(rows)
    causal = torch.ones(T, T, dtype=torch.bool, device=model.device).tril().expand(len(rows), -1, -1)
    mask = torch.cat((real[rows, None].expand(-1, T, -1), causal), dim=2)[:, None]  # (B, 1, T, P + T)
    positions = (lengths[rows] + torch.arange(T, device=model.device)).clamp(max=model.config.block_size - 1)  # padding
    return torch.cat((first, model.hidden(before.to(model.device), positions, mask, caches)), dim=1)


def response_logprobs(model: GPT, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
    """log pi(. | prompt, response_<t) for every t of every response -> (B, longest response, vocab_size), float32."""
    return model.logits(response_hidden(model, prompts, responses)).float().log_softmax(dim=-1)


def next_token_probs(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Sampling distribution over the next token, not renormalized: logits (B, V) -> (B, V), float32.
    top_k = 0 and top_p = 1 keep every token; temperature 0 keeps only the likeliest.
    """
    if temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).float()
    logits = logits.to(torch.float32, memory_format=torch.contiguous_format) / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], float("-inf"))
    probs = logits.softmax(dim=-1)
    if top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p  # the tokens before this one already hold top_p
        outside[:, 0] = False  # the likeliest token always stays
        probs = probs.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), 0.0)
    return probs


@torch.inference_mode()
def sample(
    model: GPT, prompts: list[list[int]], max_new_tokens: int, stop: int | tuple[int, ...], samples: int = 1,
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, generator: torch.Generator | None = None,
) -> tuple[list[list[int]], list[list[float]]]:  # fmt: skip
    """Sample responses, `samples` per prompt, side by side -> their tokens, and the log-probability of each token.

    A response ends with its first stop token. Log-probabilities are those of the sampling distribution: after
    temperature, top_k and top_p. Raises UserError if the longest prompt and max_new_tokens exceed block_size.
    Each row inverts the cumulative distribution at uniform numbers of its own, so neither padding nor the other rows
    change what it samples. The generator must be a CPU generator.
    """
    if not prompts:
        return [], []
    device, total = model.device, len(prompts) * samples
    model.check_length(max(map(len, prompts)) + max_new_tokens)
    stops = torch.tensor([stop] if isinstance(stop, int) else stop, device=device)
    uniform = torch.rand(max_new_tokens, total, generator=generator).to(device)
    responses = torch.zeros(total, max_new_tokens, dtype=torch.long, device=device)
    chances = torch.ones(total, max_new_tokens, device=device)
    lengths = torch.ones_like(responses[:, 0])
    last, positions, real, caches = read_prompts(model, prompts)  # a length is the next position
    padded = not real.all()
    rows = torch.arange(total, device=device)  # the responses in the batch; all tensors below are about these
    parent, unfinished = rows // samples, torch.ones_like(rows, dtype=torch.bool)
    logits, positions, real = model.logits(last)[parent], positions[parent], real[parent]  # (rows, V), (rows, 1)
    for cache in caches:
        cache.select(parent)
        cache.reserve(max_new_tokens)
    for t in range(max_new_tokens):
        probs = next_token_probs(logits, temperature, top_k, top_p)  # (rows, V)
        cdf = probs.cumsum(dim=-1)
        token = torch.searchsorted(cdf, uniform[t, rows, None] * cdf[:, -1:], right=True)[:, 0]  # (rows,)
        token = token.clamp(max=cdf.size(1) - 1)
        responses[rows, t] = token
        chances[rows, t] = (probs.gather(1, token[:, None]) / cdf[:, -1:])[:, 0]
        unfinished = unfinished & (token[:, None] != stops).all(dim=1)
        alive = unfinished.nonzero()[:, 0]
        if len(alive) == 0 or t == max_new_tokens - 1:
            break
        lengths[rows] += unfinished
        if len(alive) < 0.8 * len(rows):  # finished rows leave the batch
            rows, token, positions, real, unfinished = (x[alive] for x in (rows, token, positions, real, unfinished))
            for cache in caches:
                cache.select(alive)
        real = F.pad(real, (0, 1), value=True)
        logits = model(token[:, None], positions, real[:, None, None] if padded else None, caches)[:, -1]
        positions = positions + 1
    written = list(zip(responses.tolist(), chances.log().tolist(), lengths.tolist(), strict=True))
    return [tokens[:end] for tokens, _, end in written], [logps[:end] for _, logps, end in written]


def generate(
    model: GPT, prompts: list[list[int]], max_new_tokens: int, stop: int | tuple[int, ...], samples: int = 1,
    at_once: int = 512, **sampling: Any,
) -> list[list[int]]:  # fmt: skip
    """The tokens that `sample` draws, at_once responses at a time: more take more memory and are no faster."""
    step = max(1, at_once // samples)
    parts = (prompts[i : i + step] for i in range(0, len(prompts), step))
    return [row for part in parts for row in sample(model, part, max_new_tokens, stop, samples, **sampling)[0]]
