"""Folders written by transformers, read back without it: equal logits, equal tokens, clear refusals."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model import GPT, GPTConfig, generate

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
FAMILIES = {
    "Qwen3": {"head_dim": 6, "rope_theta": 1_000_000.0},
    "Qwen2": {"rope_theta": 50_000.0},
    "Llama": {"head_dim": None},
}
TOKENS = torch.randint(50, (3, 40), generator=torch.Generator().manual_seed(0))


def write_model(folder: Path, family: str = "Llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A folder of transformers with random weights, its norms and biases too; returns transformers' model."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    size = changes.pop("max_shard_size", "1GB")
    config = getattr(transformers, f"{family}Config")(**SHAPE | FAMILIES[family] | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=size)
    return type(model).from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("max_shard_size", ["1GB", "5KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_equal_transformers(
    tmp_path: Path, family: str, tied: bool, max_shard_size: str
) -> None:
    theirs = write_model(tmp_path, family, tie_word_embeddings=tied, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "1GB")
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.tied == tied
    assert not ours.training
    assert ours.config.block_size == 64
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=0)
    prompts = TOKENS[:, :5]
    written = theirs.generate(prompts, max_new_tokens=12, do_sample=False, eos_token_id=[], pad_token_id=0)
    assert generate(ours, prompts.tolist(), 12, (), temperature=0) == written[:, 5:].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_files_stay_so_unless_asked(tmp_path: Path, family: str) -> None:
    model_class = type(write_model(tmp_path, family, torch.bfloat16))
    theirs = model_class.from_pretrained(tmp_path, dtype=torch.float32)
    ours = GPT.from_pretrained(tmp_path)
    assert {weight.dtype for weight in ours.state_dict().values()} == {torch.bfloat16}
    exact = GPT.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(exact(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=0)
    error = (ours(TOKENS) - exact(TOKENS)).norm() / exact(TOKENS).norm()
    assert error < 0.03


def test_loaded_models_fit_checkpoints_and_train(tmp_path: Path) -> None:
    write_model(tmp_path, "Qwen2")
    ours = GPT.from_pretrained(tmp_path, block_size=32)
    assert ours.config.block_size == len(ours.cos) == 32
    copy = GPT(ours.config)
    copy.load_state_dict(ours.state_dict())
    torch.testing.assert_close(copy(TOKENS[:, :32]), ours(TOKENS[:, :32]))
    ours(TOKENS[:, :32]).square().mean().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


def test_a_shared_matrix_may_be_written_twice(tmp_path: Path) -> None:
    write_model(tmp_path, tie_word_embeddings=True)
    before = GPT.from_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"lm_head.weight": before.embed.weight.detach().clone()}, tmp_path / "model.safetensors")
    assert torch.equal(GPT.from_pretrained(tmp_path)(TOKENS), before(TOKENS))


def test_old_and_new_spellings_of_config_mean_the_same(tmp_path: Path) -> None:
    write_model(tmp_path, "Qwen3")
    raw = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert raw["rope_parameters"]["rope_theta"] == 1_000_000.0, "the case must begin with the new spelling"
    before = GPT.from_pretrained(tmp_path)
    raw |= {"rope_theta": raw.pop("rope_parameters")["rope_theta"], "rope_scaling": None, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    assert torch.equal(GPT.from_pretrained(tmp_path)(TOKENS), before(TOKENS))


def test_checkpoints_from_before_the_options_still_load() -> None:
    old = {"vocab_size": 12, "block_size": 64, "n_layer": 2, "n_embd": 16, "n_head": 4, "n_kv_head": 2, "head_dim": 8}
    config = GPTConfig(**old, n_hidden=24, rope_theta=10_000.0, norm_eps=1e-6)
    assert (config.qk_norm, config.qkv_bias, config.tied) == (True, False, True)


# ---------------------------------------------------------------------------------------------- refusals


def refused(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(folder)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"architectures": None}, "the architecture none"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}, "rope scaling of type llama3"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling of type linear"),
        ({"use_sliding_window": True, "sliding_window": 32}, "sliding windows"),
        ({"hidden_act": "gelu"}, "the activation gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized weights"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"intermediate_size": 25}, "shape"),
        ({"num_hidden_layers": 2}, "hold unexpectedly blocks.2.attn"),
        ({"num_hidden_layers": 4}, "lack blocks.3.attn"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    write_model(tmp_path, "Llama")
    raw = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(raw | change), encoding="utf-8")
    assert named in refused(tmp_path)


def test_unused_sliding_window_is_no_reason_to_refuse(tmp_path: Path) -> None:
    write_model(tmp_path, "Qwen2", use_sliding_window=False, sliding_window=8, max_window_layers=1)
    GPT.from_pretrained(tmp_path)


def without_a_key(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del raw["hidden_size"]
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: shutil.rmtree(folder), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{", encoding="utf-8"), "config.json is not valid JSON"),
        (without_a_key, "lacks the key 'hidden_size'"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "model.safetensors is missing"),
        (
            lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
            "00002-of-00003.safetensors is missing",
        ),
        (
            lambda folder: (folder / "model-00002-of-00003.safetensors").write_bytes(
                (folder / "model-00002-of-00003.safetensors").read_bytes()[:-10]
            ),
            "00002-of-00003.safetensors is damaged or cut short",
        ),
    ],
)
def test_damaged_folders_are_refused_in_one_sentence(
    tmp_path: Path, damage: Callable[[Path], object], named: str
) -> None:
    folder = tmp_path / "model"
    write_model(folder, "Llama", max_shard_size="12KB")
    assert len(list(folder.glob("*.safetensors"))) == 3
    damage(folder)
    assert named in refused(folder)


def test_without_safetensors_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert 'pip install -e ".[real]"' in refused(tmp_path)
