"""Folders written by transformers, read back without it: equal logits, or a refusal in one sentence."""

import json
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hub_tokenizer import SAMPLE, TEXTS, write, write_tokenizer

from errors import UserError
from harness import files
from hub.tokenizer import Tokenizer
from model import GPT
from sampling import generate

SHAPE = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4)
SHAPE |= dict(num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5)
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


def read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


@torch.no_grad()
def differs(folder: Path) -> bool:
    """Whether dtype or logits differ from those of transformers, which decides on everything itself."""
    import transformers

    ours, theirs = GPT.from_pretrained(folder)(TOKENS), transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs = theirs.eval()(TOKENS).logits
    largest = 1e-4 if theirs.dtype == torch.float32 else 0.05 * theirs.abs().max()
    return ours.dtype != theirs.dtype or not (ours - theirs).abs().max() < largest


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        GPT.from_pretrained(folder)
    message = str(error.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------- equal


@pytest.mark.parametrize("size", ["1GB", "5KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_equal_transformers(tmp_path: Path, family: str, tied: bool, size: str) -> None:
    theirs = write_model(tmp_path, family, tie_word_embeddings=tied, max_shard_size=size)
    assert (tmp_path / "model.safetensors").exists() == (size == "1GB")
    ours = GPT.from_pretrained(tmp_path)
    assert (ours.config.tied, ours.config.block_size, ours.training) == (tied, 64, False)
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=0)
    prompts = TOKENS[:, :5]
    written = theirs.generate(prompts, max_new_tokens=12, do_sample=False, eos_token_id=[], pad_token_id=0)
    assert generate(ours, prompts.tolist(), 12, (), temperature=0) == written[:, 5:].tolist()


@pytest.mark.parametrize("named", ["bfloat16", "float32"])
@pytest.mark.parametrize("wide", ["norm", "nothing"])
def test_weights_of_any_dtype_are_cast_to_that_of_the_config(tmp_path: Path, wide: str, named: str) -> None:
    write_model(tmp_path, "Qwen3", torch.bfloat16)
    change_weights(tmp_path, lambda w: {n: x.float() if wide in n else x for n, x in w.items()})
    write(tmp_path, "config.json", read(tmp_path) | {"dtype": None, "torch_dtype": named})
    assert not differs(tmp_path)
    exact = GPT.from_pretrained(tmp_path, block_size=32, dtype=torch.float32)
    assert exact.config.block_size == len(exact.cos) == 32
    assert {x.dtype for x in exact.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("tied", [True, False])
def test_names_without_prefix_and_a_shared_matrix_written_twice_mean_the_same(tmp_path: Path, tied: bool) -> None:
    write_model(tmp_path, tie_word_embeddings=tied)
    change_weights(tmp_path, lambda w: {"lm_head.weight": w["model.embed_tokens.weight"].clone()} | w)
    assert not differs(tmp_path)
    change_weights(tmp_path, lambda w: {n.removeprefix("model."): x for n, x in w.items()})
    assert not differs(tmp_path)


ROPES = [
    {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 10_000},
    {"rope_parameters": {}, "rope_theta": 7e4},
    {"rope_parameters": None, "rope_scaling": None},
    {"rope_parameters": None, "rope_scaling": {"rope_theta": 3e5, "type": "default"}, "rope_theta": 1e4},
    {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"rope_theta": 3e5, "rope_type": "default"}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}, "rope_scaling": {"rope_type": "default"}},
]
UNUSED_WINDOW = {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}


@pytest.mark.parametrize("change", [*ROPES, UNUSED_WINDOW], ids=str)
def test_spellings_of_rope_and_an_unused_window_mean_what_they_mean_to_transformers(
    tmp_path: Path, change: dict
) -> None:
    write_model(tmp_path, "Qwen2" if change is UNUSED_WINDOW else "Llama")
    write(tmp_path, "config.json", read(tmp_path) | change)
    assert not differs(tmp_path)


def test_a_saved_model_is_readable_by_all_and_equal_in_transformers(tmp_path: Path) -> None:
    base = tmp_path / "base"
    theirs = write_model(base, "Qwen3", torch.bfloat16, vocab_size=640)
    write_tokenizer(base, "Qwen3")
    model = GPT.from_pretrained(base, dtype=torch.float32)
    files.save_model(tmp_path, model, base)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o644}
    again = type(theirs).from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS), atol=1e-4, rtol=0)
    assert Tokenizer(tmp_path / "model").encode(SAMPLE) == Tokenizer(base).encode(SAMPLE)


@pytest.mark.parametrize("name", [*files.HUB_FILES, "model.safetensors"])
def test_every_file_that_decides_what_a_base_does_is_in_its_checksum(tmp_path: Path, name: str) -> None:
    write_model(tmp_path)
    write(tmp_path, "tokenizer.json", "{}")
    before = files.checksum(tmp_path)
    write(tmp_path, "README.md", "about the model")
    assert files.checksum(tmp_path) == before
    with (tmp_path / name).open("a", encoding="utf-8") as file:
        file.write(" ")
    assert files.checksum(tmp_path) != before


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"model_type": "qwen2"}, "the architecture"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}, "rope scaling of type llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling of type linear"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "full_attention"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta"),
        ({"use_sliding_window": True, "sliding_window": 32}, "sliding windows"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layers of other types"),
        ({"hidden_act": "gelu"}, "the activation gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized weights"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": "no"}, "mlp_bias in config.json is 'no' but must be true or false"),
        ({"intermediate_size": 25}, "shape"),
        ({"num_hidden_layers": 2}, "hold unexpectedly model.layers.2."),
        ({"num_hidden_layers": 4}, "lack model.layers.3."),
        ({"num_hidden_layers": 2000}, "2000 layers"),
        ({"num_attention_heads": 0}, "num_attention_heads in config.json is 0"),
        ({"num_attention_heads": 3}, "3 heads for 2 key heads"),
        ({"dtype": "int8"}, "dtype"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    write_model(tmp_path, "Llama")
    write(tmp_path, "config.json", read(tmp_path) | change)
    assert named in refused(tmp_path)


def test_unused_sliding_window_is_no_reason_to_refuse(tmp_path: Path) -> None:
    write_model(tmp_path, "Qwen2", use_sliding_window=False, sliding_window=8, max_window_layers=1)
    assert not differs(tmp_path)


EMBED, UP, SECOND = "model.embed_tokens.weight", "layers.0.mlp.up_proj.weight", "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w | {"lm_head.weight": w[EMBED] + 1}, "another lm_head.weight"),
        (lambda w: w | {UP: w["model." + UP] + 1}, f"hold unexpectedly {UP}"),
        (lambda w: w | {EMBED: w[EMBED].log()}, "not finite"),
        (lambda w: w | {EMBED: w[EMBED].char()}, "quantized"),
        (lambda w: w | {EMBED: w[EMBED].bfloat16()}, "several dtypes"),
    ],
    ids=["tied to another", "with and without prefix", "NaN", "int8", "no dtype"],
)
def test_ambiguous_or_unreadable_weights_are_refused(tmp_path: Path, change: Callable, named: str) -> None:
    write_model(tmp_path, tie_word_embeddings=True)
    change_weights(tmp_path, change)
    if named == "several dtypes":
        write(tmp_path, "config.json", read(tmp_path) | {"dtype": None})
    assert named in refused(tmp_path)


def write_index(folder: Path, change: Callable[[dict], Any]) -> None:
    index = read(folder, "model.safetensors.index.json")
    write(folder, "model.safetensors.index.json", index | {"weight_map": change(index["weight_map"])})


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: shutil.rmtree(folder), "config.json is missing"),
        (lambda folder: write(folder, "config.json", "[" * 10**5), "config.json is not valid JSON"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / SECOND).unlink(), f"{SECOND} is missing"),
        (lambda folder: (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-10]), "damaged or cut short"),
        (lambda folder: write_index(folder, lambda shards: shards | {EMBED: "../a.safetensors"}), "weight_map"),
        (lambda folder: write_index(folder, lambda shards: shards | {EMBED: SECOND}), "other tensors"),
    ],
    ids=range(7),
)
def test_damaged_folders_are_refused_in_one_sentence(tmp_path: Path, damage: Callable, named: str) -> None:
    folder = tmp_path / "model"
    write_model(folder, "Llama", max_shard_size="12KB")
    damage(folder)
    assert named in refused(folder)


# ---------------------------------------------------------------------------------------------- mutations

VALUES = (None, True, False, 0, -1, 2, 64, 2**40, 10**400, 1e308, float("nan"), float("inf"), -1.5, 0.5, 1e-40, "", "x")
VALUES += ("640", "default", "bfloat16", [], {}, [1], {"a": 1}, {"rope_theta": 5e5}, {"type": "linear", "factor": 2.0})
# Nothing uses these, and transformers may refuse them.
IDLE = [
    "bos_token_id",
    "initializer_range",
    "max_window_layers",
    "metadata",
    "pad_token_id",
    "sliding_window",
    "use_cache",
]
IDLE += ["attention_dropout", "eos_token_id", "pretraining_tp", "transformers_version"]


def mutate(content: Any, rng: random.Random) -> Any:
    """Change one random place of a JSON value in place; returns its outermost key."""
    if not content:
        return None
    key = rng.choice(list(content) if isinstance(content, dict) else range(len(content)))
    old, kind = content[key], rng.random()
    if isinstance(old, dict | list) and old and rng.random() < 0.6:
        mutate(old, rng)
    elif kind < 0.2:
        del content[key]
    elif kind < 0.35 and isinstance(content, dict):
        other = rng.choice(list(content))
        content[key], content[other] = content[other], old
    elif kind < 0.5 and isinstance(content, dict):
        content[rng.choice([f"{key}x", "rope_theta", "rope_scaling"])] = content.pop(key)
    elif kind < 0.75 and type(old) in (int, float):
        content[key] = rng.choice([old + 1, old - 1, old * 2, -old, old / 2, float(old)])
    else:
        content[key] = rng.choice(VALUES)
    return key


def mutate_file(path: Path, rng: random.Random) -> Any:
    """Change one place of a JSON file or of a safetensors header, or one of its bytes."""
    data, start, end, key = bytearray(path.read_bytes()), 0, None, None
    if path.suffix == ".safetensors":
        start, end = 8, 8 + struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.15:
        data[rng.randrange(end or len(data))] = rng.randrange(256)
    else:
        content = json.loads(data[start:end])
        key = mutate(content, rng)
        text = json.dumps(content).encode()
        data = (struct.pack("<Q", len(text)) + text + data[end:]) if end else text
    path.write_bytes(data)
    return key


def outcome(folder: Path, name: str, key: Any, original: Path) -> str:
    """'equal' where ids or logits are those of transformers; 'idle' where only it refuses a value that nothing uses."""
    import transformers

    if name == "tokenizer.json":
        ours, theirs = Tokenizer(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        for text in (*TEXTS, ours.chat([("user", "é2")])):
            with suppress(UserError):
                assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
        return "equal"
    ours = GPT.from_pretrained(folder)(TOKENS)
    try:
        assert not differs(folder)
        return "equal"
    except AssertionError:
        raise
    except Exception:  # of many classes
        assert key in IDLE and torch.equal(ours, GPT.from_pretrained(original)(TOKENS))
        return "idle"


@pytest.mark.parametrize(
    ("name", "count"),
    [("config.json", 120), ("tokenizer.json", 120), ("model.safetensors", 120), ("model.safetensors.index.json", 60)],
)
def test_a_mutated_folder_is_refused_or_is_that_of_transformers(tmp_path: Path, name: str, count: int) -> None:
    for family in FAMILIES:
        size = "12KB" if "index" in name else "1GB"
        write_model(tmp_path / family, family, vocab_size=640, num_hidden_layers=1, max_shard_size=size)
        write_tokenizer(tmp_path / family, "Qwen3")
    found = Counter()
    for seed in range(count):
        rng, folder = random.Random(f"{name} {seed}"), tmp_path / "mutated"
        original = tmp_path / rng.choice(list(FAMILIES))
        shutil.copytree(original, folder)
        key = mutate_file(folder / name, rng)
        try:
            found[outcome(folder, name, key, original)] += 1
        except UserError as error:
            assert "\n" not in str(error)
            found["refused"] += 1
        shutil.rmtree(folder)
    print(name, dict(found))
    assert found.total() == count and found["equal"] and found["refused"]
