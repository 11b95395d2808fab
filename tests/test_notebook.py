"""The notebook runs from its first cell to its last, and says what it promises."""

import json

import pytest

from harness import files

NOTEBOOK = files.ROOT / "docs" / "one_rollout.ipynb"


def test_the_notebook_is_committed_without_outputs() -> None:
    cells = json.loads(files.read_text(NOTEBOOK))["cells"]
    assert all(not cell.get("outputs") for cell in cells)


def test_the_notebook_runs_and_the_loss_by_hand_is_that_of_the_loop() -> None:
    nbformat, nbconvert = pytest.importorskip("nbformat"), pytest.importorskip("nbconvert.preprocessors")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    notebook = nbformat.read(NOTEBOOK, 4)
    run = nbconvert.ExecutePreprocessor(timeout=300)
    run.preprocess(notebook, {"metadata": {"path": str(NOTEBOOK.parent)}})
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    by_hand, in_loop = printed.split("by hand ")[1].split("   train_rosd.update ")
    assert float(by_hand) == pytest.approx(float(in_loop.split()[0]), abs=2e-6)
    assert sum("image/png" in o.get("data", {}) for cell in notebook.cells for o in cell.get("outputs", [])) == 2
