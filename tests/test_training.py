"""The loops end to end, on a model so small that a step takes milliseconds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

import evaluate
import runs
import train_rosd
import train_spd
from data.tokenizer import VOCAB_SIZE
from model import GPT, GPTConfig

SMALL = ["--batch", "4", "--group", "4", "--eval-problems", "2", "--eval-samples", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base") / "base.pt"
    shape = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_kv_head": 1, "head_dim": 8, "n_hidden": 32}
    runs.save_checkpoint(path, GPT(GPTConfig(VOCAB_SIZE, **shape)))
    return str(path)


@pytest.fixture(autouse=True)
def short_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "BUDGET", 8)  # tokens, of answers nobody counts


def metrics(out: Path) -> list[str]:
    return next(out.glob("*/metrics.jsonl")).read_text().splitlines()


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(next(out.glob("*/model.pt")), weights_only=True)["model"]


SHIPPED = str(runs.BASE_CHECKPOINT)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--method", "sdpo"),
        ("--method", "opsd"),
        ("--method", "grpo", "--updates", "2"),
        ("--mask", "whole"),
        ("--mask", "oracle"),
        ("--context", "peer"),
        ("--context", "both", "--peer", "first", "--ema", "0.1", "--top-k", "5", "--alpha", "0"),
    ],
    ids=" ".join,
)
def test_every_method_and_ablation_learns_something_and_leaves_its_files(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    config = runs.parse_config(
        train_rosd.Config, "", [*SMALL, "--steps", "2", "--no-baseline", "--out", str(tmp_path), *flags]
    )
    result = train_rosd.train(config)
    before = torch.load(SHIPPED, weights_only=True)["model"]
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(tmp_path).items())
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "model.pt", "results.json"]
    stored = json.loads((folder / "results.json").read_text())
    assert stored["config"]["seed"] == 0 and stored["commit"] and stored["torch"] and stored["seconds"] > 0
    assert set(stored["after"]) == {"add", "sub", "mul", "mix", "long"} and result["name"] == folder.name
    assert [json.loads(line)["step"] for line in metrics(tmp_path)] == [0, 1]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        argv = [*SMALL, "--steps", "2", "--seed", seed, "--no-baseline", "--out", str(tmp_path / name)]
        train_rosd.train(runs.parse_config(train_rosd.Config, "", argv))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")
    pairs = zip(weights(tmp_path / "a").values(), weights(tmp_path / "b").values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


SPD_SMALL = ["--prompts", "16", "--batch", "8", "--calibration-size", "8"]
SPD_SMALL += ["--eval-problems", "2", "--eval-samples", "2", "--threads", "1"]


@pytest.mark.parametrize(
    ("script", "flags", "saved"),
    [(train_rosd, [*SMALL, "--steps", "6"], "metrics.jsonl"), (train_spd, [*SPD_SMALL, "--epochs", "5"], "state.pt")],
    ids=["rosd", "spd"],
)
def test_a_killed_run_resumes_to_the_very_same_metrics(
    script: ModuleType, flags: list[str], saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*more: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train", *flags, "--no-baseline", "--out", *more])
        script.main()

    threads = torch.get_num_threads()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(str(whole))
    command = [sys.executable, script.__file__, *flags, "--no-baseline", "--out", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(killed.glob(f"*/{saved}")) and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(killed.glob("*/model.pt"))
    run(str(killed), "--resume")
    torch.set_num_threads(threads)
    assert metrics(killed) == metrics(whole)
    pairs = zip(weights(killed).values(), weights(whole).values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_resuming_with_other_settings_is_refused(base: str, tmp_path: Path) -> None:
    config = runs.parse_config(train_rosd.Config, "", [*SMALL, "--steps", "2", "--resume", "--out", str(tmp_path)])
    folder = runs.make_folder(tmp_path / runs.run_name(config))
    model, _ = runs.load_checkpoint(base)
    runs.save_checkpoint(folder / "state.pt", model, settings={"steps": 99})
    with pytest.raises(runs.UserError, match="steps"):
        train_rosd.train(config)


def corrupt(path: Path) -> Path:
    path.write_bytes(b"not a checkpoint")
    return path


def truncated(path: Path) -> Path:
    path.write_bytes(Path(SHIPPED).read_bytes()[:1000])
    return path


def other_vocabulary(path: Path) -> Path:
    runs.save_checkpoint(path, GPT(GPTConfig(7, n_layer=1, n_embd=8, n_head=1, n_kv_head=1, head_dim=4, n_hidden=8)))
    return path


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (["--method", "foo"], "--method"),
        (["--alpha", "3"], "--alpha"),
        (["--steps", "0"], "--steps"),
        (["--nonsense"], "--nonsense"),
        (["--base", "/nowhere/base.pt"], "/nowhere/base.pt"),
        (["--base", corrupt], "damaged"),
        (["--base", truncated], "damaged"),
        (["--base", other_vocabulary], "vocabulary"),
        (["--device", "toaster"], "toaster"),
    ],
    ids=lambda value: "",
)
@pytest.mark.parametrize("script", [train_rosd, train_spd], ids=lambda module: module.__name__)
def test_bad_input_gets_one_sentence_and_leaves_nothing(
    script: ModuleType,
    flags: list,
    cause: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if script is train_spd and flags[0] in ("--alpha", "--steps"):
        flags = ["--prompts", "0"]
        cause = "--prompts"
    flags = [str(flag(tmp_path / "bad.pt")) if callable(flag) else flag for flag in flags]
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(tmp_path / "out"), *flags])
    with pytest.raises(SystemExit) as stop:
        runs.run_script(script.main)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and cause in printed.err and len(printed.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_shipped_base_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert runs.load_checkpoint(train_rosd.Config().base)[0].config.n_layer == 4
    with pytest.raises(runs.UserError, match="does not know the domain gap"):
        runs.check_world(train_rosd.Config().base, "gap")


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(runs.UserError, match="choose another folder"):
        runs.make_folder(tmp_path / "out" / "run")


def test_a_failed_write_leaves_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    runs.write_json(path, {"good": 1})
    with pytest.raises(runs.UserError, match="intact"), runs.replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert json.loads(path.read_text()) == {"good": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--method", "psr"),
        ("--method", "ssd", "--top-k", "3", "--finetune", "full", "--completion-only"),
        ("--loss", "full", "--layers", "paper", "--coordinate", "rope", "--project", "k", "--rounds", "2"),
        ("--subspace", "random", "--rank", "energy:0.9", "--coordinate", "head", "--calibration-domain", "sub", "mul"),
    ],
    ids=" ".join,
)
def test_spd_and_its_ablations_run_and_leave_their_files(flags: tuple[str, ...], tmp_path: Path) -> None:
    small = [*SPD_SMALL, "--epochs", "1", "--no-baseline", "--out", str(tmp_path)]
    result = train_spd.train(runs.parse_config(train_spd.Config, "", [*small, *flags]))
    stored = json.loads(next(tmp_path.glob("*/results.json")).read_text())
    assert stored["after"] == result["after"] and set(stored["after"]) == {"add", "sub", "mul", "mix", "long"}
