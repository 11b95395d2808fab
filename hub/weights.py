"""Read a Hugging Face folder for `GPT.from_pretrained`: config.json and safetensors, as the GPT names them.

Only local files are read and none is executed. What GPT does not compute is refused by name.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from errors import UserError

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM")

PARTS = {  # parts of tensor names, theirs: ours
    "embed_tokens": "embed",
    "layers": "blocks",
    "self_attn": "attn",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
}


def read_folder(folder: Path | str, block_size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of a GPTConfig, and the weights by the GPT's names.

    block_size caps the longest sequence, which config.json may set lower.
    """
    folder = Path(folder)
    shape, weights = read_shape(folder, block_size), read_weights(folder)
    if shape["tied"]:
        weights.pop("lm_head.weight", None)  # some files hold the shared matrix twice
    return shape, weights


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing; give a folder on this disk that holds a Hugging Face model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        return content
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON; download it again") from error


def refuse(folder: Path, refusals: dict[str, Any]) -> None:
    """UserError that names the first of these features that a folder has."""
    for feature, present in refusals.items():
        if present:
            raise UserError(f"{folder} has {feature}, which is not supported; choose another model")


def read_shape(folder: Path, block_size: int) -> dict[str, Any]:
    """config.json as the fields of a GPTConfig."""
    raw = read_json(folder / "config.json")
    architecture = (raw.get("architectures") or ["none"])[0]
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    refusals = {
        f"the architecture {architecture} (not {', '.join(ARCHITECTURES)})": architecture not in ARCHITECTURES,
        f"rope scaling of type {rope_type}": rope_type != "default",
        "sliding windows": raw.get("use_sliding_window"),
        f"the activation {raw.get('hidden_act')}": raw.get("hidden_act", "silu") != "silu",
        "quantized weights": raw.get("quantization_config"),
        "biases on the attention's output (attention_bias)": raw.get("attention_bias"),
        "biases in the MLP (mlp_bias)": raw.get("mlp_bias"),
    }
    refuse(folder, refusals)
    try:
        n_embd, n_head = raw["hidden_size"], raw["num_attention_heads"]
        return dict(
            vocab_size=raw["vocab_size"],
            block_size=min(block_size, raw.get("max_position_embeddings", block_size)),
            n_layer=raw["num_hidden_layers"],
            n_embd=n_embd,
            n_head=n_head,
            n_kv_head=raw.get("num_key_value_heads") or n_head,
            head_dim=raw.get("head_dim") or n_embd // n_head,
            n_hidden=raw["intermediate_size"],
            rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            qk_norm=architecture == "Qwen3ForCausalLM",
            qkv_bias=architecture == "Qwen2ForCausalLM",
            tied=raw.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'} lacks the key {error}; download it again") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that its index names, under the names of GPT."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError('reading a Hugging Face folder needs safetensors; pip install -e ".[real]"') from error
    files, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    if not files[0].is_file() and index.is_file():
        files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    weights = {}
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} is missing; download the model's safetensors files into this folder")
        try:
            with safe_open(path, framework="pt") as file:
                weights |= {our_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path} is damaged or cut short ({error}); download it again") from error
    return weights


def our_name(name: str) -> str:
    return ".".join(PARTS.get(part, part) for part in name.removeprefix("model.").split("."))


def their_name(name: str) -> str:
    back = {ours: theirs for theirs, ours in PARTS.items()}
    name = ".".join(back.get(part, part) for part in name.split("."))
    return name if name.startswith("lm_head.") else f"model.{name}"


def check_shapes(folder: Path | str, weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """UserError where the files' tensors are not those that config.json asks for."""
    for what, names in (("lack", expected.keys() - weights.keys()), ("hold unexpectedly", weights.keys() - expected)):
        if names:
            raise UserError(f"the files in {folder} {what} {', '.join(sorted(names)[:3])}; download it again")
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise UserError(f"{name} in {folder} is quantized ({tensor.dtype}); use the model's unquantized files")
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, config.json asks for {tuple(expected[name].shape)}"
            raise UserError(f"{name} in {folder} has the shape {shapes}; use the config.json of this model")
