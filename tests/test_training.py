"""The loops end to end, on a second task and a model so small that a step takes milliseconds."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROSD, SPD, Letters, metrics, tiny_gpt, train

import train_rosd
import train_spd
from data import load_task
from harness import files
from harness.cli import parse_config
from model import GPT

GOLDEN = {  # flags and fields: the loss of every step; a refactoring changes none of them
    "": [0.136522, 0.117224, 0.135262],
    "--mask whole": [0.136702, 0.124572, 0.135631],
    "--mask span": [0.134292, 0.140953, 0.124406],
    "--context peer": [0.184127, 0.15704, 0.154667],
    "--context both --ema 0.5": [0.186889, 0.174138, 0.157617],
    "--method sdpo": [0.179958, 0.157708, 0.157124],
    "--method opsd": [0.10323, 0.106169, 0.0770995],
    "--method grpo --updates 2": [-0.0757526, -0.119491, -0.00944037],
    "--preset released": [0.145407, 0.137395, 0.165599],
    "--finetune lora --learning-rate 0.1": [0.136522, 0.1658, 0.1188],
    "minibatches=3 temperature=0.7": [0.107163, 0.141267, 0.118621],
    "solved=drop malformed=peer --alpha 0 top_k=4": [0.3377, 0.342071, 0.30237],
}
GOLDEN_SPD = {
    "": [2.63226, 2.52886],
    "--method psr": [2.48074, 2.40479],
    "--method ssd --top-k 3 --temperature 0.5 --finetune full": [1.53361, 1.30166],
    "--coordinate rope --project k --rank 2": [1.74324, 1.6576],
}


def split_settings(text: str) -> tuple[list[str], dict]:
    """'--mask span top_k=4' -> (['--mask', 'span'], {'top_k': 4})."""
    flags = [word for word in text.split() if "=" not in word]
    pairs = (word.split("=") for word in text.split() if "=" in word)
    return flags, {name: json.loads(x) if x[0].isdigit() else x for name, x in pairs}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(next(out.glob("*/model.pt")), weights_only=True)["model"]


@pytest.mark.parametrize("text", GOLDEN)
def test_losses_of_rosd_and_its_baselines_are_those_of_earlier_versions(text: str, base: str, tmp_path: Path) -> None:
    flags, fields = split_settings(text)
    fields |= {"reflect_temperature": 1.0}
    train(train_rosd, base, tmp_path / "out", "--steps", "3", "--batch", "6", *flags, **fields)
    assert [row["loss"] for row in metrics(tmp_path / "out")] == pytest.approx(GOLDEN[text], rel=1e-3)


@pytest.mark.parametrize("flags", GOLDEN_SPD)
def test_losses_of_spd_and_its_baselines_are_those_of_earlier_versions(flags: str, base: str, tmp_path: Path) -> None:
    train(train_spd, base, tmp_path / "out", *flags.split(), lora_dropout=0.0)
    assert [row["loss"] for row in metrics(tmp_path / "out")] == pytest.approx(GOLDEN_SPD[flags], rel=1e-3)


@pytest.mark.parametrize("script", [train_rosd, train_spd], ids=lambda script: script.__name__)
def test_a_run_trains_and_leaves_its_files(script: ModuleType, base: str, letters: Letters, tmp_path: Path) -> None:
    result = train(script, base, tmp_path / "out")
    (folder,) = (tmp_path / "out").iterdir()
    of_base = ["base-before", "base-own"] if script is train_spd else ["base-before"]
    assert sorted(path.name[:-14] for path in folder.glob("base-*.json")) == of_base
    others = {path.name for path in folder.iterdir()} - {path.name for path in folder.glob("base-*.json")}
    assert others == {"metrics.jsonl", "model.pt", "results.json", ".lock"}
    before = files.load_checkpoint(base).state_dict()
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(tmp_path / "out").items())
    stored = json.loads(files.read_text(folder / "results.json"))
    assert stored["config"]["domain"] == "one" and stored["commit"] and stored["torch"] and stored["seconds"] > 0
    assert set(stored["after"]) == set(letters.domains) and "loud" in stored["after"]["two"]
    assert stored["after"] == result["after"] and result["name"] == folder.name
    assert [row["step"] for row in metrics(tmp_path / "out")] == [0, 1]


@pytest.mark.parametrize(
    "flags",
    [
        ("--context", "both", "--peer", "first", "--ema", "0.1", "--top-k", "5", "--alpha", "0"),
        ("--preset", "released", "--spoil-idea", "0.5", "--spoil-kind", "other", "--spoil-quote", "0.5"),
        ("--method", "sdpo", "--preset", "released", "--mask", "suffix", "--temperature", "0.7"),
        ("--method", "grpo", "--preset", "released", "--micro-batch", "2", "--domain", "two"),
        ("--method", "opsd", "--mask", "span", "--eval-top-p", "0.95", "--eval-temperature", "0.6"),
    ],
    ids=" ".join,
)
def test_rosd_with_other_settings_learns(flags: tuple[str, ...], base: str, tmp_path: Path) -> None:
    train(train_rosd, base, tmp_path / "out", *flags)
    assert all(row["loss"] is not None for row in metrics(tmp_path / "out"))


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "ssd", "--top-k", "3", "--finetune", "full", "--no-completion-only"),
        ("--loss", "full", "--layers", "all", "--coordinate", "rope", "--project", "k", "--rounds", "2"),
        ("--subspace", "random", "--rank", "energy:0.9", "--coordinate", "head", "--calibration-domain", "two", "one"),
    ],
    ids=" ".join,
)
def test_spd_with_other_settings_learns(flags: tuple[str, ...], base: str, tmp_path: Path) -> None:
    result = train(train_spd, base, tmp_path / "out", *flags)
    assert all(row["loss"] is not None for row in metrics(tmp_path / "out"))
    assert len(result["generation"]) == (2 if "--rounds" in flags else 1)


def test_spd_without_epochs_stops_at_the_generation(base: str, tmp_path: Path) -> None:
    result = train(train_spd, base, tmp_path / "out", "--epochs", "0", "--rounds", "2")
    assert len(result["generation"]) == 1 and result["before"] is result["after"] is None


def test_the_base_is_evaluated_once_for_all_runs_that_ask_the_same(base: str, tmp_path: Path, monkeypatch) -> None:
    evaluated = []
    evaluate_run = train_rosd.evaluate_run

    def counted(model: GPT, *arguments: object) -> dict:
        evaluated.append(model.embed.weight.requires_grad)  # a student's do
        return evaluate_run(model, *arguments)

    monkeypatch.setattr(train_rosd, "evaluate_run", counted)
    first, second = (train(train_rosd, base, tmp_path, "--method", method) for method in ("rosd", "sdpo"))
    assert first["before"] == second["before"] and evaluated == [False, True, True]
    lora = train(train_rosd, base, tmp_path / "lora", "--finetune", "lora", "--learning-rate", "0.1")
    assert lora["before"] == first["before"] != lora["after"]
    evaluated.clear()
    train(train_rosd, base, tmp_path, "--seed", "1")
    train(train_rosd, base, tmp_path, "--eval-temperature", "0.5")
    monkeypatch.setattr(files, "code_checksum", lambda: "of other code")
    train(train_rosd, base, tmp_path, "--method", "grpo")
    assert evaluated == 3 * [False, True]


def test_learning_curves_are_tested_as_often_as_asked(base: str, letters: Letters, tmp_path: Path) -> None:
    train(train_rosd, base, tmp_path / "out", "--steps", "4", "--eval-every", "2")
    rows = metrics(tmp_path / "out")
    assert ["tested" in row for row in rows] == [False, True, False, True]
    assert set(rows[1]["tested"]) == set(letters.domains)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(base: str, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        train(train_rosd, base, tmp_path / name, "--seed", seed)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")
    pairs = zip(weights(tmp_path / "a").values(), weights(tmp_path / "b").values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (train_rosd, [*ROSD, "--steps", "8"]),
        (train_rosd, [*ROSD, "--steps", "8", "--ema", "0.5"]),
        (train_rosd, [*ROSD, "--steps", "8", "--finetune", "lora", "--learning-rate", "0.1"]),
        (train_spd, [*SPD, "--domain", "mix", "--epochs", "8"]),
    ],
    ids=["rosd", "rosd with ema", "rosd with lora", "spd"],
)
def test_a_killed_run_resumes_to_the_very_same_metrics(script: ModuleType, flags: list[str], tmp_path: Path) -> None:
    base, whole, killed = tmp_path / "tiny.pt", tmp_path / "whole", tmp_path / "killed"
    files.save_checkpoint(base, tiny_gpt(load_task("arithmetic")))
    flags = [*flags, "--method", "opsd"] if script is train_rosd else flags  # the rollouts of random weights are wrong
    flags = [*flags, "--base", str(base)]

    def run(*more: str) -> None:
        threads = torch.get_num_threads()
        script.train(parse_config(script.Config, "", [*flags, *more]))
        torch.set_num_threads(threads)

    command = [sys.executable, script.__file__, *flags, "--out", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(killed.glob("*/metrics.jsonl")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not list(killed.glob("*/model.pt")) and 0 < len(metrics(killed)) < 8
    run("--out", str(whole))
    run("--out", str(killed), "--resume")
    assert metrics(killed) == metrics(whole)
    pairs = zip(weights(killed).values(), weights(whole).values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
