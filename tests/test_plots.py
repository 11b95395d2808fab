"""Pictures: drawn from results files alone, one by one, with letters that stay letters."""

import random
import sys
from pathlib import Path

import pytest

from errors import UserError
from harness import files
from tools import plots, stats
from tools.studies import STUDIES

NEEDS = {
    "curves": "curves",
    "reflection": "curves",
    "collapse": "collapse",
}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder in which every study has run, with invented figures."""
    rng = random.Random(0)
    monkeypatch.setattr(stats, "RESULTS", tmp_path)
    for name in set(NEEDS.values()):
        study, runs = STUDIES[name], []
        for variant, flags in study.variants.items():
            for base in (0, 1, 2):
                scores = {d: {"mean": rng.random(), "unfinished": 0.0} for d in ("mix", "add", "sub")}
                run = {"variant": variant, "base": base, "seed": 0, "flags": f"{study.flags} {flags}".strip()}
                run |= {"domain": "mix", "before": scores, "after": scores, "updates": 40, "rollouts": 10240}
                run["curve"] = {c: [rng.random() if i % 4 == 3 else None for i in range(40)] for c in study.curve}
                runs.append(run)
        content = {"study": name, "script": study.script, "reference": study.reference, "planned": len(runs)}
        files.write_json(tmp_path / f"{name}.json", content | {"runs": runs})
    columns = ["base", "layers", "project", "rank", "subspace", "draw", "rest", "right", "check"]
    rows = [[base, "", "", 100, "none", 0, -5, -0.4, 0.8] for base in range(5)]
    rows += [[base, "1", "k", 35, kind, 0, -2, -0.5, 0.4] for base in range(5) for kind in plots.SUBSPACES]
    files.write_json(tmp_path / "spd-mechanism.json", {"S": 4, "columns": columns, "rows": rows})
    return tmp_path


def test_every_picture_is_drawn_with_text_as_text(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["plots"])
    plots.main()
    assert capsys.readouterr().out.count(".svg") == len(plots.PICTURES)
    words = {
        "curves": "GRPO as released",
        "collapse": "suffix mask, EMA 0.03",
        "spd-mechanism": "aligned loss",
    }
    for name in plots.PICTURES:
        text = files.read_text(results / f"{name}.svg")
        assert "<svg" in text and "<text" in text and "NaN" not in text
        assert f">{words.get(name, '')}" in text


def test_a_name_draws_one_picture_and_help_draws_none(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["plots", "--help"])
    with pytest.raises(SystemExit):
        plots.main()
    assert not list(results.glob("*.svg"))
    monkeypatch.setattr(sys, "argv", ["plots", "collapse"])
    plots.main()
    assert [path.name for path in results.glob("*.svg")] == ["collapse.svg"]


@pytest.mark.parametrize("name", plots.PICTURES)
def test_a_missing_study_is_told_with_the_command_that_makes_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats, "RESULTS", tmp_path)
    with pytest.raises(UserError, match=rf"`python -m tools\.(study {NEEDS.get(name)}|mechanism)`"):
        plots.PICTURES[name]()


def test_curves_start_at_the_base_and_count_updates_and_rollouts() -> None:
    scores = {"mix": {"mean": 0.5}, "add": {"mean": 0.1}, "sub": {"mean": 0.3}}
    curve = {"accuracy": [0.4, 0.6], "away": [None, 0.7]}
    run = {"base": 0, "seed": 0, "domain": "mix", "before": scores, "updates": 8, "rollouts": 512, "curve": curve}
    assert plots.curve([run], "away") == {0: {(0, 0): pytest.approx(0.2)}, 2: {(0, 0): 0.7}}
    assert list(plots.curve([run], "away", "updates")) == [0, 8]
    assert list(plots.curve([run], "away", "rollouts")) == [0, 512]
    assert plots.curve([run], "accuracy") == {0: {(0, 0): 0.4}, 1: {(0, 0): 0.6}}  # of rollouts before an update
