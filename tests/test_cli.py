"""Any command line ends in a config or in one sentence, and bad input leaves nothing behind."""

import contextlib
import dataclasses
import io
import os
import re
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import torch
from conftest import SPD, Letters, hear_ctrl_c, sentence, tiny_gpt

import pretrain
import reflect
import subspace
import train_rosd
import train_spd
from errors import UserError
from harness import files
from harness.cli import check_values, parse_config, run_script
from model import GPT, GPTConfig

LOOPS = {"train_rosd": train_rosd, "train_spd": train_spd}
SCRIPTS = LOOPS | {"pretrain": pretrain}


def parse(script: typing.Any, *flags: str) -> typing.Any:
    return parse_config(script.Config, "", list(flags), getattr(script, "defaults_of", lambda **_: {}))


def help_of(script: typing.Any, *flags: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        parse(script, *flags, "--help")
    return re.sub(r"\s+", " ", printed.getvalue())


def flags_of(config_class: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(config_class) if field.metadata]


def numeric_flags(script: typing.Any) -> list[dataclasses.Field]:
    kinds = typing.get_type_hints(script.Config)
    return [f for f in flags_of(script.Config) if kinds[f.name] in (int, float, int | None)]


# ---------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("value", ["nan", "inf", "1e400", "-1", "9" * 30, "", "half"])
def test_a_number_that_means_nothing_is_one_sentence(name: str, value: str) -> None:
    script = SCRIPTS[name]
    for field in numeric_flags(script):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, float) and value == "9" * 30:  # large, but a number
            continue
        with pytest.raises(UserError, match=rf"argument {flag}: [^\n]*$"):
            parse(script, f"{flag}={value}")


@pytest.mark.parametrize(("script", "flag"), [(train_rosd, "--eval-temperature"), (train_spd, "--temperature")])
def test_a_temperature_is_0_or_one_that_can_be_computed_with(script: typing.Any, flag: str) -> None:
    assert [parse(script, flag, value) for value in ("0", "0.7")]
    for value in ("1e-40", "1e-4"):
        with pytest.raises(UserError, match=rf"{flag}: {float(value)} is not allowed, give 0 or at least 0\.001"):
            parse(script, flag, value)


def test_a_name_that_no_table_knows_is_refused_wherever_it_comes_from() -> None:
    with pytest.raises(UserError, match="--context: pear is not allowed, give one of reflection, peer, gold"):
        parse_config(train_rosd.Config, "", [], lambda **_: {"context": "pear"})
    with pytest.raises(UserError, match="--mask: tail is not allowed"):
        check_values(train_rosd.Config(mask="tail"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_every_flag_with_the_papers_value(name: str) -> None:
    printed = help_of(SCRIPTS[name])
    for field in flags_of(SCRIPTS[name].Config):
        assert "--" + field.name.replace("_", "-") in printed
        assert not field.metadata["paper"] or f"paper: {field.metadata['paper']}" in printed


@pytest.mark.parametrize(
    ("name", "flags", "shown"),
    [
        ("train_rosd", "", ["--mask {whole,suffix,span,oracle} .*?default: suffix;", "peak rate .*?default: 0.001;"]),
        ("train_rosd", "--method grpo --preset released", ["default: 0.0001;", "mask .*?default: whole;"]),
        ("train_rosd", "--method=sdpo --preset=released", [r"--peer .*?default: first;", "--ema .*?default: 0.05;"]),
        ("train_spd", "--method psr", ["of the completions[^-]*?default: 1.0", "--task [^-]*?default: exams"]),
        ("train_spd", "--task x.jsonl", [r"--domain STR domain to train on; unset: the task's first --"]),
    ],
)
def test_help_shows_the_value_in_force(name: str, flags: str, shown: list[str]) -> None:
    printed = help_of(LOOPS[name], *flags.split())
    assert all(re.search(pattern, printed) for pattern in shown)


def test_flags_of_rosd_are_few_and_in_groups() -> None:
    assert len(flags_of(train_rosd.Config)) <= 35
    titles = re.findall(r" (the method|our controls|the training|the run|the task)[a-z, ]*: --", help_of(train_rosd))
    assert titles == ["the method", "our controls", "the training", "the run", "the task"]


# ---------------------------------------------------------------------------------------------- bad input


def truncated(path: Path) -> Path:
    files.save_checkpoint(path, tiny_gpt(Letters()))
    path.write_bytes(path.read_bytes()[:1000])
    return path


def other_vocabulary(path: Path) -> Path:
    files.save_checkpoint(path, GPT(GPTConfig(7, n_layer=1, n_embd=8, n_head=1, n_kv_head=1, head_dim=4, n_hidden=8)))
    return path


BAD = [
    (["--method", "foo"], "--method"),
    (["--nonsense"], "--nonsense"),
    (["stray"], "stray"),
    (["--eval-top-p", "1.5"], "--eval-top-p"),
    (["--seed", "9" * 20], "--seed"),
    (["--domain", "three"], "no domain 'three'; give one of one, two"),
    (["--base", "/nowhere/base.pt"], "no checkpoint at /nowhere/base.pt; make one with `python pretrain.py"),
    (["--base", "no-folder"], "no model folder at no-folder; download it, or `python -m tools.smollm2"),
    (["--base", truncated], "damaged"),
    (["--base", other_vocabulary], "vocabulary"),
    (["--device", "toaster"], "toaster"),
]
OWN = {
    "train_rosd": [(["--alpha", "3"], "--alpha"), (["--finetune", "lora", "--ema", "0.1"], "give --finetune full")],
    "train_spd": [(["--prompts", "0"], "--prompts")],
}


@pytest.mark.parametrize(
    ("name", "flags", "cause"),
    [(name, flags, cause) for name, own in OWN.items() for flags, cause in BAD + own],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_gets_one_sentence_and_leaves_nothing(
    name: str, flags: list, cause: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    flags = [str(flag(tmp_path / "bad.pt")) if callable(flag) else flag for flag in flags]
    fixed = ["--base", base, "--domain", "one", "--out", str(tmp_path / "out"), "--no-baseline"]
    monkeypatch.setattr(sys, "argv", [name, *fixed, *flags])
    with pytest.raises(SystemExit) as stop:
        run_script(LOOPS[name].main)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and cause in printed.err and len(printed.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "flags", "cause"),
    [
        (train_spd, ["--calibration-domain", "one", "three"], "three"),
        (train_spd, ["--rank", "17"], "from 1 to 16"),
        (train_spd, ["--layers", "3"], "numbers from 1 to 2"),
        (subspace, ["--domain", "three"], "no domain 'three'"),
        (reflect, ["--domain", "three"], "no domain 'three'"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_task_or_model_get_one_sentence(
    script: typing.Any, flags: list, cause: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [*SPD, "--out", str(tmp_path / "out")] if script is train_spd else []
    monkeypatch.setattr(sys, "argv", ["script", *small, "--base", base, *flags])
    with pytest.raises(UserError, match=cause):
        script.main()


def test_a_checkpoint_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "ROOT", tmp_path / "repository")
    (tmp_path / "repository" / "data").mkdir(parents=True)
    files.save_checkpoint(tmp_path / "repository" / "data" / "base.pt", tiny_gpt(Letters()))
    assert files.load_checkpoint("data/base.pt").config.n_layer == 2
    files.save_checkpoint(files.make_folder(tmp_path / "data") / "base.pt", tiny_gpt(Letters(), n_layer=3))
    assert files.load_checkpoint("data/base.pt").config.n_layer == 3


# ---------------------------------------------------------------------------------------------- the end of a script


def test_a_bug_is_no_sentence(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        run_script(lambda: tiny_gpt(Letters()).check_length(300))
    assert end.value.code == 2 and "block_size = 256; give another --base" in sentence(capsys)

    def broken() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_script(broken)


def test_a_console_that_cannot_be_reconfigured_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", type("Notebook", (), {"write": print})())
    run_script(lambda: None)


LONG = "torch.set_num_threads(1); x = torch.ones(9000, 9000, dtype=torch.int8); print('begun', flush=True); x @ x"
QUICK = "print('begun', flush=True); time.sleep(99)"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends Ctrl-C to whole groups of processes")
@pytest.mark.parametrize("operation", [LONG, QUICK], ids=["long", "quick"])
def test_ctrl_c_ends_a_script_also_within_one_long_operation(operation: str) -> None:
    """The long one takes a minute or more; 30 s are far above the 3 s that the script has."""
    code = f"import time, torch\nfrom harness.cli import run_script\ndef main():\n    {operation}\n"
    command = [sys.executable, "-c", f"{code}run_script(main, 'Stopped; --resume goes on.')"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    script = subprocess.Popen(command, cwd=files.ROOT, preexec_fn=hear_ctrl_c, **pipes)
    assert script.stdout.readline() == "begun\n"
    script.send_signal(signal.SIGINT)
    _, printed = script.communicate(timeout=30)
    assert script.returncode == 130 and printed.strip() == "Stopped; --resume goes on."


def group(leader: int) -> list[str]:
    """The processes of a group that still run."""
    listed = subprocess.run(["ps", "-e", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [row[2] for row in rows if row[0] == str(leader) and "Z" not in row[1]]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends Ctrl-C in another way")
@pytest.mark.parametrize(
    "command",
    [
        ["train_rosd.py", "--steps", "500", "--batch", "4", "--group", "4"],
        ["train_spd.py", "--prompts", "60", "--calibration-size", "40", "--epochs", "500"],
    ],
    ids=lambda command: command[0],
)
def test_ctrl_c_ends_every_process_and_leaves_whole_files(command: list[str], tmp_path: Path) -> None:
    """As a terminal does it: the signal reaches all processes of the group at once."""
    small = ["--eval-problems", "1", "--eval-samples", "1", "--device", "cpu"]
    script = subprocess.Popen(
        [sys.executable, str(files.ROOT / command[0]), *command[1:], *small],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=(tmp_path / "stderr").open("wb"), start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=hear_ctrl_c,
    )  # fmt: skip
    deadline = time.time() + 60
    while not list(tmp_path.glob("out/*/metrics.jsonl")) or not (tmp_path / "stderr").stat().st_size:
        assert script.poll() is None and time.time() < deadline, files.read_text(tmp_path / "stderr")
        time.sleep(0.1)
    assert len(group(script.pid)) > 1  # the trainings beside it
    os.killpg(script.pid, signal.SIGINT)
    assert script.wait(timeout=30) == 130
    printed = files.read_text(tmp_path / "stderr")
    assert "Stopped." in printed and "Traceback" not in printed
    deadline = time.time() + 30
    while group(script.pid):  # the helper of multiprocessing ends a moment later
        assert time.time() < deadline, group(script.pid)
    for state in tmp_path.glob("out/*/state.pt"):
        assert torch.load(state, weights_only=True)["config"]
    assert not list(tmp_path.glob("out/*/results.json")) and not list(tmp_path.glob("out/**/*.tmp"))
