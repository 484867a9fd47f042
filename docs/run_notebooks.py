"""Runs the notebooks, each in a folder of its own, and keeps what they print: `make notebooks`."""

import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "notebooks"
SECONDS = 800
"""For one cell; alone on two cores a whole notebook takes less than 60."""


def executed(path: Path) -> Any:
    """Returns a notebook with what its cells give, without what goes to the error stream.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"timeout": SECONDS, "kernel_name": "python3", "record_timing": False}
        NotebookClient(notebook, resources={"metadata": {"path": folder}}, **settings).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    for each in sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(executed(each), each)
