"""Runs that are stopped, moved, damaged, started twice or short of disk: nothing is lost, and nothing mixed up."""

import json
import math
import os
import re
import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import (
    Letters,
    Stop,
    both_scripts,
    file_of,
    metrics,
    settings,
    stop_at,
    stopped_run,
    tiny_gpt,
    train,
)

import train_rosd
import train_spd
from data import Verdict
from errors import UserError
from harness import files
from harness.run import Run, changed_settings, run_name


def rosd(**fields: object) -> train_rosd.Config:
    return train_rosd.configure(**fields)


def name_of(config: train_rosd.Config) -> str:
    return run_name(config, train_rosd.configure(config.method, config.preset))


def run_of(config: train_rosd.Config) -> Run:
    return Run(config, train_rosd.configure(config.method, config.preset))


# ---------------------------------------------------------------------------------------------- names


def test_a_name_says_method_changed_settings_and_seed() -> None:
    assert name_of(rosd()) == "rosd-seed0" == name_of(rosd(eval_samples=4, device="cpu", out="elsewhere"))
    changed = rosd(method="sdpo", peer="first", learning_rate=5e-4, domain="add", seed=3)
    assert name_of(changed) == "sdpo-learning_rate=0.0005-peer=first-domain=add-seed3"
    assert name_of(rosd(preset="released", mask="span")) == "rosd-preset=released-mask=span-seed0"
    spd = train_spd.configure(task="gym:chain_sum"), train_spd.configure()
    assert re.fullmatch(r"spd-task=gym_chain_sum-seed0-\w{8}", run_name(*spd))


def test_names_are_short_and_lose_no_information() -> None:
    """In lower case they still differ: some file systems do not tell it from upper case."""
    values = ["x/y.jsonl", "x_y.jsonl", "y.jsonl", "Y.jsonl", "x=y", "x-y", "x-seed1", "x-mask=whole", "x", "x+y", "é"]
    values += ["x-domain=d", "gym:a,b", "gym:a+b", "x" * 300, "x" * 301]
    configs = [rosd(task=task, domain=d, seed=seed) for task in values for d in ("", "d") for seed in (0, 1)]
    configs += [rosd(task="x", mask="whole"), rosd(task="x", domain="d-seed1"), rosd(task="x", domain="seed1")]
    names = [name_of(config) for config in configs]
    assert len({name.lower() for name in names}) == len(names) and max(map(len, names)) <= 90
    assert all(re.fullmatch(r"[\w.%+=-]+", name, re.ASCII) for name in names)
    several = [train_spd.configure(calibration_domain=domains) for domains in (("a", "b"), ("a+b",))]
    assert len({run_name(config, train_spd.configure()) for config in several}) == 2


def test_a_row_is_named_after_every_setting_that_is_not_the_methods_own() -> None:
    config = rosd(preset="released", method="grpo", control="false-ideas", dose=0.5, minibatches=1)
    changed = changed_settings(config, rosd(method="grpo", preset="released"))
    assert set(changed) == {"preset released", "control false-ideas", "dose 0.5", "minibatches 1"}


def test_two_bases_of_one_name_have_two_folders(letters: Letters, tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        files.save_checkpoint(tmp_path / name / "model.pt", tiny_gpt(letters, seed=i))
        train(train_rosd, str(tmp_path / name / "model.pt"), tmp_path / "out", "--steps", "1")
    assert len(list((tmp_path / "out").glob("*/results.json"))) == 2


# ---------------------------------------------------------------------------------------------- what a base is


def test_figures_of_a_base_are_measured_again_once_its_folder_changes(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    for checksum in ("11111111", "11111111", "22222222"):
        monkeypatch.setattr(files, "checksum", lambda path, checksum=checksum: checksum)
        run = run_of(settings(train_rosd, base, tmp_path))
        run.of_base("before", lambda checksum=checksum: measured.append(checksum) or {})
    assert measured == ["11111111", "22222222"] and len(list(tmp_path.glob("base-before-*.json"))) == 2


def test_a_run_is_not_resumed_on_a_base_that_changed_under_its_name(
    base: str, letters: Letters, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    stopped_run(base, tmp_path / "out")
    (folder,) = (tmp_path / "out").iterdir()
    files.save_checkpoint(Path(base), tiny_gpt(letters, seed=1))
    train(train_rosd, base, tmp_path / "out", "--resume")
    hint = "has nothing to resume, the run begins at its first step; unfinished runs with other settings"
    assert f"{hint}: {folder.name}." in capsys.readouterr().err and (folder / "state.pt").exists()
    with pytest.raises(UserError, match="another base;"):
        run_of(settings(train_rosd, base, tmp_path)).check_same(torch.load(folder / "state.pt"), folder)


# ---------------------------------------------------------------------------------------------- resume


def test_stopped_between_state_and_metrics_a_run_loses_no_line(base: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, "write_lines", 2, files)
        train(train_rosd, base, tmp_path / "out")
    train(train_rosd, base, tmp_path / "out", "--resume")
    assert [row["step"] for row in metrics(tmp_path / "out")] == [0, 1]


def test_resume_goes_on_however_the_folder_is_spelled_or_moved(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for spelled in ("out/", str(tmp_path / "out"), "elsewhere"):
        shutil.rmtree("out", ignore_errors=True)
        stopped_run(base, Path("out"))
        if spelled == "elsewhere":
            shutil.move("out", spelled)
        train(train_rosd, base, spelled, "--resume")
        assert not list(Path(spelled).glob("*/state.pt"))


def test_a_finished_run_is_not_made_again_by_resume(base: str, tmp_path: Path) -> None:
    first = train(train_rosd, base, tmp_path / "out")
    assert train(train_rosd, base, f"{tmp_path}/out/", "--resume") == first


@pytest.mark.parametrize("content", [b"no checkpoint", {"config": 1}, "no parts", "other parts"], ids=str)
def test_a_damaged_state_is_one_sentence_with_a_remedy_that_helps(content: object, base: str, tmp_path: Path) -> None:
    stopped_run(base, tmp_path / "out")
    path = file_of(tmp_path / "out", "state.pt")
    state = torch.load(path, weights_only=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        lacking = {name: value for name, value in state.items() if name != "parts"}
        changes = {"no parts": lacking, "other parts": {**state, "parts": {"student": {"a": 1}}}}
        torch.save(changes[content] if isinstance(content, str) else content, path)
    with pytest.raises(UserError, match=r"state\.pt is damaged.*(delete|remove)"):
        train(train_rosd, base, tmp_path / "out", "--resume")
    path.unlink()
    train(train_rosd, base, tmp_path / "out", "--resume")


@pytest.mark.parametrize("content", ["{", "[]", '{"config": {}}'])
def test_damaged_results_are_one_sentence(content: str, base: str, tmp_path: Path) -> None:
    train(train_rosd, base, tmp_path / "out", "--steps", "1")
    file_of(tmp_path / "out", "results.json").write_text(content, encoding="utf-8")
    for _ in range(2):  # and the folder is not left locked
        with pytest.raises(UserError, match="damaged"):
            train(train_rosd, base, tmp_path / "out", "--steps", "1")


# ---------------------------------------------------------------------------------------------- one folder, one run


@both_scripts
def test_what_differs_in_any_setting_is_refused(script: ModuleType, base: str, tmp_path: Path) -> None:
    config = settings(script, base, tmp_path / "out", "--domain", "one")
    other_values = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: x / 3 + 0.123, str: lambda x: x + "2"}
    other_values |= {type(None): lambda x: 7}
    run = Run(config, script.configure(config.method))
    saved = {"config": files.plain(run.config), **run.origin}
    for name, value in files.plain(run.config).items():
        if name not in ("out", "base", "resume", "device", "baseline"):
            other = ["two"] if isinstance(value, list) else other_values[type(value)](value)
            with pytest.raises(UserError, match=f"another {name}"):
                run.check_same({**saved, "config": saved["config"] | {name: other}}, tmp_path)


def test_settings_that_share_a_name_are_refused_and_the_finished_run_stays(base: str, tmp_path: Path) -> None:
    train(train_rosd, base, tmp_path / "out")
    before = file_of(tmp_path / "out", "results.json").read_bytes()
    with pytest.raises(UserError, match="another eval_samples"):
        train(train_rosd, base, tmp_path / "out", "--eval-samples", "3")
    assert file_of(tmp_path / "out", "results.json").read_bytes() == before


def test_the_second_of_two_runs_in_one_folder_is_refused(base: str, tmp_path: Path) -> None:
    first = run_of(settings(train_rosd, base, tmp_path / "out"))
    with first, pytest.raises(UserError, match="another process is running in"):
        train(train_rosd, base, tmp_path / "out")
    train(train_rosd, base, tmp_path / "out")


def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", unsupported)
    files.lock_folder(tmp_path).close()


# ---------------------------------------------------------------------------------------------- disks and files


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def full_for_torch(*_: object, **__: object) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0")


FAILURES = [(torch, "save", full), (torch, "save", full_for_torch), (os, "replace", full)]
FAILURES += [(Path, "write_text", full), (Path, "mkdir", full), (tempfile, "TemporaryFile", full)]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure[1])
@both_scripts
def test_a_full_disk_is_one_sentence_and_destroys_nothing(
    script: ModuleType, failure: tuple, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(script, base, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*/*") if path.name != ".lock"}
    with monkeypatch.context() as patch:
        patch.setattr(*failure)
        with pytest.raises(UserError, match=r"free some space|choose another folder"):
            train(script, base, tmp_path / "out")
    assert {path: path.read_bytes() for path in before} == before
    assert not list((tmp_path / "out").glob("*/*.tmp"))
    train(script, base, tmp_path / "out", "--resume")


def test_what_a_killed_process_left_half_written_goes_with_the_next_run(base: str, tmp_path: Path) -> None:
    stopped_run(base, tmp_path / "out")
    rest = file_of(tmp_path / "out", "state.pt").with_name("state.pt.123.tmp")
    rest.write_bytes(b"half")
    train(train_rosd, base, tmp_path / "out", "--resume")
    assert not rest.exists()


def test_files_are_utf_8_with_unix_lines_and_json_without_nan(tmp_path: Path) -> None:
    files.write_text(tmp_path / "text", "π\n")
    assert (tmp_path / "text").read_bytes() == b"\xcf\x80\n" and files.read_text(tmp_path / "text") == "π\n"
    content = {"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf}}
    files.write_json(tmp_path / "a.json", content)
    files.write_lines(tmp_path / "b.jsonl", [content])
    for name in ("a.json", "b.jsonl"):
        assert json.loads(files.read_text(tmp_path / name)) == {"a": [None, [None, 1.5]], "b": {"c": None}}


# ---------------------------------------------------------------------------------------------- numbers


def test_a_number_that_is_not_finite_is_neither_loaded_nor_written(base: str, letters: Letters, tmp_path: Path) -> None:
    model = tiny_gpt(letters)
    model.blocks[0].mlp.up_proj.weight.data[3, 4] = math.nan
    torch.save({"config": vars(model.config), "model": model.state_dict()}, tmp_path / "bad.pt")
    for attempt in (
        lambda: train(train_rosd, str(tmp_path / "bad.pt"), tmp_path / "out"),
        lambda: files.save_checkpoint(Path(base), model),
    ):
        with pytest.raises(UserError, match=r"blocks\.0\.mlp\.up_proj\.weight holds a number that is not finite"):
            attempt()
    assert not (tmp_path / "out").exists() and files.load_checkpoint(base)


@both_scripts
def test_a_diverging_run_ends_with_a_sentence_and_a_healthy_state(script: Any, base: str, tmp_path: Path) -> None:
    more = ["--steps", "9"] if script is train_rosd else ["--epochs", "9", "--finetune", "full"]
    with pytest.raises(UserError, match=r"lower --learning-rate|lower learning rate"):
        train(script, base, tmp_path / "out", "--learning-rate", "1e30", *more)
    for state in (tmp_path / "out").glob("*/state.pt"):
        parts = torch.load(state, weights_only=True)["parts"]
        assert all(tensor.isfinite().all() for tensor in parts.get("student", {}).values())


def test_a_step_and_a_run_that_learned_from_nothing_say_so(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(Letters, "verify", lambda *_, **__: Verdict(False, True, None))
    train(train_rosd, base, tmp_path / "out", "--method", "sdpo", "--ema", "0.5")
    printed = capsys.readouterr().err
    assert "step 0: nothing to learn from" in printed and "step 1: nothing to learn from" in printed
    assert "no step had anything to learn from" in printed
    assert [(row["loss"], row["learned_from"]) for row in metrics(tmp_path / "out")] == [(None, 0)] * 2
    trained, start = (files.load_checkpoint(path) for path in (file_of(tmp_path / "out", "model.pt"), base))
    assert all(map(torch.equal, trained.parameters(), start.parameters()))
