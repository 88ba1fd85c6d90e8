"""The notebooks run from top to bottom in a folder that holds nothing but the recipe, and what they show is so.

They train for a few epochs here; what the full training reaches is asked by `make demo` and `make defaults`.
"""

import re
import shutil

import nbformat
from nbclient import NotebookClient
from ranks import RECIPE

SHORTER = ("num_train_epochs=16", "num_train_epochs=6")
WRITTEN_BY_RUNS = shutil.ignore_patterns("output*", "cache_data", "__pycache__", ".*_cache", ".ipynb_checkpoints")


def execute(folder, name: str) -> str:
    """What a notebook shows as text; an error in a cell ends it all."""
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        cell.source, cell.outputs = cell.source.replace(*SHORTER), []
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output["text"] for output in outputs if output.get("name") == "stderr"]
    return "\n".join(output.get("text") or output["data"].get("text/plain", "") for output in outputs)


def test_idioms_are_split_without_overlap(tmp_path):
    folder = shutil.copytree(RECIPE, tmp_path / "train_qwen", ignore=WRITTEN_BY_RUNS)
    text = execute(folder, "code01_processdata")
    assert (folder / "output_idioms" / "train.jsonl").exists()
    assert re.search(r"两边都有的成语： 0\n", text) and re.search(r"两边都有的释义： 0\n", text)
    assert text.count("与原文一致：True") == 3
    assert "NUL at byte" in text and "bad.jsonl:1: no output" in text
    assert re.search(r"⟦.+<\|im_end\|>⟧", text), "no example is shown with its labels"


def test_training_lowers_the_loss_and_the_model_answers_in_every_way(tmp_path):
    folder = shutil.copytree(RECIPE, tmp_path / "train_qwen", ignore=WRITTEN_BY_RUNS)
    text = execute(folder, "code02_trainmodel")
    before, after = map(float, re.search(r"验证损失\s+([\d.]+)\s+([\d.]+)", text).groups())
    assert after < before * 2 / 3
    assert re.search(r"训练 有\s+20\s+\d+", text)

    text = execute(folder, "infer")  # with the model that code02 has trained
    assert text.startswith("output_notebook：")
    assert text.count("|") > 10, "nothing came piece by piece"
    assert re.search(r"assistant ： .{5,}", text), "the page gave no answer"
    assert "Closing server" in text
