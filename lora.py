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

from copy import deepcopy

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import GPT

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class LoRALinear(nn.Module):
    """A linear layer with a low-rank adapter: x (..., in) -> (..., out), in x's dtype; A and B are float32."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.linear, self.scale, self.dropout = linear, alpha / rank, dropout
        device = linear.weight.device
        self.A = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)  # uniform within 1 / sqrt(in), as in peft
        self.train(linear.training)  # a new module is in training mode, with dropout

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        adapted = F.dropout(x, self.dropout, self.training).to(self.A.dtype) @ self.A.T @ self.B.T
        return y + (self.scale * adapted).to(y.dtype)


def trainable_copy(
    base: GPT, finetune: str = "lora", rank: int = 8, alpha: float = 8.0, dropout: float = 0.0
) -> tuple[GPT, list[nn.Parameter]]:
    """A student that starts as the base, and its parameters to train; the base itself never changes.

    'full' trains a float32 copy of all weights. 'lora' trains adapters on the attention, and shares the base's frozen
    weights instead of copying them.
    """
    if finetune == "full":
        student = deepcopy(base).float().requires_grad_(True)
        return student, list(student.parameters())
    student, parameters = deepcopy(base, {id(p): p for p in base.parameters()}), []  # the memo: share, do not copy
    student.requires_grad_(False)
    for module in list(student.modules()):
        for name in TARGETS:
            if isinstance(linear := getattr(module, name, None), nn.Linear):
                lora = LoRALinear(linear, rank, alpha, dropout)
                setattr(module, name, lora)
                parameters += [lora.A, lora.B]
    return student, parameters


@torch.no_grad()
def merge_lora(student: nn.Module) -> None:
    """Put plain linear layers with the weight W + (alpha / r) B A in the place of the adapted ones.

    The sum is taken in float32 and rounded once to the weight's dtype.
    """
    for module in list(student.modules()):
        for name in TARGETS:
            if isinstance(lora := getattr(module, name, None), LoRALinear):
                W = lora.linear.weight
                lora.linear.weight = nn.Parameter((W.to(lora.A.dtype) + lora.scale * lora.B @ lora.A).to(W.dtype))
                setattr(module, name, lora.linear)
