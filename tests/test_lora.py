"""Adapters: their start, their switch, their merging, in float32 and bfloat16, and ROSD with them."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import Letters, file_of, stopped_run, tiny_gpt, train
from test_hub import write_model
from test_model import random_model, random_tokens
from test_update import TASK, lessons_of, loss_of

import train_rosd
from harness import files
from lora import LoRALinear, adapters_off, add_lora, merge_lora
from model import GPT

LORA = ("--finetune", "lora", "--learning-rate", "0.1")


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


# ---------------------------------------------------------------------------------------------- ROSD with adapters


def test_one_set_of_weights_teaches_itself_as_a_frozen_copy_would() -> None:
    student = tiny_gpt(TASK)
    frozen = deepcopy(student).requires_grad_(False)
    trained = add_lora(student, dropout=0.0)
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.3)
    one, other = (loss_of(lessons_of(5), student, teacher, finetune="lora") for teacher in (student, frozen))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    gradients = [torch.autograd.grad(loss, trained) for loss in (one, other)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)
    assert max(gradient.abs().max() for gradient in gradients[0]) > 1e-3


@pytest.mark.parametrize("reflector", ["base", "student"])
def test_adapters_are_on_while_the_student_reflects_and_off_while_the_base_does(
    reflector: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, original = [], train_rosd.reflect.write_reflections

    def reflect(model: GPT, *args: object, **named: object) -> list[str]:
        seen.extend(module.on for module in model.modules() if isinstance(module, LoRALinear))
        return original(model, *args, **named)

    monkeypatch.setattr(train_rosd.reflect, "write_reflections", reflect)
    train(train_rosd, base, tmp_path, *LORA, "--reflector", reflector)
    assert set(seen) == {reflector == "student"}


def test_state_holds_no_weight_of_the_base(base: str, tmp_path: Path) -> None:
    stopped_run(base, tmp_path, *LORA)
    parts = torch.load(file_of(tmp_path, "state.pt"), weights_only=True)["parts"]
    expected = [parameter.shape for parameter in add_lora(files.load_checkpoint(base))]
    assert set(parts) == {"student", "optimizer"}
    assert [tensor.shape for tensor in parts["student"].values()] == expected
    assert len(parts["optimizer"]["state"]) == len(expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
def test_the_model_that_is_left_is_a_plain_one_with_the_students_logits(
    dtype: torch.dtype, tolerance: float, letters: Letters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "base", "Qwen3", dtype, vocab_size=letters.vocab_size)
    tokens, seen = torch.arange(12).view(2, 6), []

    def merge(student: GPT) -> None:
        seen.append(student(tokens).float())
        assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}
        merge_lora(student)

    monkeypatch.setattr(train_rosd, "merge_lora", merge)
    train(train_rosd, str(tmp_path / "base"), tmp_path / "out", *LORA, "--method", "opsd")
    before = GPT.from_pretrained(tmp_path / "base")
    left = GPT.from_pretrained(file_of(tmp_path / "out", "model")).state_dict()
    changed = {name for name, weight in before.state_dict().items() if not torch.equal(weight, left[name])}
    assert changed == {name for name in left if name.endswith("_proj.weight") and ".attn." in name}
    assert {weight.dtype for weight in left.values()} == {dtype}
    start = before(tokens).float()
    before.load_state_dict(left)
    assert (before(tokens).float() - seen[0]).norm() < tolerance * (seen[0] - start).norm()
