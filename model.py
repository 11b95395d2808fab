"""A compact GPT in the manner of Qwen3, the family both papers train: a whole model in one file.

RMSNorm before every block, rotary positions, grouped-query attention with normalized queries and keys, SwiGLU, no
biases, tied embeddings. With equal weights its logits equal `transformers`' Qwen3ForCausalLM (tests/test_model.py).

>>> model = GPT(GPTConfig(vocab_size=10, n_layer=1, n_embd=8, n_head=2, n_kv_head=1, head_dim=4, n_hidden=16))
>>> model(torch.tensor([[1, 2, 3]])).shape
torch.Size([1, 3, 10])
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


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


class NormalizeAndScale(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * w, the gradient written out: half the time of autograd's."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, weight.dtype))
        scale = (x.pow(2).mean(dim=-1, keepdim=True) + eps).rsqrt()
        normal = x * scale
        ctx.save_for_backward(scale, normal, weight)
        return normal * weight

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        scale, normal, weight = ctx.saved_tensors
        product = grad * normal
        along = (product @ weight).unsqueeze(-1) / -weight.numel()  # what would only make x longer has no effect
        return torch.addcmul(grad * weight, normal, along).mul_(scale), product.flatten(0, -2).sum(dim=0), None


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return NormalizeAndScale.apply(x, self.weight, self.eps)
        return super().forward(x.to(torch.promote_types(x.dtype, self.weight.dtype)))


class KVCache:
    """One layer's keys and values in memory for the longest sequence, filled from the left up to `length`."""

    def __init__(self, config: GPTConfig, batch: int, max_length: int, like: Tensor) -> None:
        # each number of all keys side by side: their products with one query are then twice as fast
        self.keys = like.new_empty(batch, config.n_kv_head, config.head_dim, max_length)
        self.values = like.new_empty(batch, config.n_kv_head, max_length, config.head_dim)
        self.length = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, n_kv_head, T, head_dim) after what is there; return all (B, n_kv_head, S, head_dim)."""
        start, self.length = self.length, self.length + k.size(2)
        self.keys[:, :, :, start : self.length] = k.transpose(2, 3)
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, :, : self.length].transpose(2, 3), self.values[:, :, : self.length]

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) these rows of the batch."""
        self.keys, self.values = self.keys[rows], self.values[rows]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) by their position's angles; x (B, T, H, D), cos and sin (B, T, >= H, D).

    sin is negative in its first half: (x_i cos - x_{i + D/2} sin, x_{i + D/2} cos + x_i sin).
    """
    D, heads = x.size(3), x.size(2)
    return x * cos[:, :, :heads] + x.roll(D // 2, dims=-1) * sin[:, :, :heads]


Rope = tuple[Tensor, Tensor]


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.q_proj = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=False)
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
        self.k_rope = nn.Identity()  # the finished keys pass through it: a place for the hooks of subspace.py

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, head_dim)
        q = apply_rope(self.q_norm(q), *rope).transpose(1, 2)  # (B, n_head, T, head_dim)
        k = self.k_rope(apply_rope(self.k_norm(k), *rope)).transpose(1, 2)  # (B, n_kv_head, T, head_dim)
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, n_kv_head, S, head_dim)
        if T == 1:  # one token a row: plain products beat the fused kernel and need no copies of the shared heads
            q = q.reshape(B, self.n_kv_head, -1, self.head_dim)  # (B, n_kv_head, n_head / n_kv_head, head_dim)
            scores = q @ k.transpose(2, 3) * self.head_dim**-0.5  # (B, n_kv_head, n_head / n_kv_head, S)
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            y = (scores.softmax(dim=-1) @ v).reshape(B, 1, -1)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            y = y.transpose(1, 2).reshape(B, T, -1)
        return self.o_proj(y)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

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
        frequency = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        angles = torch.outer(torch.arange(config.block_size), frequency)  # (block_size, head_dim / 2)
        self.register_buffer("cos", torch.cat((angles.cos(), angles.cos()), dim=-1), persistent=False)
        self.register_buffer("sin", torch.cat((-angles.sin(), angles.sin()), dim=-1), persistent=False)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5 * module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def compile_blocks(self) -> None:
        """torch.compile, one program for all layers and another for each way they are called; hooks go unnoticed."""
        torch._dynamo.config.recompile_limit = (
            32  # prompts, single tokens, training; with a mask or one row, or without
        )
        for block in self.blocks:
            block.compile(dynamic=True)

    def make_caches(self, batch: int, max_length: int) -> list[KVCache]:
        return [KVCache(self.config, batch, max_length, like=self.embed.weight) for _ in self.blocks]

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        caches: list[KVCache] | None = None,
    ) -> Tensor:
        """Last hidden states, before the output layer: tokens (B, T) -> (B, T, n_embd).

        positions (B, T) count from 0 where not given. mask is True where a query may look, broadcast to
        (B, heads, T, S), and causal where not given. caches, one a layer, hold the keys and values of all earlier
        positions; to read several tokens into ones that are not empty, give the mask.
        """
        if positions is None:
            positions = torch.arange(tokens.size(1), device=tokens.device)[None]
        heads = (-1, -1, self.config.n_head, -1)  # written out for every head: to broadcast over them is slower
        cos, sin = (f[positions].unsqueeze(2).expand(heads).contiguous() for f in (self.cos, self.sin))
        x = self.embed(tokens)  # (B, T, n_embd)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, (cos, sin), mask, cache)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer, tied to the embedding: (..., n_embd) -> (..., vocab_size)."""
        return F.linear(hidden, self.embed.weight)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        caches: list[KVCache] | None = None,
    ) -> Tensor:
        """Logits of every next token: tokens (B, T) -> (B, T, vocab_size); the rest as for `hidden`."""
        return self.logits(self.hidden(tokens, positions, mask, caches))


def response_logprobs(model: GPT, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
    """log pi(. | prompt, response_<t) for every t of every response -> (B, longest response, vocab_size).

    Rows are padded on the right, where causal attention never looks; what lies beyond a row's response is arbitrary.
    """
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
    for row, prompt, response, length in zip(tokens, prompts, responses, lengths, strict=True):
        row[:length] = torch.tensor(prompt + response)
    first = torch.tensor([len(prompt) - 1 for prompt in prompts])  # the position that predicts response token 0
    at = (first[:, None] + torch.arange(max(map(len, responses)))).clamp(max=max(lengths) - 1)  # (B, T)
    hidden = model.hidden(tokens.to(model.device))
    hidden = hidden.gather(1, at.to(model.device).unsqueeze(-1).expand(-1, -1, hidden.size(-1)))  # (B, T, n_embd)
    return model.logits(hidden).float().log_softmax(dim=-1)


def next_token_probs(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Sampling distribution over the next token, not renormalized: logits (B, V) -> (B, V).

    top_k = 0 and top_p = 1 keep every token; temperature 0 puts everything on the likeliest.
    """
    if temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).float()
    logits = logits.float() / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], float("-inf"))
    probs = logits.softmax(dim=-1)
    if top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p  # the tokens before this one already hold top_p
        outside[:, 0] = False  # the likeliest token always stays
        probs = probs.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), 0.0)
    return probs


def generate(*args, **settings) -> list[list[int]]:
    return sample(*args, **settings)[0]


@torch.inference_mode()
def sample(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop: int,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
    """Sample responses: `samples` per prompt, side by side, each up to and with its first stop token.

    Prompts of unequal length are padded on the left and read once for all of their samples. Finished rows leave the
    batch. Row i draws its token at step t by inverting the cumulative distribution at the t-th uniform number of its
    own, so neither padding nor what is in other rows changes what it samples; the generator is always a CPU one.
    """
    if not prompts:
        return [], []
    device, longest = model.device, max(map(len, prompts))
    tokens = torch.tensor([[stop] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    real = torch.arange(longest) >= longest - torch.tensor([len(prompt) for prompt in prompts])[:, None]
    real = real.to(device)  # (prompts, longest): False on the padding
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    mask = None
    if not real.all():
        causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
        itself = torch.eye(longest, dtype=torch.bool, device=device)  # or padding would look at nothing at all
        mask = ((real[:, None] & causal) | itself)[:, None]  # (prompts, 1, longest, longest)
    caches = model.make_caches(len(prompts), longest + max_new_tokens)
    logits = model.logits(model.hidden(tokens, positions, mask, caches)[:, -1])  # (prompts, V)

    total = len(prompts) * samples
    uniform = torch.rand(max_new_tokens, total, generator=generator).to(device)
    responses = torch.full((total, max_new_tokens), stop, device=device)
    logprobs = torch.zeros(total, max_new_tokens, device=device)
    rows = torch.arange(total, device=device)  # the responses still being written; all below is about these
    parent = rows // samples
    logits, position, real = logits[parent], positions[parent, -1:], real[parent]
    for cache in caches:
        cache.select(parent)
    for t in range(max_new_tokens):
        cdf = next_token_probs(logits, temperature, top_k, top_p).cumsum(dim=-1)  # (rows, V)
        token = (cdf <= uniform[t, rows, None] * cdf[:, -1:]).sum(dim=-1).clamp(max=cdf.size(1) - 1)
        logprobs[rows, t] = (
            next_token_probs(logits, temperature, top_k, top_p).gather(1, token[:, None]) / cdf[:, -1:]
        ).log()[:, 0]
        if t > 0:
            token = token.masked_fill(responses[rows, t - 1] == stop, stop)  # finished, and still in the batch
        responses[rows, t] = token
        alive = (token != stop).nonzero()[:, 0]
        if len(alive) == 0 or t == max_new_tokens - 1:
            break
        if len(alive) < 0.8 * len(rows):
            rows, token, position, real = rows[alive], token[alive], position[alive], real[alive]
            for cache in caches:
                cache.select(alive)
        position = position + 1
        if mask is not None:
            real = F.pad(real, (0, 1), value=True)
        logits = model(token[:, None], position, None if mask is None else real[:, None, None], caches)[:, -1]
    ends = (responses == stop).long().argmax(dim=1) + 1
    finished = (responses == stop).any(dim=1)
    rows = [
        row[: end if done else None]
        for row, end, done in zip(responses.tolist(), ends.tolist(), finished.tolist(), strict=True)
    ]
    return rows, [lp[: len(row)] for lp, row in zip(logprobs.tolist(), rows, strict=True)]
