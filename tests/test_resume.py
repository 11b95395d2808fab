"""Runs that were stopped, moved, damaged or started twice."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import Letters, Stop, both_scripts, file_of, settings, stop_at, stopped_run, tiny_gpt, train

import train_rosd
from errors import UserError
from harness import files
from harness.files import lock_folder
from harness.run import Run, run_name

# ---------------------------------------------------------------------------------------------- resume


def test_stopped_between_state_and_metrics_a_run_loses_no_line(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, "write_metrics", 2)
        train(train_rosd, base, tmp_path / "out")
    train(train_rosd, base, tmp_path / "out", "--resume")
    lines = files.read_text(file_of(tmp_path / "out", "metrics.jsonl")).splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]


def test_resume_goes_on_however_the_folder_is_spelled_or_moved(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for spelled in ("out/", str(tmp_path / "out"), "./out", "elsewhere"):
        shutil.rmtree("out", ignore_errors=True)
        stopped_run(base, Path("out"))
        if spelled == "elsewhere":
            shutil.move("out", spelled)
        result = train(train_rosd, base, spelled, "--resume")
        assert result["seconds"] > 0 and not list(Path(spelled).glob("*/state.pt"))


def test_a_finished_run_is_not_made_again_by_resume(base: str, tmp_path: Path) -> None:
    first = train(train_rosd, base, tmp_path / "out")
    assert train(train_rosd, base, f"{tmp_path}/out/", "--resume") == first


@pytest.mark.parametrize("content", [b"", b"no checkpoint", {}, {"config": 1}, "no parts", "other parts"], ids=str)
def test_a_damaged_state_is_told_with_a_remedy_that_helps(content: object, base: str, tmp_path: Path) -> None:
    stopped_run(base, tmp_path / "out")
    path = file_of(tmp_path / "out", "state.pt")
    state = torch.load(path, weights_only=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        changes = {"no parts": {**state, "parts": {}}, "other parts": {**state, "parts": {"student": {"a": 1}}}}
        torch.save(changes[content] if isinstance(content, str) else content, path)
    with pytest.raises(UserError, match=r"state\.pt is damaged.*(delete|remove)"):
        train(train_rosd, base, tmp_path / "out", "--resume")
    path.unlink()
    train(train_rosd, base, tmp_path / "out", "--resume")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"config": {}}'])
def test_damaged_results_are_told(content: str, base: str, tmp_path: Path) -> None:
    train(train_rosd, base, tmp_path / "out")
    path = file_of(tmp_path / "out", "results.json")
    path.write_text(content, encoding="utf-8")
    for _ in range(2):  # and the folder is not left locked
        with pytest.raises(UserError, match="damaged"):
            train(train_rosd, base, tmp_path / "out")


# ---------------------------------------------------------------------------------------------- one folder, one run


def test_two_bases_of_one_name_have_two_folders(base: str, letters: Letters, tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        files.save_checkpoint(tmp_path / name / "model.pt", tiny_gpt(letters, seed=i))
        train(train_rosd, str(tmp_path / name / "model.pt"), tmp_path / "out", "--steps", "1")
    assert len(list((tmp_path / "out").glob("*/results.json"))) == 2


def test_a_base_that_changed_under_its_name_is_another(base: str, letters: Letters, tmp_path: Path) -> None:
    stopped_run(base, tmp_path / "out")
    (folder,) = (tmp_path / "out").iterdir()
    files.save_checkpoint(Path(base), tiny_gpt(letters, seed=1))
    config = train_rosd.settle(settings(train_rosd, base, tmp_path / "other"))
    with pytest.raises(UserError, match="another base;"), Run(config, "") as run:
        run.check_same(torch.load(folder / "state.pt", weights_only=True), folder)


@both_scripts
def test_what_differs_in_any_setting_has_another_name_or_is_refused(
    script: ModuleType, base: str, letters: Letters, tmp_path: Path
) -> None:
    config = script.settle(settings(script, base, tmp_path / "out", "--domain", "one"))
    other_values = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: x / 3 + 0.123, str: lambda x: x + "2"}
    other_values |= {type(None): lambda x: 7}
    incidental = ("out", "base", "resume", "device", "threads", "baseline")
    with Run(config, run_name(config)) as run:
        saved = {"config": files.plain(run.config), **run.origin}
        for name, value in files.plain(run.config).items():
            if name in incidental:
                continue
            changed = (*value, "two") if isinstance(value, list) else other_values[type(value)](value)
            run.config = type(config)(**{**vars(config), name: changed})
            with pytest.raises(UserError, match=name):
                run.check_same(saved, tmp_path)


def test_settings_that_share_a_name_are_refused_and_the_finished_run_stays(base: str, tmp_path: Path) -> None:
    train(train_rosd, base, tmp_path / "out")
    before = file_of(tmp_path / "out", "results.json").read_bytes()
    with pytest.raises(UserError, match="another eval_samples"):
        train(train_rosd, base, tmp_path / "out", "--eval-samples", "3")
    assert file_of(tmp_path / "out", "results.json").read_bytes() == before


def test_a_name_fits_every_file_system_and_still_tells_settings_apart(base: str, tmp_path: Path) -> None:
    many = dict.fromkeys(("alpha", "spoil_idea", "spoil_quote", "clip_low", "clip_high", "temperature"), 0.123456789)
    many |= dict.fromkeys(("steps", "batch", "group", "warmup", "top_k", "updates", "micro_batch"), 10**12)
    names = {run_name(train_rosd.Config(base=base, seed=seed, **many)) for seed in range(3)}
    assert len(names) == 3 and max(map(len, names)) < 200


def test_the_second_of_two_runs_in_one_folder_is_refused(base: str, tmp_path: Path) -> None:
    config = settings(train_rosd, base, tmp_path / "out")
    with Run(train_rosd.settle(config), run_name(config)):
        for _ in range(2):
            with pytest.raises(UserError, match="another process is running in"):
                train(train_rosd, base, tmp_path / "out")
    train(train_rosd, base, tmp_path / "out")


def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    lock_folder(tmp_path).close()
