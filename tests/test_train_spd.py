"""SPD's three phases through `train`, on a task and a model that take milliseconds."""

import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Letters, both_scripts, file_of, metrics, settings, stopped_run, train

import subspace
import train_spd
from harness import files
from lora import LoRALinear
from losses import next_token_loss
from model import GPT
from sampling import generate
from subspace import TEMPERATURE, calibration_set, capability_gradients, make_projectors, project_kv

PAPER = "--rank 50% --loss results --calibration-temperature 1"
GOLDEN = {  # the loss of every epoch; a refactoring changes none of them
    f"--project kv --temperature 0 {PAPER}": [2.84849, 2.74033],
    "--method psr": [2.39133, 2.34422],
    "--method ssd --top-k 3 --temperature 0.5 --finetune full": [1.40213, 1.1065],
    f"--coordinate rope --project k {PAPER} --rank 2 --temperature 0": [1.74601, 1.66401],
}


@pytest.mark.parametrize("flags", GOLDEN)
def test_losses_are_those_of_earlier_versions(flags: str, base: str, tmp_path: Path) -> None:
    train(train_spd, base, tmp_path, *flags.split(), lora_dropout=0.0, learning_rate=3e-3)
    assert [row["loss"] for row in metrics(tmp_path)] == pytest.approx(GOLDEN[flags], rel=1e-3)


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Every batch that a run learns from, its loss, and whether dropout acts."""
    seen = SimpleNamespace(batches=[], losses=[], dropout=[])

    def loss_of(student: GPT, batch: list, completion_only: bool) -> torch.Tensor:
        seen.batches.append(batch)
        seen.dropout += [module.training for module in student.modules() if isinstance(module, LoRALinear)]
        loss = next_token_loss(student, batch, completion_only)
        seen.losses.append(loss.item())
        return loss

    monkeypatch.setattr(train_spd, "next_token_loss", loss_of)
    return seen


def test_the_student_learns_one_projected_completion_of_every_prompt_and_none_is_filtered(
    base: str, letters: Letters, tmp_path: Path, updates: SimpleNamespace
) -> None:
    train(
        train_spd,
        base,
        tmp_path,
        "--prompts",
        "7",
        "--batch",
        "4",
        "--epochs",
        "2",
        "--rank",
        "25%",
        "--temperature",
        "0",
    )
    assert list(map(len, updates.batches)) == [4, 3, 4, 3]
    model = files.load_checkpoint(base)
    examples = calibration_set(letters, ("one",), 20, "steps", 0)
    sites = [(0, "v"), (1, "v")]
    problems = letters.problems("one", 7, random.Random("prompts 0"))
    prompts = [letters.encode(letters.prompt(problem)) for problem in problems]
    with project_kv(
        model, make_projectors(capability_gradients(model, examples, sites, temperature=TEMPERATURE), "25%")
    ):
        written = generate(model, prompts, letters.max_response, letters.stop, temperature=0)
    assert written != generate(model, prompts, letters.max_response, letters.stop, temperature=0)
    for epoch in (updates.batches[:2], updates.batches[2:]):
        assert sorted(pair for batch in epoch for pair in batch) == sorted(zip(prompts, written, strict=True))
    assert updates.batches[0] + updates.batches[1] != updates.batches[2] + updates.batches[3]  # in another order


@pytest.mark.parametrize("completion_only", [True, False])
def test_the_student_is_trained_without_projection(
    completion_only: bool, base: str, tmp_path: Path, updates: SimpleNamespace
) -> None:
    """Before its first update its loss is that of the plain base."""
    flags = [] if completion_only else ["--no-completion-only"]
    train(train_spd, base, tmp_path, *flags, "--rank", "1", "--epochs", "1", lora_dropout=0.0)
    model, pairs = files.load_checkpoint(base), updates.batches[0]
    assert updates.losses[0] == pytest.approx(next_token_loss(model, pairs, completion_only).item(), rel=1e-5)
    assert next_token_loss(model, pairs, True) != next_token_loss(model, pairs, False)
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(sum(updates.losses) / len(updates.losses))


def test_learning_rate_falls_along_half_a_cosine(base: str, tmp_path: Path, optimizer_steps: list) -> None:
    train(train_spd, base, tmp_path, "--prompts", "6", "--batch", "4", "--epochs", "3", "--learning-rate", "0.5")
    expected = [0.25 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert [rate for rate, _ in optimizer_steps] == pytest.approx(expected)


def test_dropout_acts_while_training_alone(base: str, tmp_path: Path, updates: Any, monkeypatch: Any) -> None:
    evaluated, run = [], train_spd.evaluate_run
    monkeypatch.setattr(train_spd, "evaluate_run", lambda m, *rest: evaluated.append(m.training) or run(m, *rest))
    train(train_spd, base, tmp_path)
    assert updates.dropout and all(updates.dropout) and evaluated == [False, False]


@pytest.mark.parametrize(("method", "projected"), [("spd", True), ("psr", False), ("ssd", False)])
def test_only_spd_projects_what_it_writes(
    method: str, projected: bool, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites, project = [], subspace.project_kv
    monkeypatch.setattr(subspace, "project_kv", lambda model, P, *rest: sites.extend(P) or project(model, P, *rest))
    result = train(train_spd, base, tmp_path, "--method", method, "--eval-problems", "20", "--rank", "50%")
    assert sites == ([(0, "v"), (1, "v")] if projected else [])
    assert (result["generation"][0] == result["base_text"]) != projected


@pytest.mark.parametrize(
    "flags",
    [
        "--loss full --layers all --coordinate norm --project v",
        "--subspace random --rank 3 --coordinate head --calibration-domain two one",
        "--method ssd --top-p 0.8 --temperature 1.5 --finetune full",
    ],
)
def test_settings_that_no_other_test_uses_learn(flags: str, base: str, tmp_path: Path) -> None:
    train(train_spd, base, tmp_path, *flags.split())
    first, second = (row["loss"] for row in metrics(tmp_path))
    assert first != second


def test_without_epochs_the_run_ends_with_the_generation(base: str, tmp_path: Path) -> None:
    result = train(train_spd, base, tmp_path, "--epochs", "0")
    assert len(result["generation"]) == 1 and result["before"] is result["after"] is None
    left, start = files.load_checkpoint(file_of(tmp_path, "model.pt")), files.load_checkpoint(base)
    assert all(map(torch.equal, left.parameters(), start.parameters()))


def test_a_stopped_run_resumes_to_the_same_metrics_and_weights(base: str, tmp_path: Path) -> None:
    more = ("--epochs", "4", "--method", "psr", "--learning-rate", "0.1")
    train(train_spd, base, tmp_path / "whole", *more)
    stopped_run(base, tmp_path / "stopped", *more, script=train_spd)
    assert len(metrics(tmp_path / "stopped")) == 1
    train(train_spd, base, tmp_path / "stopped", *more, "--resume")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    models = [files.load_checkpoint(file_of(tmp_path / name, "model.pt")) for name in ("stopped", "whole")]
    assert all(map(torch.equal, *(model.parameters() for model in models)))


def test_the_method_chooses_the_temperature_and_layers_are_the_papers() -> None:
    for flags, temperature in (("", 1.0), ("--method ssd", 0.6), ("--method ssd --temperature 0.5", 0.5)):
        config = train_spd.parse_config(train_spd.Config, "", flags.split(), train_spd.defaults_of)
        assert config == train_spd.configure(config.method, temperature=temperature)
    assert (config.task, config.layers, config.rank) == ("exams", "paper", "keep95%")
    assert subspace.target_layers(config.layers, 24) == [11, 23]


# ---------------------------------------------------------------------------------------------- both loops


@both_scripts
def test_a_run_leaves_a_trained_model_and_the_files_it_promises(
    script: Any, base: str, letters: Letters, tmp_path: Path
) -> None:
    result = train(script, base, tmp_path)
    folder = file_of(tmp_path, "results.json").parent
    assert {path.name for path in folder.iterdir()} == {"metrics.jsonl", "model.pt", "results.json", ".lock"}
    of_base = ["base-before", "base-text"] if script is train_spd else ["base-before"]
    assert sorted(path.name[:-14] for path in tmp_path.glob("base-*.json")) == of_base
    left, start = files.load_checkpoint(folder / "model.pt"), files.load_checkpoint(base)
    assert not all(map(torch.equal, left.parameters(), start.parameters()))
    stored = files.read_json(folder / "results.json")
    assert stored["after"] == result["after"] and set(stored["after"]) == set(letters.domains)
    assert stored["name"] == folder.name
    assert stored["config"] == files.plain(settings(script, base, tmp_path, "--domain", "one"))
    assert stored["commit"] and stored["torch"] and stored["seconds"] > 0 and "loud" in stored["after"]["two"]
    assert [row["step"] for row in metrics(tmp_path)] == [0, 1]
