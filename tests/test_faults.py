"""What goes wrong outside the mathematics: every fault that was found once, as the kind that it is."""

import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import (
    ROSD,
    SPD,
    Letters,
    both_scripts,
    file_of,
    sentence,
    settings,
    tiny_gpt,
    train,
)

import subspace
import train_rosd
import train_spd
from data import Verdict, load_task
from errors import UserError
from harness import files, parallel
from harness.cli import run_script
from harness.run import Run, run_name
from model import GPT

# ---------------------------------------------------------------------------------------------- text


def calls_without_encoding(path: Path) -> list[int]:
    """Lines that open text files in whatever encoding the machine has."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        method = isinstance(node.func, ast.Attribute)
        owner = node.func.value.id if method and isinstance(node.func.value, ast.Name) else ""
        name = node.func.attr if method else getattr(node.func, "id", "")
        opened = name in ("read_text", "write_text") and method and owner != "files"
        opened |= name == "open" and owner not in ("os", "webbrowser", "Image")
        binary = any(isinstance(arg, ast.Constant) and "b" in str(arg.value) for arg in node.args if name == "open")
        if opened and not binary and "encoding" not in {keyword.arg for keyword in node.keywords}:
            lines.append(node.lineno)
    return lines


def sources() -> list[Path]:
    return [
        path for folder in (".", "data", "harness", "tools", "tests") for path in (files.ROOT / folder).glob("*.py")
    ]


def test_every_file_is_opened_with_its_encoding_named() -> None:
    assert {str(path): lines for path in sources() if (lines := calls_without_encoding(path))} == {}


def test_no_file_needs_a_signal_that_windows_lacks() -> None:
    assert [path for path in sources() if "signal.SIG" + "KILL" in files.read_text(path)] == []


def test_scripts_print_and_read_files_where_the_locale_is_not_utf_8(letters: Letters, tmp_path: Path) -> None:
    if not shutil.which("localedef"):
        pytest.skip("localedef makes the locale")
    made = ["localedef", "-c", "-i", "en_US", "-f", "CP1252", str(tmp_path / "en_US.CP1252")]
    subprocess.run(made, capture_output=True)
    files.save_checkpoint(tmp_path / "tiny.pt", tiny_gpt(load_task("arithmetic")))
    locale = {"LOCPATH": str(tmp_path), "LC_ALL": "en_US.CP1252", "PYTHONUTF8": "0"}
    command = [sys.executable, files.ROOT / "subspace.py", "--base", "tiny.pt", "--layers", "last"]
    command += ["--calibration-size", "60", "--rank", "1"]
    with (tmp_path / "printed.txt").open("wb") as printed:
        subprocess.run(command, stdout=printed, check=True, cwd=tmp_path, env={**os.environ, **locale})
    assert b"layer 2 V" in (tmp_path / "printed.txt").read_bytes()


def test_text_files_are_utf_8_with_unix_lines_in_any_locale(tmp_path: Path) -> None:
    files.write_text(tmp_path / "text", "π\n")
    assert (tmp_path / "text").read_bytes() == b"\xcf\x80\n" and files.read_text(tmp_path / "text") == "π\n"


def test_no_json_file_holds_a_nan(tmp_path: Path) -> None:
    content = {"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf}}
    files.write_json(tmp_path / "a.json", content)
    files.write_lines(tmp_path / "b.jsonl", [content])
    for name in ("a.json", "b.jsonl"):
        assert json.loads(files.read_text(tmp_path / name)) == {"a": [None, [None, 1.5]], "b": {"c": None}}


def test_results_are_json_where_the_memory_cannot_be_measured(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train(train_rosd, base, tmp_path / "out", "--steps", "1")
    assert json.loads(files.read_text(file_of(tmp_path / "out", "results.json")))["peak_memory_mb"] is None


def test_a_console_that_cannot_be_reconfigured_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", type("Notebook", (), {"write": print})())
    run_script(lambda: None)


# ---------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("value", [math.nan, math.inf])
@both_scripts
def test_a_base_with_a_number_that_is_not_finite_is_refused(
    script: ModuleType, value: float, letters: Letters, tmp_path: Path
) -> None:
    model = tiny_gpt(letters)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["blocks.0.mlp.up_proj.weight"][3, 4] = value
    torch.save({"config": vars(model.config), "model": state}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.up_proj\.weight.*not finite"):
        train(script, str(tmp_path / "bad.pt"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_with_a_number_that_is_not_finite_is_never_written(letters: Letters, tmp_path: Path) -> None:
    model = tiny_gpt(letters)
    files.save_checkpoint(tmp_path / "model.pt", model)
    before = (tmp_path / "model.pt").read_bytes()
    model.norm.weight.data[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        files.save_checkpoint(tmp_path / "model.pt", model)
    assert (tmp_path / "model.pt").read_bytes() == before


def test_a_state_with_a_number_that_is_not_finite_does_not_replace_the_last(base: str, tmp_path: Path) -> None:
    config = train_rosd.settle(settings(train_rosd, base, tmp_path / "out"))
    with Run(config, run_name(config)) as run:
        run.restore(student=run.base)
        run.save()
        before = file_of(tmp_path / "out", "state.pt").read_bytes()
        run.base.norm.weight[0] = math.inf
        with pytest.raises(UserError, match=r"student.*not finite"):
            run.save()
    assert file_of(tmp_path / "out", "state.pt").read_bytes() == before


@both_scripts
def test_a_diverging_run_ends_with_a_sentence_its_batch_and_a_healthy_state(
    script: ModuleType, base: str, tmp_path: Path
) -> None:
    more = ["--steps", "9"] if script is train_rosd else ["--epochs", "9", "--finetune", "full"]
    with pytest.raises(UserError, match=r"lower (--learning-rate|learning rate)|lower --learning-rate"):
        train(script, base, tmp_path / "out", "--learning-rate", "1e30", *more)
    for state in (tmp_path / "out").glob("*/state.pt"):
        parts = torch.load(state, weights_only=True)["parts"]
        assert all(tensor.isfinite().all() for tensor in parts["student"].values())


def test_a_gradient_that_is_not_finite_leaves_the_weights_and_names_the_batch(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "sum_gradients", lambda parameters: [p.grad.fill_(math.nan) for p in parameters])
    with pytest.raises(UserError, match=r"gradient nan; its batch is in .*bad_batch\.json"):
        train(train_rosd, base, tmp_path / "out", "--method", "opsd")
    assert json.loads(files.read_text(file_of(tmp_path / "out", "bad_batch.json")))


def test_a_step_and_a_run_that_learned_from_nothing_say_so(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(Letters, "verify", lambda self, problem, text: Verdict(False, True, None))
    train(train_rosd, base, tmp_path / "out", "--method", "sdpo", "--ema", "0.5")
    told = capsys.readouterr().err
    assert "step 0: nothing to learn from" in told and "step 1: nothing to learn from" in told
    assert "no step had anything to learn from" in told
    rows = [json.loads(line) for line in files.read_text(file_of(tmp_path / "out", "metrics.jsonl")).splitlines()]
    assert [(row["loss"], row["learned_from"]) for row in rows] == [(None, 0)] * 2
    trained, start = (files.load_checkpoint(path) for path in (file_of(tmp_path / "out", "model.pt"), base))
    assert all(map(torch.equal, trained.parameters(), start.parameters()))


# ---------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("cuda", "mps", "world", "name", "device"),
    [
        (0, True, 2, "auto", "cpu"),
        (1, False, 2, "auto", "cpu"),
        (0, False, 1, "auto", "cpu"),
        (1, True, 2, "cpu", "cpu"),
        (2, False, 2, "auto", "cuda"),
        (1, True, 1, "auto", "cuda"),
        (0, True, 1, "auto", "mps"),
        (1, False, 2, "cuda", None),
        (0, True, 2, "mps", None),
        (0, False, 1, "toaster", None),
    ],
)
def test_each_process_has_its_gpu_or_all_share_the_cpu(
    cuda: int, mps: bool, world: int, name: str, device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "WORLD", world)
    monkeypatch.setattr(parallel, "LOCAL_WORLD", world)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)

    def zeros(count: int, device: str) -> object:
        if device == "toaster":
            raise RuntimeError("Expected one of cpu, cuda, mps")
        return type("Tensor", (), {"device": torch.device(device)})

    monkeypatch.setattr(parallel.torch, "zeros", zeros)
    if device is None:
        with pytest.raises(UserError, match=name):
            parallel.start(name)
    else:
        assert parallel.start(name).type == device


def test_tests_that_train_name_the_cpu() -> None:
    assert "--device cpu" in " ".join(ROSD) and "--device cpu" in " ".join(SPD)


# ---------------------------------------------------------------------------------------------- set-up, hooks, shapes


def test_an_installation_brings_the_packages_it_needs_and_no_module_of_its_own() -> None:
    project = files.read_text(files.ROOT / "pyproject.toml")
    assert re.search(r"^packages = \[\]$", project, re.MULTILINE)
    assert re.search(r"^py-modules = \[\]$", project, re.MULTILINE)


def test_a_compiled_model_is_projected_in_every_round(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_block, fired = torch.nn.Module.compile, []

    def eager(self: torch.nn.Module, **settings: object) -> None:
        compile_block(self, backend="eager", **settings)

    monkeypatch.setattr(torch.nn.Module, "compile", eager)  # a compiler is not everywhere
    monkeypatch.setattr(train_spd, "project_kv", counted(fired, train_spd.project_kv))
    train(train_spd, base, tmp_path / "out", "--compile", "--rounds", "2", "--epochs", "1")
    assert fired == [4, 4]


def counted(calls: list[int], project: object) -> object:
    def project_and_count(model: GPT, projectors: dict, coordinate: str) -> object:
        assert all(block._compiled_call_impl is None for block in model.blocks), "its hooks might not fire"
        calls.append(len(projectors))
        return project(model, projectors, coordinate)

    return project_and_count


def test_a_hook_that_does_not_fire_is_an_error(letters: Letters) -> None:
    model, places = tiny_gpt(letters), [(0, "v"), (1, "k")]
    model.blocks[1].attn.forward = lambda x, *_: torch.zeros_like(x)  # as a compiled block, past the hooks
    tokens, projectors = torch.tensor([letters.encode("a1?")]), dict.fromkeys(places, torch.eye(16))
    with pytest.raises(RuntimeError, match="at layer 2 K did not fire"), subspace.project_kv(model, projectors):
        model(tokens)
    examples = subspace.calibration_set(letters, ("one",), subspace.Config(calibration_size=2), seed=0)
    with pytest.raises(RuntimeError, match="at layer 2 K did not fire"):
        subspace.capability_gradients(model, examples, places)


def test_what_exceeds_the_base_is_one_sentence(letters: Letters, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        run_script(lambda: tiny_gpt(letters).check_length(300))
    assert end.value.code == 2 and "block_size = 256; give another --base" in sentence(capsys)

    def broken() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_script(broken)
