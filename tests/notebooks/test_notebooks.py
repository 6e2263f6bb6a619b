"""Every notebook runs from end to end, on each backend."""

import pathlib

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "notebooks"


@pytest.mark.parametrize("notebook", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(notebook, tmp_path):
    content = nbformat.read(notebook, as_version=4)
    # The kernel inherits KERAS_BACKEND, and writes into its own folder.
    nbclient.NotebookClient(content, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "captain" / "model.safetensors").exists()
