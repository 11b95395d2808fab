"""Any command line ends in settled settings or in one sentence, and bad input leaves nothing behind."""

import dataclasses
import random
import sys
import types
import typing
from pathlib import Path

import pytest
from conftest import ROSD, SPD, Letters, tiny_gpt

import pretrain
import reflect
import subspace
import train_rosd
import train_spd
from errors import UserError
from harness import files
from harness.cli import markdown_table, parse_config, run_script
from harness.run import run_name
from model import GPT, GPTConfig
from tools import bench, plots, study, xray

SCRIPTS = {"train_rosd": train_rosd, "train_spd": train_spd, "reflect": reflect, "subspace": subspace}
ALL_SCRIPTS = SCRIPTS | {"pretrain": pretrain, "bench": bench, "plots": plots, "study": study, "xray": xray}
KINDS = {script.Config: typing.get_type_hints(script.Config) for script in ALL_SCRIPTS.values()}
GARBAGE = [
    "",
    " ",
    "nan",
    "inf",
    "-1",
    "0",
    "1e400",
    "1e3",
    "0x10",
    "9" * 30,
    "-9" * 30,
    "é→\x00",
    "a/b",
    "../x",
    "--",
    "-",
]
GARBAGE += ["1,2", "3,,4", "50%", "101%", "energy:0.5", "energy:2", "None", "true", "'; rm", "%s", "{}", "x" * 300]


def kind_of(field: dataclasses.Field, config_class: type) -> type:
    kind = KINDS[config_class][field.name]
    kind = typing.get_args(kind)[0] if isinstance(kind, types.UnionType) else kind
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind


def random_value(field: dataclasses.Field, config_class: type, rng: random.Random) -> str:
    """Mostly something allowed, often at a limit, now and then garbage."""
    kind, (low, high) = kind_of(field, config_class), field.metadata["limits"]
    if rng.random() < 0.1:
        return rng.choice(GARBAGE)
    if field.metadata["choices"]:
        return rng.choice(field.metadata["choices"])
    if kind is str:
        return rng.choice([str(field.default), "one", "two", "cpu", "all", "paper", "1,2", "4", "25%", "energy:0.9"])
    value = rng.choice([low if low is not None else -3, high if high is not None else 7, 1, 2, rng.random() * 3])
    return str(kind(value))


def random_command(config_class: type, rng: random.Random) -> list[str]:
    argv = []
    fields = dataclasses.fields(config_class)
    for field in rng.sample(fields, rng.randrange(min(6, len(fields) + 1))):
        flag = "--" + field.name.replace("_", "-")
        if kind_of(field, config_class) is bool:
            argv.append(rng.choice([flag, flag.replace("--", "--no-", 1)]))
        else:
            argv += [flag, *(random_value(field, config_class, rng) for _ in range(rng.choice([1, 1, 1, 1, 0, 2])))]
    return argv + rng.choice([[]] * 9 + [["--nonsense"], ["stray"]])


@pytest.mark.parametrize("name", ALL_SCRIPTS)
def test_a_random_command_line_is_settled_or_told_in_one_sentence(name: str, base: str) -> None:
    script, rng, accepted = ALL_SCRIPTS[name], random.Random(name), 0
    for _ in range(1000):
        argv = random_command(script.Config, rng)
        try:
            config = parse_config(script.Config, "", argv)
            if hasattr(script, "settle"):
                settled = script.settle(dataclasses.replace(config, base=base))
                assert all(value is not None for name, value in vars(settled).items() if name != "max_response")
                assert len(run_name(settled)) < 200
            accepted += 1
        except UserError as error:
            assert str(error) and "\n" not in str(error), argv
        except SystemExit:
            assert "--help" in argv or "-h" in argv
    assert 100 < accepted < 900


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_random_command_that_is_run_ends_well_or_in_one_sentence(
    name: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    script, rng = SCRIPTS[name], random.Random(name)
    small = {"train_rosd": ROSD, "train_spd": SPD, "subspace": ["--calibration-size", "20"]}.get(name, [])
    small = [*small, "--domain", "one", "--base", base, *(["--out", "out"] if name.startswith("train") else [])]
    fixed = ["base", "out", "steps", "batch", "group", "prompts", "rounds", "epochs", "threads", "compile", "bf16"]
    fixed += ["updates", "minibatches"]
    ends = {0: 0, 2: 0}
    monkeypatch.chdir(tmp_path)
    fields = [field for field in dataclasses.fields(script.Config) if field.name not in fixed]
    for _ in range(40):
        argv = [*small]
        for field in rng.sample(fields, min(len(fields), rng.randrange(1, 4))):
            flag = "--" + field.name.replace("_", "-")
            boolean = kind_of(field, script.Config) is bool
            argv += [flag] if boolean else [flag, random_value(field, script.Config, rng)]
        monkeypatch.setattr(sys, "argv", [name, *argv])
        code = 0
        try:
            run_script(script.main)
        except SystemExit as end:
            code = end.code
        told = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert code in ends and len(told) == (code == 2), argv
        ends[code] += 1
    assert min(ends.values()) > 0


# ---------------------------------------------------------------------------------------------- bad input, one by one


def corrupt(path: Path) -> Path:
    path.write_bytes(b"not a checkpoint")
    return path


def truncated(path: Path) -> Path:
    files.save_checkpoint(path, tiny_gpt(Letters()))
    path.write_bytes(path.read_bytes()[:1000])
    return path


def other_vocabulary(path: Path) -> Path:
    files.save_checkpoint(path, GPT(GPTConfig(7, n_layer=1, n_embd=8, n_head=1, n_kv_head=1, head_dim=4, n_hidden=8)))
    return path


BAD = [
    (["--method", "foo"], "--method"),
    (["--learning-rate", "nan"], "--learning-rate"),
    (["--eval-problems", "0"], "--eval-problems"),
    (["--eval-top-p", "1.5"], "--eval-top-p"),
    (["--seed", "-1"], "--seed"),
    (["--seed", "9" * 20], "--seed"),
    (["--threads", "9" * 20], "--threads"),
    (["--nonsense"], "--nonsense"),
    (["--domain", "three"], "no domain 'three'; give one of one, two"),
    (["--base", "/nowhere/base.pt"], "/nowhere/base.pt"),
    (["--base", corrupt], "damaged"),
    (["--base", truncated], "damaged"),
    (["--base", other_vocabulary], "vocabulary"),
    (["--device", "toaster"], "toaster"),
]
OWN = {
    "train_rosd": [
        (["--alpha", "3"], "--alpha"),
        (["--method", "grpo", "--mask", "whole"], "--mask"),
        (["--method", "grpo", "--learn-from", "wrong"], "--learn-from"),
        (["--finetune", "lora", "--ema", "0.1"], "give --ema 0 or --finetune full"),
        (["--finetune", "lora", "--preset", "released"], "give --ema 0"),  # of SDPO, the baseline
    ],
    "train_spd": [(["--prompts", "0"], "--prompts")],
}


@pytest.mark.parametrize(
    ("name", "flags", "cause"),
    [(name, flags, cause) for name, own in OWN.items() for flags, cause in BAD + own],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_gets_one_sentence_and_leaves_nothing(
    name: str,
    flags: list,
    cause: str,
    base: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = [str(flag(tmp_path / "bad.pt")) if callable(flag) else flag for flag in flags]
    monkeypatch.setattr(sys, "argv", [name, "--base", base, "--domain", "one", "--out", str(tmp_path / "out"), *flags])
    with pytest.raises(SystemExit) as stop:
        run_script(SCRIPTS[name].main)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and cause in printed.err and len(printed.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "flags", "cause"),
    [
        ("train_spd", ["--calibration-domain", "one", "three"], "no domain 'three'"),
        ("train_spd", ["--rank", "17"], "at most 16"),
        ("train_spd", ["--rank", "half"], "give a number like 16"),
        ("train_spd", ["--layers", "3"], "numbers from 1 to 2"),
        ("train_rosd", ["--mask", "oracle"], "knows no true first error"),
        ("subspace", ["--domain", "three"], "no domain 'three'"),
        ("subspace", ["--domain", "one", "--rank", "17"], "at most 16"),
        ("reflect", ["--domain", "three"], "no domain 'three'"),
        ("reflect", ["--domain", "one", "--base", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_settings_that_do_not_fit_task_or_model_get_one_sentence(
    name: str, flags: list, cause: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"train_rosd": ROSD, "train_spd": SPD}.get(name, [])
    out = ["--out", str(tmp_path / "out")] if small else []
    monkeypatch.setattr(sys, "argv", [name, *small, "--base", base, *out, *flags])
    with pytest.raises(UserError, match=cause):
        SCRIPTS[name].main()


def test_an_unknown_task_is_told_with_those_there_are() -> None:
    with pytest.raises(UserError, match="no task 'chess'; give arithmetic"):
        train_rosd.train(parse_config(train_rosd.Config, "", [*ROSD, "--task", "chess"]))


@pytest.mark.parametrize("name", ALL_SCRIPTS)
def test_help_explains_every_flag(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(ALL_SCRIPTS[name].Config, "", ["--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    for field in dataclasses.fields(ALL_SCRIPTS[name].Config):
        flag = "--" + field.name.replace("_", "-")
        assert (field.name if field.metadata["positional"] else flag) in printed


def test_ctrl_c_ends_with_a_word_and_130(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_script(main, "Stopped.")
    assert stop.value.code == 130 and capsys.readouterr().err.strip() == "Stopped."


def test_a_checkpoint_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "ROOT", tmp_path / "repository")
    (tmp_path / "repository" / "data").mkdir(parents=True)
    files.save_checkpoint(tmp_path / "repository" / "data" / "base.pt", tiny_gpt(Letters()))
    assert files.load_checkpoint("data/base.pt").config.n_layer == 2
    files.save_checkpoint(files.make_folder(tmp_path / "data") / "base.pt", tiny_gpt(Letters(), n_layer=3))
    assert files.load_checkpoint("data/base.pt").config.n_layer == 3


def test_an_output_folder_that_is_a_file_is_refused(base: str, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="choose another folder"):
        train_rosd.train(parse_config(train_rosd.Config, "", [*ROSD, "--base", base, "--out", str(tmp_path / "out")]))


def test_a_table_is_as_wide_as_its_widest_cell() -> None:
    assert markdown_table(["a", "bb"], [["ccc", ""]]) == "| a   | bb |\n|-----|----|\n| ccc |    |"
