"""The notebooks run from top to bottom in a folder that holds nothing but the recipe, and what they show is so.

They train for a few epochs here; what the full training reaches is asked by `make defaults`.
"""

import re
import shutil

import nbformat
from nbclient import NotebookClient
from ranks import RECIPE

SHORTER = ("num_train_epochs=8", "num_train_epochs=3")
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


def test_labels_end_with_the_next_turn(tmp_path):
    folder = shutil.copytree(RECIPE, tmp_path / "simple_thu_chatglm6b", ignore=WRITTEN_BY_RUNS)
    text = execute(folder, "code01_processdata")
    assert "⟦我是一个中文助手。<|user|>⟧" in text and "⟦四个。<|endoftext|>⟧" in text
    assert text.count("与原文一致：True") == 3 and "NUL at byte" in text
    assert "bad.jsonl:1: no output" in text and "the text holds the control token <|assistant|>" in text


def test_training_lowers_the_loss_and_the_model_answers_in_every_way(tmp_path):
    folder = shutil.copytree(RECIPE, tmp_path / "simple_thu_chatglm6b", ignore=WRITTEN_BY_RUNS)
    text = execute(folder, "code02_trainmodel")
    before, after = map(float, re.search(r"验证损失\s+([\d.]+)\s+([\d.]+)", text).groups())
    assert after < before / 4
    assert int(re.search(r"验证题 (\d+) 道，一字不差 \d+ 道", text)[1]) >= 20
    assert re.search(r"可训练 73,728 / ", text)

    text = execute(folder, "infer")  # with the model that code02 has trained
    assert text.startswith("output_notebook：GlmForCausalLM")
    assert "'<|endoftext|>', '<|user|>', '<|observation|>'" in text
    assert text.count("|") > 10, "nothing came piece by piece"
    assert re.search(r"assistant ： .{2,}", text), "the page gave no answer"
    assert "Closing server" in text
