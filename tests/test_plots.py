"""Every picture is drawn from the committed results."""

import shutil
from pathlib import Path

import pytest

import plots
import runs


@pytest.mark.parametrize("draw", plots.PICTURES, ids=lambda draw: draw.__name__)
def test_a_picture_is_drawn_and_committed(draw: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    for path in runs.RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    drawn = draw()
    text = drawn.read_text()
    assert "<svg" in text and "<text" in text  # letters stay letters: searchable, and in the colours of the page
    assert (runs.ROOT / "results" / drawn.name).exists()


def test_a_missing_result_is_told_with_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    with pytest.raises(runs.UserError, match="rosd-curves"):
        plots.learning_curves()
