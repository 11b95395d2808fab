"""Read config.json and the weights of a Hugging Face folder as `transformers` does, for `GPT.from_pretrained`.

Only local files are read and none is executed. What GPT does not compute, or what is ambiguous, is refused.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import UserError

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
SIZES = {  # config.json: GPTConfig
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "head_dim": "head_dim",
    "intermediate_size": "n_hidden",
}
LIMITS = {int: 1 << 24, float: 1e12}  # far beyond any real model
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PARTS = {  # parts of tensor names, ours: theirs
    "embed": "embed_tokens",
    "blocks": "layers",
    "attn": "self_attn",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """The object in a file; an optional file that does not exist counts as empty."""
    if optional and not path.exists():
        return {}
    if not path.is_file():
        raise UserError(f"{path} is missing; give a folder on this disk that holds a Hugging Face model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        return content
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON; download it again") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def refuse(folder: Path, refusals: dict[str, Any]) -> None:
    """UserError that names the first of these features that a folder has."""
    for feature, present in refusals.items():
        if present:
            raise UserError(f"{folder} has {feature}, which is not supported; choose another model")


def read_value(raw: dict[str, Any], name: str, *types: type, default: Any = None) -> Any:
    """raw[name], or the default if it is missing: a bool, or a positive number of a plausible size."""
    value, kind = raw.get(name, default), types[-1]
    if type(value) not in types or (kind is not bool and not 0 < value <= LIMITS[kind]):
        given = f"is {value!r:.40}" if name in raw else "is missing"
        wanted = "true or false" if kind is bool else f"a positive {kind.__name__} up to {LIMITS[kind]:g}"
        raise UserError(f"{name} in config.json {given} but must be {wanted}; download the model again")
    return value


def read_shape(folder: Path | str, block_size: int) -> dict[str, Any]:
    """config.json as the fields of a GPTConfig; block_size caps the longest sequence, which the file may set lower."""
    folder = Path(folder)
    raw = read_json(folder / "config.json")
    family, named, layers = raw.get("model_type"), raw.get("architectures"), raw.get("layer_types")
    ropes = [raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name) is not None]
    plain = all(isinstance(rope, dict) for rope in ropes)
    rope = next(filter(None, ropes), {}) if plain else {"rope_type": ropes}  # `transformers`, too, takes the first
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    extra = sorted(set(rope) - {"rope_type", "type", "rope_theta"})
    refusals = {
        f"the architecture {named!s:.40} (not {', '.join(ARCHITECTURES.values())})": not isinstance(named, list)
        or (family, *named) not in [*ARCHITECTURES.items()],
        f"rope scaling of type {rope_type!s:.40}": rope_type != "default",
        f"the RoPE parameter {extra[:1]}": extra,
        "partial rotary embeddings": raw.get("partial_rotary_factor", 1) != 1,
        "sliding windows": read_value(raw, "use_sliding_window", bool, default=False),
        "layers of other types than full attention": layers is not None
        and layers != ["full_attention"] * read_value(raw, "num_hidden_layers", int),
        "layers of different shapes": raw.get("per_layer_config"),
        f"the activation {raw.get('hidden_act')!s:.40}": raw.get("hidden_act", "silu") != "silu",
        "quantized weights": raw.get("quantization_config"),
        "biases on the attention's output (attention_bias)": read_value(raw, "attention_bias", bool, default=False),
        "biases in the MLP (mlp_bias)": read_value(raw, "mlp_bias", bool, default=False),
    }
    refuse(folder, refusals)
    heads, width = read_value(raw, "num_attention_heads", int), read_value(raw, "hidden_size", int)
    if family == "llama" and raw.get("num_key_value_heads") is None:
        raw["num_key_value_heads"] = heads
    if family != "qwen3" and raw.get("head_dim") is None:
        raw["head_dim"] = width // heads
    shape = {ours: read_value(raw, theirs, int) for theirs, ours in SIZES.items()}
    misfits = {
        f"{shape['n_layer']} layers": shape["n_layer"] > 1000,
        f"heads of the odd size {shape['head_dim']}": shape["head_dim"] % 2,
        f"{heads} heads for {shape['n_kv_head']} key heads": heads % shape["n_kv_head"],
        f"{heads} heads for a width of {width}": family == "llama" and width % heads,
    }
    refuse(folder, misfits)
    return shape | dict(
        block_size=min(block_size, read_value(raw, "max_position_embeddings", int)),
        rope_theta=float(read_value({**raw, **rope}, "rope_theta", int, float, default=10_000.0)),
        norm_eps=read_value(raw, "rms_norm_eps", float, default=1e-6),
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        tied=read_value(raw, "tie_word_embeddings", bool, default=False),
    )


def read_weights(
    folder: Path | str, expected: dict[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """All weights under the names and of the shapes of expected, in the given dtype or else in that of config.json.

    They are in model.safetensors or in the shards that its index names.
    """
    folder = Path(folder)
    found, theirs = read_files(folder), {name: their_name(name) for name in expected}
    if not any(name.startswith("model.") for name in found):  # saved without its output layer's class
        found = {name if name.startswith("lm_head.") else f"model.{name}": x for name, x in found.items()}
    twice = None if "lm_head.weight" in expected else found.pop("lm_head.weight", None)
    names = set(theirs.values())
    for what, wrong in (("lack", names - found.keys()), ("hold unexpectedly", found.keys() - names)):
        if wrong:
            raise UserError(f"the files in {folder} {what} {', '.join(sorted(wrong)[:3])}; download it again")
    dtype, weights = dtype or choose_dtype(folder, found), {}
    for name, like in expected.items():
        tensor, what = found[theirs[name]], f"{theirs[name]} in {folder}"
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise UserError(f"{what} is quantized ({tensor.dtype}); use the model's unquantized files")
        if tensor.shape != like.shape:
            shapes = f"{tuple(tensor.shape)}, config.json asks for {tuple(like.shape)}"
            raise UserError(f"{what} has the shape {shapes}; use the config.json of this model")
        weights[name] = tensor.to(dtype, copy=True)
        if not torch.stack(weights[name].aminmax()).isfinite().all():  # much faster than to look at every number
            raise UserError(f"{what} holds a number that is not finite in {dtype}; download it again")
    if twice is not None and not torch.equal(twice.to(dtype), weights["embed.weight"]):
        raise UserError(f"{folder} has tied embeddings but also another lm_head.weight; correct its config.json")
    return weights


def read_files(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder by the names in its files."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError('reading a Hugging Face folder needs safetensors; pip install -e ".[real]"') from error
    paths, index, shards = [folder / "model.safetensors"], folder / "model.safetensors.index.json", {}
    if not paths[0].is_file() and index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(x, str) and Path(x).name == x for x in shards.values()):
            raise UserError(f"weight_map in {index} must give each tensor a file of the folder; download it again")
        paths = [folder / name for name in sorted(set(shards.values()))]
    found = {}
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing; download the model's safetensors files into this folder")
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path} is damaged or cut short ({one_line(error)}); download it again") from error
        if shards and tensors.keys() != {name for name, shard in shards.items() if shard == path.name}:
            raise UserError(f"{path} holds other tensors than {index.name} says; download it again")
        found |= tensors
    return found


def choose_dtype(folder: Path, found: dict[str, Tensor]) -> torch.dtype:
    """That of config.json, or else that of all tensors."""
    raw, dtypes = read_json(folder / "config.json"), {tensor.dtype for tensor in found.values()}
    name = raw.get("torch_dtype") if raw.get("dtype") is None else raw["dtype"]
    if name is not None and name not in list(DTYPES):
        raise UserError(f"dtype in config.json is {name!r:.40} but must be one of {', '.join(DTYPES)}; correct it")
    if name is None and len(dtypes) > 1:
        raise UserError(f"{folder} has weights of several dtypes; name one in its config.json")
    return DTYPES[name] if name else dtypes.pop()


def their_name(name: str) -> str:
    name = ".".join(PARTS.get(part, part) for part in name.split("."))
    return name if name.startswith("lm_head.") else f"model.{name}"
