"""The notebooks run from top to bottom in a folder that holds nothing but the recipe, one after the other."""

import shutil

import nbformat
from nbclient import NotebookClient

from conftest import RECIPE

WRITTEN_BY_RUNS = shutil.ignore_patterns("output*", "cache_data", "__pycache__", ".*_cache", ".ipynb_checkpoints")


def test_notebooks_run(tmp_path):
    folder = tmp_path / "train_qwen"
    shutil.copytree(RECIPE, folder, ignore=WRITTEN_BY_RUNS)
    for name in ("code01_processdata", "code02_trainmodel", "infer"):
        notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = []
        NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
        code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert any(cell.outputs for cell in code_cells)
        errors = [output for cell in code_cells for output in cell.outputs if output.output_type == "error"]
        assert not errors
    assert (folder / "output_idioms" / "train.jsonl").exists()
    assert (folder / "output_notebook" / "model.safetensors").exists()
