"""Adapters: their start, their switch, their merging, in float32 and bfloat16."""

from copy import deepcopy

import pytest
import torch
from test_model import random_model, random_tokens

from lora import LoRALinear, adapters_off, add_lora, merge_lora
from model import GPT


def adapted_model(dtype: torch.dtype = torch.float32) -> tuple[GPT, GPT]:
    """A model with biases and random adapters, and a copy of it as it was before."""
    model = random_model(qkv_bias=True, qk_norm=False).to(dtype).eval()
    before = deepcopy(model)
    for parameter in add_lora(model, rank=2, alpha=4.0):
        torch.nn.init.normal_(parameter, std=0.3)
    return model, before


def test_first_adapter_weights_are_distributed_as_in_peft() -> None:
    layer = LoRALinear(torch.nn.Linear(100, 7), rank=50, alpha=1.0, dropout=0.0)
    assert layer.A.abs().max() <= 0.1
    assert layer.A.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.05)
    assert not layer.B.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_switched_off_adapters_leave_the_base(dtype: torch.dtype) -> None:
    model, before = adapted_model(dtype)
    tokens = random_tokens(2, 10)
    adapted = model(tokens)
    with adapters_off(model):
        assert torch.equal(model(tokens), before(tokens))
        with adapters_off(model):
            pass
        assert torch.equal(model(tokens), before(tokens))
    assert torch.equal(model(tokens), adapted)
    assert (adapted - before(tokens)).abs().max() > 0.1
    assert adapted.dtype == dtype


def test_student_learns_while_its_own_base_teaches() -> None:
    model, _ = adapted_model(torch.bfloat16)
    with adapters_off(model), torch.no_grad():
        teacher = model(random_tokens(2, 10)).float().softmax(dim=-1)
    torch.nn.functional.cross_entropy(model(random_tokens(2, 10)).float().mT, teacher.mT).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if name.endswith((".A", ".B"))}
    assert {model.get_parameter(name).dtype for name in trained} == {torch.float32}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
def test_merging_leaves_the_logits_and_plain_layers(dtype: torch.dtype, tolerance: float) -> None:
    model, before = adapted_model(dtype)
    tokens = random_tokens(2, 10)
    adapted = model(tokens).float()
    merge_lora(model)
    assert (model(tokens).float() - adapted).norm() < tolerance * adapted.norm()
    assert {name: weight.dtype for name, weight in model.state_dict().items()} == {
        name: weight.dtype for name, weight in before.state_dict().items()
    }
