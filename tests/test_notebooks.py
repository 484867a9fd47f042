"""The notebooks of the docs: each runs from its first cell to its last, as an installation has them."""

import importlib.util
import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
SMALL = 100_000
"""Bytes, outputs included."""

notebooks = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def executed():
    spec = importlib.util.spec_from_file_location("lora_plugins_run_notebooks", DOCS / "run_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.executed


@notebooks
@pytest.mark.slow
@pytest.mark.timeout(900)  # 20 s of a processor, which on a crowded machine may take minutes
@pytest.mark.filterwarnings("ignore:Jupyter is migrating its paths:DeprecationWarning")
def test_it_runs(notebook, executed, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cells = executed(notebook).cells
    assert all(cell.execution_count for cell in cells if cell.cell_type == "code")


@notebooks
def test_it_is_small_and_shows_what_it_printed(notebook):
    assert notebook.stat().st_size < SMALL
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not [output for output in outputs if output["output_type"] == "error"]


def test_each_is_linked():
    page = (DOCS / "notebooks.md").read_text()
    assert all(f"(notebooks/{path.name})" in page for path in NOTEBOOKS)
