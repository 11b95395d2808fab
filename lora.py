"""Low-rank adaptation, the fine-tuning of SPD and a choice for ROSD: W stays frozen, two thin matrices are learned.

    W x + (alpha / r) B A dropout(x)        A (r, in), B (out, r), r = 8, alpha = 8; B is zero at the start

>>> layer = LoRALinear(nn.Linear(2, 2, bias=False), rank=1, alpha=2.0, dropout=0.0)
>>> layer.linear.weight.data, layer.A.data = torch.eye(2), torch.tensor([[1.0, 0.0]])
>>> layer(torch.tensor([5.0, 1.0])).tolist()  # B = 0: nothing is changed yet
[5.0, 1.0]
>>> layer.B.data = torch.tensor([[0.0], [3.0]])
>>> layer(torch.tensor([5.0, 1.0])).tolist()  # (5, 1) + 2/1 B (A x) with A x = 5
[5.0, 31.0]
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class LoRALinear(nn.Module):
    """A linear layer with a low-rank adapter: x (..., in) -> (..., out), in x's dtype; A and B are float32."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.linear, self.scale, self.dropout, self.on = linear, alpha / rank, dropout, True
        device = linear.weight.device
        self.A = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)  # uniform within 1 / sqrt(in), as in peft
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if not self.on:
            return y
        adapted = F.dropout(x, self.dropout, self.training).to(self.A.dtype) @ self.A.T @ self.B.T
        return y + (self.scale * adapted).to(y.dtype)


def add_lora(model: nn.Module, rank: int = 8, alpha: float = 8.0, dropout: float = 0.05) -> list[nn.Parameter]:
    """Freeze the model, put an adapter on every attention projection, return the parameters to train."""
    model.requires_grad_(False)
    parameters = []
    for module in list(model.modules()):
        for name in TARGETS:
            if isinstance(linear := getattr(module, name, None), nn.Linear):
                lora = LoRALinear(linear, rank, alpha, dropout)
                setattr(module, name, lora)
                parameters += [lora.A, lora.B]
    return parameters


def make_trainable(
    model: nn.Module, finetune: str, rank: int, alpha: float, dropout: float = 0.0
) -> list[nn.Parameter]:
    """The parameters to train: new adapters on the frozen model ('lora'), or all its weights, made float32 ('full')."""
    if finetune == "lora":
        return add_lora(model, rank, alpha, dropout)
    return list(model.float().requires_grad_(True).parameters())


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within this context every adapter counts as zero: one model is the student outside, and the base inside."""
    adapters = [module for module in model.modules() if isinstance(module, LoRALinear)]
    before = [adapter.on for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.on = False
        yield
    finally:
        for adapter, on in zip(adapters, before, strict=True):
            adapter.on = on


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add every adapter to its frozen weight, W + (alpha / r) B A, and put the plain linear layers back.

    The sum is taken in float32 and rounded once to the weight's dtype. All parameters require gradients afterwards.
    """
    for module in list(model.modules()):
        for name in TARGETS:
            if isinstance(lora := getattr(module, name, None), LoRALinear):
                weight = lora.linear.weight
                weight.copy_(weight.to(lora.A.dtype) + lora.scale * lora.B @ lora.A)
                setattr(module, name, lora.linear)
    model.requires_grad_(True)
