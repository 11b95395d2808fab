"""The computed memory against known sizes, and the table in the document against the tool."""

import sys
from pathlib import Path

import pytest

from harness import files
from tools.memory import Config, gigabytes, main

P = 596_049_920 / 2**30  # weights of Qwen3-0.6B, as its safetensors hold them


def test_full_training_takes_18_bytes_a_weight_and_low_rank_updates_little_more_than_two() -> None:
    full, lora = (gigabytes("Qwen3-0.6B", finetune, Config()) for finetune in ("full", "lora"))
    assert sum(full[part] for part in ("weights", "gradients", "AdamW")) == pytest.approx(18 * P)
    assert 2 * P < sum(lora[part] for part in ("weights", "gradients", "AdamW")) < 2.1 * P


def test_the_documents_table_is_what_the_tool_prints(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["memory"])
    main()
    assert capsys.readouterr().out in files.read_text(files.ROOT / "docs" / "real_models.md")


def test_peaks_of_finished_runs_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_json(tmp_path / "results.json", {"name": "run", "peak_memory_mb": 123.4})
    monkeypatch.setattr(sys, "argv", ["memory", "--results", str(tmp_path / "results.json")])
    main()
    assert "| run | 123" in capsys.readouterr().out
