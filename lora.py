"""Low-rank adaptation, the fine-tuning of SPD: what a frozen layer W learns is a product of two thin matrices.

    W x + (alpha / r) B A dropout(x)        A (r, in), B (out, r), r = 8, alpha = 8; B is zero at the start

>>> layer = LoRALinear(nn.Linear(2, 2, bias=False), rank=1, alpha=2.0, dropout=0.0)
>>> layer.linear.weight.data, layer.A.data = torch.eye(2), torch.tensor([[1.0, 0.0]])
>>> layer(torch.tensor([5.0, 1.0])).tolist()  # B = 0: nothing is changed yet
[5.0, 1.0]
>>> layer.B.data = torch.tensor([[0.0], [3.0]])
>>> layer(torch.tensor([5.0, 1.0])).tolist()  # (5, 1) + 2/1 (0, 3) times A x = 5
[5.0, 31.0]
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class LoRALinear(nn.Module):
    """A linear layer with a low-rank update: x (..., in) -> (..., out)."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.linear, self.scale, self.dropout = linear, alpha / rank, dropout
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        update = F.dropout(x, self.dropout, self.training) @ self.A.T @ self.B.T
        return self.linear(x) + self.scale * update


def add_lora(model: nn.Module, rank: int = 8, alpha: float = 8.0, dropout: float = 0.05) -> list[nn.Parameter]:
    """Freeze the model, put an update on every attention projection, return the parameters to train."""
    model.requires_grad_(False)
    parameters = []
    for module in list(model.modules()):
        for name in TARGETS:
            if isinstance(getattr(module, name, None), nn.Linear):
                lora = LoRALinear(getattr(module, name), rank, alpha, dropout).to(getattr(module, name).weight.device)
                setattr(module, name, lora)
                parameters += [lora.A, lora.B]
    return parameters


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add every update to its frozen weight, W + (alpha / r) B A, and put the plain linear layers back."""
    for module in list(model.modules()):
        for name in TARGETS:
            lora = getattr(module, name, None)
            if isinstance(lora, LoRALinear):
                lora.linear.weight += lora.scale * lora.B @ lora.A
                setattr(module, name, lora.linear)
    model.requires_grad_(True)
