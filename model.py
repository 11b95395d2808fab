"""A GPT in one file, shaped like Qwen3, the family both papers train.

Every block normalizes its input (RMSNorm), attends with rotary positions and grouped queries, and ends in a SwiGLU.
Options of GPTConfig make it a Qwen2, a Llama or a SmolLM2; `GPT.from_pretrained` reads their weights from disk.
With equal weights its logits equal those of `transformers` (tests/test_model.py, tests/test_hub.py).

>>> model = GPT(GPTConfig(vocab_size=10, n_layer=1, n_embd=8, n_head=2, n_kv_head=1, head_dim=4, n_hidden=16))
>>> model(torch.tensor([[1, 2, 3]])).shape
torch.Size([1, 3, 10])
"""

from dataclasses import dataclass
from pathlib import Path

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
    window: int = 0  # layers 1, 3, ... see only this many last tokens, as in Gemma 2; 0: all, as the other layers
    tied: bool = True  # the output layer is the embedding; otherwise it is a matrix of its own


Rope = tuple[Tensor, Tensor]  # cos and sin


def rope_tables(config: GPTConfig) -> Rope:
    """cos and sin of the angle position * theta^(-2i / D), both (block_size, D), float32."""
    frequency = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)  # (D / 2,)
    angles = torch.outer(torch.arange(config.block_size), frequency).repeat(1, 2)  # (block_size, D)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + D/2}) by its position's angle: x (B, T, H, D), cos and sin (1 or B, T, 1, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class KVCache:
    """The keys and values that one layer has computed so far, (B, n_kv_head, S, head_dim) each, and their positions.

    Those of a beginning that all rows share, such as worked examples, are kept once: (1, n_kv_head, P, head_dim).
    """

    def __init__(self) -> None:
        self.k = self.v = self.positions = self.beginning = None

    def share(self) -> None:
        """What is held so far, in one row, becomes the beginning of every row."""
        self.beginning, self.k, self.v = (self.k, self.v), None, None

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add keys and values of T further tokens at positions (1 or B, T), and return all S behind the beginning.

        Returns the positions of the beginning, too: (B, P + S).
        """
        positions = positions.expand(len(k), -1)
        self.k = k if self.k is None else torch.cat((self.k, k), dim=2)
        self.v = v if self.v is None else torch.cat((self.v, v), dim=2)
        before = [] if self.positions is None else [self.positions.expand(len(k), -1)]
        self.positions = torch.cat((*before, positions), dim=1)
        return self.k, self.v, self.positions

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) these rows of the batch."""
        self.k, self.v, self.positions = self.k[rows], self.v[rows], self.positions[rows]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v with grouped queries: q (B, n_head, T, D), k and v (B, n_kv_head, S, D).

    For a single query, PyTorch's CPU kernel would copy k and v for every query head. Passing the query heads that
    share a key head as its queries avoids that: it takes a third off the sampling of SmolLM2-135M.
    """
    B, n_head, T, D = q.shape
    if T == 1:
        return F.scaled_dot_product_attention(q.reshape(B, k.size(1), -1, D), k, v, mask).reshape(B, n_head, 1, D)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)


def attend_behind(beginning: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same behind a beginning that all rows share, whose keys and values are (1, n_kv_head, P, D).

    A single new token a row, T = 1, looks at one copy of it: 4 of 5 tokens are worked examples in our longest prompts.
    """
    (B, H, _, D), (first_k, first_v) = k.shape, beginning
    if q.size(2) > 1:
        k, v = (torch.cat((x.expand(B, -1, -1, -1), y), dim=2) for x, y in ((first_k, k), (first_v, v)))
        return attend(q, k, v, mask)
    q = q.reshape(B, H, -1, D)  # (B, n_kv_head, queries of a key head, D)
    first = (first_k[0] @ q.transpose(0, 1).reshape(H, -1, D).mT).mT  # (n_kv_head, B * queries, P)
    scores = torch.cat((first.reshape(H, B, -1, first.size(-1)).transpose(0, 1), q @ k.mT), dim=-1)
    scores = scores.float() * D**-0.5  # (B, n_kv_head, queries, P + S)
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    first, own = scores.softmax(dim=-1).to(v.dtype).tensor_split([first.size(-1)], dim=-1)
    y = first.transpose(0, 1).flatten(1, 2) @ first_v[0]  # (n_kv_head, B * queries, D)
    return (y.view(H, B, -1, D).transpose(0, 1) + own @ v).reshape(B, -1, 1, D)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, window: int = 0) -> None:
        super().__init__()
        self.head_dim, self.window = config.head_dim, window
        self.q_proj = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_out = nn.Identity()  # the finished keys pass through it: a place for the hooks of subspace.py

    def forward(self, x: Tensor, at: Tensor, rope: Rope, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, n_head, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, n_kv_head, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)  # (B, T, n_kv_head, head_dim)
        q, k = apply_rope(self.q_norm(q), *rope), self.k_out(apply_rope(self.k_norm(k), *rope))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, head_dim)
        k, v, keys_at = (k, v, at) if cache is None else cache.append(k, v, at)  # (B, n_kv_head, S, head_dim), (B, S)
        beginning = cache.beginning if cache else None
        if self.window:
            back = at[:, None, :, None] - keys_at[:, None, None, :]  # (1 or B, 1, T, S)
            near = (back >= 0) & (back < self.window)
            mask = near if mask is None else near & mask
        y = attend_behind(beginning, q, k, v, mask) if beginning else attend(q, k, v, mask)  # (B, n_head, T, head_dim)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, window: int) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config, window)
        self.mlp_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, at: Tensor, rope: Rope, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), at, rope, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, 0 if i % 2 else config.window) for i in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
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
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        caches: list[KVCache] | None = None,
    ) -> Tensor:
        """Hidden states before the output layer: tokens (B, T) -> (B, T, n_embd).

        positions (1 or B, T), below block_size, count from 0 by default. mask, True where a query may look, broadcasts
        to (B, n_head, T, S) and is causal by default. caches, one a layer, hold the keys and values of all earlier
        tokens; a call that adds several tokens to them must give the mask. Raises UserError if T exceeds block_size.
        """
        self.check_length(tokens.size(1))
        if positions is None:
            positions = torch.arange(tokens.size(1), device=tokens.device)[None]
        x = self.embed(tokens)  # (B, T, n_embd)
        rope = self.cos[positions].unsqueeze(2).to(x), self.sin[positions].unsqueeze(2).to(x)  # (1 or B, T, 1, D)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, positions, rope, mask, cache)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer: (..., n_embd) -> (..., vocab_size)."""
        return F.linear(hidden, self.embed.weight if self.config.tied else self.lm_head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of every next token: tokens (B, T) -> (B, T, vocab_size)."""
        return self.logits(self.hidden(tokens))


# ---------------------------------------------------------------------------------------------- reading


def pad(rows: list[list], value: float = 0) -> Tensor:
    """Rows of unequal length -> (B, longest), the value on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def read_prompts(model: GPT, prompts: list[list[int]]) -> tuple[Tensor, Tensor, list[KVCache]]:
    """Read B prompts -> the hidden state after each (B, n_embd), True where a key is not padding (B, P), the caches.

    Padding is on the right. A long beginning that all prompts share, such as worked examples, is read and kept once.
    """
    device, caches = model.device, [KVCache() for _ in model.blocks]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B,)
    tokens = pad(prompts).to(device)  # (B, P)
    position, mask, start = torch.arange(tokens.size(1), device=device), None, 0
    common = min(int((tokens == tokens[0]).all(dim=0).cumprod(dim=0).sum()), int(lengths.min()) - 1)
    if len(prompts) > 1 and common >= 16:
        start = common
        model.hidden(tokens[:1, :start], caches=caches)
        for cache in caches:
            cache.share()
        mask = position <= position[start:, None]  # (P - start, P)
    hidden = model.hidden(tokens[:, start:], position[None, start:], mask, caches)  # (B, P - start, n_embd)
    last_hidden = hidden[torch.arange(len(prompts), device=device), lengths - 1 - start]
    return last_hidden, position < lengths[:, None], caches


def select_rows(caches: list[KVCache], rows: Tensor) -> None:
    for cache in caches:
        cache.select(rows)


def response_logprobs(model: GPT, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
    """log pi(. | prompt, response_<t) for every t of every response -> (B, longest response, vocab_size), float32.

    Values beyond a row's response are arbitrary. Prompts that occur several times, as in a group, are read once.
    Raises UserError if a prompt and its response exceed block_size.
    """
    model.check_length(max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)))
    index_of = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    rows = torch.tensor([index_of[tuple(prompt)] for prompt in prompts], device=model.device)  # (B,)
    last_hidden, is_token, caches = read_prompts(model, list(map(list, index_of)))
    last_hidden, is_token = last_hidden[rows, None], is_token[rows]  # (B, 1, n_embd) predicts response token 0; (B, P)
    select_rows(caches, rows)
    inputs = pad_sequence([torch.tensor(response[:-1], dtype=torch.long) for response in responses], batch_first=True)
    T = inputs.size(1)  # the last token of the longest response predicts nothing that is wanted
    causal = torch.ones(T, T, dtype=torch.bool, device=model.device).tril()
    mask = torch.cat((is_token[:, None].expand(-1, T, -1), causal.expand(len(rows), -1, -1)), dim=2)  # (B, T, P + T)
    positions = is_token.sum(dim=1, keepdim=True) + torch.arange(T, device=model.device)  # (B, T)
    positions = positions.clamp(max=model.config.block_size - 1)  # of padding
    hidden = model.hidden(inputs.to(model.device), positions, mask[:, None], caches)  # (B, T, n_embd)
    return model.logits(torch.cat((last_hidden, hidden), dim=1)).float().log_softmax(dim=-1)
