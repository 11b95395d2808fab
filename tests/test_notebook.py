"""The notebook runs from its first cell to its last, shows its outputs, and says what it promises."""

import json

import pytest

from harness import files

NOTEBOOK = files.ROOT / "docs" / "one_rollout.ipynb"


def test_a_reader_on_the_web_sees_formulas_and_pictures() -> None:
    cells = json.loads(files.read_text(NOTEBOOK))["cells"]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert r"\frac{\sum_t" in text and r"\\" not in text  # MathJax shows two backslashes as a line break
    assert all(cell["outputs"] or "print" not in "".join(cell["source"]) for cell in cells if "outputs" in cell)
    assert sum("image/png" in o.get("data", {}) for cell in cells for o in cell.get("outputs", [])) == 2


def test_the_notebook_runs_and_the_loss_by_hand_is_that_of_the_loop() -> None:
    nbformat, nbconvert = pytest.importorskip("nbformat"), pytest.importorskip("nbconvert.preprocessors")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    notebook = nbformat.read(NOTEBOOK, 4)
    run = nbconvert.ExecutePreprocessor(timeout=300)
    run.preprocess(notebook, {"metadata": {"path": str(NOTEBOOK.parent)}})
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    by_hand, in_loop = printed.split("by hand ")[1].split("   train_rosd.rosd_loss ")
    assert float(by_hand) == pytest.approx(float(in_loop.split()[0]), abs=2e-6)
