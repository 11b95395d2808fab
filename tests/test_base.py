"""The shipped base passes the gates of the hint audit, and its script refuses bad input."""

import sys
from pathlib import Path

import pytest
import torch

import pretrain
from harness import files
from harness.cli import run_script


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    return pretrain.audit(files.load_checkpoint(files.BASE_CHECKPOINT), "mix", count=96, seed=1)


def test_the_checkpoint_is_small_and_loads_without_running_code() -> None:
    assert files.BASE_CHECKPOINT.stat().st_size < 1_000_000
    assert set(torch.load(files.BASE_CHECKPOINT, weights_only=True)) == {"config", "model"}


def test_the_content_of_a_hint_counts_and_nothing_else(found: dict[str, float]) -> None:
    assert pretrain.missed_gates(found) == []


def test_a_gate_that_is_missed_is_named(found: dict[str, float]) -> None:
    assert pretrain.missed_gates(found | {"the true step": 0.5}) == ["the true step"]
    far = found | {"an irrelevant hint": found["no hint"] + 0.1}
    assert any("within 0.08" in name for name in pretrain.missed_gates(far))


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (["--width", "12"], "--width"),
        (["--muon-rate", "1e30", "--steps", "2", "--batch", "2"], "not finite"),
        (["--check-only", "--out", "nowhere.pt"], "nowhere.pt"),
    ],
    ids=" ".join,
)
def test_bad_input_gets_one_sentence_and_writes_nothing(
    flags: list[str], cause: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = [] if "--out" in flags else ["--out", str(tmp_path / "base.pt")]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *flags, *out])
    with pytest.raises(SystemExit) as stop:
        run_script(pretrain.main)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and cause in error
    assert not list(tmp_path.iterdir())


def test_a_small_base_is_made_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = files.checksum(files.BASE_CHECKPOINT)
    small = ["--steps", "2", "--batch", "2", "--layers", "2", "--width", "8", "--out", str(tmp_path / "base.pt")]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *small])
    monkeypatch.setattr(pretrain, "report", lambda model: None)
    pretrain.main()
    assert files.load_checkpoint(tmp_path / "base.pt").config.n_embd == 8
    assert files.checksum(files.BASE_CHECKPOINT) == shipped


@pytest.mark.parametrize("slack", [False, True])
def test_keys_and_values_change_their_optimizer_for_slack(slack: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is trained once; AdamW has the first layer's values, or with slack the keys and values of all."""
    trained: dict[str, list[torch.Tensor]] = {}
    for name in ("Muon", "AdamW"):
        kind = getattr(torch.optim, name)

        def record(parameters: list, kind: type = kind, name: str = name, **settings: float) -> torch.optim.Optimizer:
            parameters = list(parameters)
            trained[name] = [p for part in parameters for p in (part["params"] if isinstance(part, dict) else [part])]
            return kind(parameters, **settings)

        monkeypatch.setattr(torch.optim, name, record)
    model = pretrain.pretrain(pretrain.Config(steps=1, batch=2, layers=2, width=8, slack=slack))
    keys_and_values = {id(part.weight) for b in model.blocks for part in (b.attn.k_proj, b.attn.v_proj)}
    expected = keys_and_values if slack else {id(model.blocks[0].attn.v_proj.weight)}
    assert set(map(id, trained["AdamW"])) & keys_and_values == expected
    assert sorted(map(id, trained["Muon"] + trained["AdamW"])) == sorted(map(id, model.parameters()))
