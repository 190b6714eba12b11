"""recipes/tutorial.ipynb runs from top to bottom, and what it shows is stored in it."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).resolve().parents[1] / "recipes" / "tutorial.ipynb"
SMALLER = {"training.iterations=80": "training.iterations=3", "=256": "=32", "trajectories=64": "trajectories=8"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own
def test_the_tutorial_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(PATH.parents[1]))
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path / "assets"))
    notebook = nbformat.read(PATH, as_version=4)
    for cell in notebook.cells:
        for plain, small in SMALLER.items():
            cell.source = cell.source.replace(plain, small)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "runs" / "tutorial" / "evaluation.json").is_file()


def test_its_pictures_are_stored_in_line():
    outputs = [output for cell in nbformat.read(PATH, as_version=4).cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert not [output for output in outputs if output.output_type == "error"]
