"""The notebooks run from top to bottom in a folder that holds nothing but the recipe, and what they show is so."""

import re
import shutil

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import RECIPE

NAMES = ("code01_processdata", "code02_trainmodel", "infer")
WRITTEN_BY_RUNS = shutil.ignore_patterns("output*", "cache_data", "__pycache__", ".*_cache", ".ipynb_checkpoints")


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict[str, str]:
    """What each notebook shows as text; infer finds the model that code02 trained. An error in a cell ends it all."""
    folder = tmp_path_factory.mktemp("copy") / "train_qwen"
    shutil.copytree(RECIPE, folder, ignore=WRITTEN_BY_RUNS)
    texts = {}
    for name in NAMES:
        notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for cell in cells:
            cell.outputs = []
        NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
        outputs = [output for cell in cells for output in cell.outputs]
        texts[name] = "\n".join(output.get("text") or output["data"].get("text/plain", "") for output in outputs)
        assert not [output["text"] for output in outputs if output.get("name") == "stderr"]
    assert (folder / "output_idioms" / "train.jsonl").exists()
    assert (folder / "output_notebook" / "model.safetensors").exists()
    return texts


def test_idioms_are_split_without_overlap(shown):
    text = shown["code01_processdata"]
    assert re.search(r"两边都有的成语： 0\n", text) and re.search(r"两边都有的释义： 0\n", text)
    assert text.count("与原文一致：True") == 3
    assert "NUL at byte" in text and "bad.jsonl:1: no output" in text
    assert re.search(r"⟦.+<\|im_end\|>⟧", text), "no sample is shown with its labels"


def test_training_lowers_the_held_out_loss(shown):
    text = shown["code02_trainmodel"]
    before, after = map(float, re.search(r"验证损失\s+([\d.]+)\s+([\d.]+)", text).groups())
    assert after < before * 2 / 3
    asked, right = map(int, re.search(r"训练 有\s+(\d+)\s+(\d+)", text).groups())
    assert asked == 20 and right >= 16


def test_trained_model_answers_in_every_way(shown):
    text = shown["infer"]
    assert text.startswith("output_notebook：")
    assert "“画蛇添足”的意思是做了多余的事" in text
    assert text.count("|") > 10, "nothing came piece by piece"
    assert re.search(r"assistant ： .*用肺呼吸。", text), "the page gave no answer"
    assert "Closing server" in text
