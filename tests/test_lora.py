"""Adapters: their start, their shared base, their merging in float32 and bfloat16, and ROSD with them."""

import dataclasses
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Letters, file_of, stopped_run, train
from test_hub import write_model
from test_model import random_model, random_tokens
from torch import Tensor

import train_rosd
from harness import files
from lora import TARGETS, LoRALinear, merge_lora, trainable_copy
from model import GPT

LORA = ("--finetune", "lora", "--learning-rate", "0.1")
TOKENS = random_tokens(2, 10)
both_dtypes = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=["float32", "bfloat16"]
)


def base_and_student(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[GPT, GPT, list[Tensor]]:
    """A base with biases, and a student with random adapters on it."""
    base = random_model(qkv_bias=True, qk_norm=False).to(dtype).eval()
    student, parameters = trainable_copy(base, "lora", rank=2, alpha=4.0, **settings)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.3)
    return base, student, parameters


# ---------------------------------------------------------------------------------------------- the copy


def test_first_adapter_weights_are_distributed_as_in_peft() -> None:
    layer = LoRALinear(torch.nn.Linear(100, 7), rank=50, alpha=1.0, dropout=0.0)
    assert layer.A.abs().max() <= 0.1
    assert layer.A.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.05)
    assert not layer.B.any()


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_student_starts_as_the_base_and_only_its_parameters_learn(finetune: str) -> None:
    base = random_model().eval()
    student, parameters = trainable_copy(base, finetune, rank=2)
    assert torch.equal(student(TOKENS), base(TOKENS))
    trainable = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    adapters = {f"blocks.{i}.attn.{name}.{part}" for i in range(2) for name in TARGETS for part in "AB"}
    assert trainable == (adapters if finetune == "lora" else {name for name, _ in base.named_parameters()})
    assert len(parameters) == len(trainable) and {p.dtype for p in parameters} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_student_shares_the_frozen_weights_with_adapters_and_copies_them_without() -> None:
    base = random_model()
    weights = {parameter.data_ptr() for parameter in base.parameters()}
    lora, adapters = trainable_copy(base, "lora")
    assert {p.data_ptr() for p in lora.parameters()} - {p.data_ptr() for p in adapters} == weights
    assert not {p.data_ptr() for p in trainable_copy(base, "full")[0].parameters()} & weights


@both_dtypes
def test_adapted_layer_adds_the_scaled_product_of_its_matrices(dtype: torch.dtype, tolerance: float) -> None:
    _, student, _ = base_and_student(dtype)
    layer, x = student.blocks[0].attn.q_proj, torch.randn(3, 16).to(dtype)
    expected = layer.linear(x).float() + 4.0 / 2 * x.float() @ (layer.B @ layer.A).T
    assert layer(x).dtype == dtype
    assert (layer(x).float() - expected).norm() < tolerance * expected.norm()


def test_dropout_acts_on_the_adapters_input_while_training_alone() -> None:
    base, student, _ = base_and_student(dropout=1.0)
    assert (student(TOKENS) - base(TOKENS)).abs().max() > 0.1
    torch.testing.assert_close(student.train()(TOKENS), base(TOKENS))


# ---------------------------------------------------------------------------------------------- training, merging


@both_dtypes
def test_neither_training_nor_merging_changes_the_base(dtype: torch.dtype, tolerance: float) -> None:
    base, student, parameters = base_and_student(dtype)
    before, logits = deepcopy(base.state_dict()), base(TOKENS)
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    teacher = base(TOKENS).float().softmax(dim=-1)
    torch.nn.functional.cross_entropy(student(TOKENS).float().mT, teacher.mT).backward()
    optimizer.step()
    assert torch.equal(base(TOKENS), logits)
    merge_lora(student)
    assert torch.equal(base(TOKENS), logits)
    assert all(map(torch.equal, base.state_dict().values(), before.values()))


@both_dtypes
def test_merging_leaves_the_logits_and_plain_layers_of_the_same_dtype(dtype: torch.dtype, tolerance: float) -> None:
    base, student, _ = base_and_student(dtype)
    adapted = student(TOKENS).float()
    merge_lora(student)
    assert (student(TOKENS).float() - adapted).norm() < tolerance * adapted.norm()
    assert {n: w.dtype for n, w in student.state_dict().items()} == {n: w.dtype for n, w in base.state_dict().items()}


# ---------------------------------------------------------------------------------------------- ROSD with adapters


@pytest.mark.parametrize("reflector", ["base", "student"])
def test_teacher_is_the_base_without_adapters_and_the_reflector_has_them_if_it_is_the_student(
    reflector: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, tokens, teachers, reflectors = files.load_checkpoint(base), torch.arange(12).view(2, 6), [], []
    method, write = train_rosd.METHODS["rosd"], train_rosd.write_reflections

    def loss(student: GPT, teacher: GPT, *rest: Any) -> Tensor:
        teachers.append(torch.equal(teacher(tokens), start(tokens)))
        return method.loss(student, teacher, *rest)

    def reflect(model: GPT, *rest: Any) -> Any:
        reflectors.append(torch.equal(model(tokens), start(tokens)))
        return write(model, *rest)

    monkeypatch.setitem(train_rosd.METHODS, "rosd", dataclasses.replace(method, loss=loss))
    monkeypatch.setattr(train_rosd, "write_reflections", reflect)
    train(train_rosd, base, tmp_path, *LORA, "--reflector", reflector, "--batch", "6", reflect_temperature=1.0)
    assert teachers == [True, True]  # the second is after an update
    assert reflectors == [True, reflector == "base"]


def test_state_holds_no_weight_of_the_base(base: str, tmp_path: Path) -> None:
    stopped_run(base, tmp_path, *LORA)
    parts = torch.load(file_of(tmp_path, "state.pt"), weights_only=True)["parts"]
    expected = [parameter.shape for parameter in trainable_copy(files.load_checkpoint(base))[1]]
    assert set(parts) == {"student", "optimizer"}
    assert [tensor.shape for tensor in parts["student"].values()] == expected
    assert len(parts["optimizer"]["state"]) == len(expected)


@both_dtypes
def test_the_model_that_is_left_is_a_plain_one_with_the_students_logits(
    dtype: torch.dtype, tolerance: float, letters: Letters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)  # the folder's dtype is kept
    write_model(tmp_path / "base", "Qwen3", dtype, vocab_size=letters.vocab_size)
    tokens, seen = torch.arange(12).view(2, 6), []

    def merge(student: GPT) -> None:
        seen.append(student(tokens).float())
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
