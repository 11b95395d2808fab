"""The machine a run is on: its device and number format, and trainings that run beside each other."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import file_of, train

import train_rosd
from errors import UserError
from harness import device, files
from model import GPT


def test_auto_takes_the_best_device(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = lambda count, device: type("Tensor", (), {"device": torch.device(device)})  # noqa: E731
    monkeypatch.setattr(device.torch, "zeros", zeros)
    for cuda, mps, best in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert device.pick_device("auto").type == best and device.pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("slow", [True, False])
def test_without_bfloat16_units_a_folder_is_computed_and_saved_in_float32(
    slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("safetensors")
    from test_hub import write_model

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: not slow)
    write_model(tmp_path, "Qwen3", vocab_size=64)
    about = json.loads(files.read_text(tmp_path / "config.json")) | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    files.write_json(tmp_path / "config.json", about)
    model = files.load_checkpoint(tmp_path)
    computed = torch.float32 if slow else torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {computed}
    assert files.provenance(model)["dtype"] == str(computed).removeprefix("torch.")
    files.save_model(tmp_path, model, tmp_path)
    saved = {"dtype": str(computed)[6:], "torch_dtype": str(computed)[6:]}  # as it was trained and tested
    assert json.loads(files.read_text(tmp_path / "model" / "config.json")) == about | saved
    assert {p.dtype for p in GPT.from_pretrained(tmp_path / "model").parameters()} == {computed}


def test_results_say_what_computed_them(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    train(train_rosd, base, tmp_path / "out", "--steps", "1")
    results = json.loads(files.read_text(file_of(tmp_path / "out", "results.json")))
    assert {"peak_memory_mb": None, "dtype": "float32", "device": "cpu"}.items() <= results.items()
    assert results["torch"] == torch.__version__ and results["threads"] == torch.get_num_threads()


# ---------------------------------------------------------------------------------------------- side by side


def both(config: int) -> dict:
    """A stand-in for a training."""
    if config < 0:
        raise UserError("no such training")
    return {"config": config, "beside": device.trainings(), "number": device.multiprocessing.current_process().name}


def test_trainings_side_by_side_give_their_results_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(device, "pick_device", lambda name: torch.device("cpu"))
    configs = [type("Config", (int,), {"device": "cpu"})(0), 1, 2]
    results = device.train_all(both, configs)
    assert [result["config"] for result in results] == [0, 1, 2]
    assert [result["beside"] for result in results] == [2, 2, 1] and results[1]["number"] == "training-1"
    with pytest.raises(UserError, match="no such training"):
        device.train_side_by_side(both, [1, -1])
    assert device.trainings() == 1 and not device.multiprocessing.active_children()
