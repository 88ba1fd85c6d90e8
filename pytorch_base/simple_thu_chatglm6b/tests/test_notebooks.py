"""The notebooks run from top to bottom in a folder that holds nothing but the recipe, and what they show is so."""

import re
import shutil

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import RECIPE

NAMES = ("code01_processdata", "code02_trainmodel", "infer")
pytestmark = pytest.mark.xdist_group("notebooks")  # all in one worker: they are executed once
WRITTEN_BY_RUNS = shutil.ignore_patterns("output*", "cache_data", "__pycache__", ".*_cache", ".ipynb_checkpoints")


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict[str, str]:
    """What each notebook shows as text; infer finds the model that code02 trained. An error in a cell ends it all."""
    folder = tmp_path_factory.mktemp("copy") / "simple_thu_chatglm6b"
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
    return texts


def test_labels_end_with_the_next_turn(shown):
    text = shown["code01_processdata"]
    assert "⟦我是一个中文助手。<|user|>⟧" in text and "⟦四个。<|endoftext|>⟧" in text
    assert text.count("与原文一致：True") == 3 and "NUL at byte" in text
    assert "bad.jsonl:1: no output" in text and "the text holds the control token <|assistant|>" in text


def test_training_answers_what_it_has_not_seen(shown):
    text = shown["code02_trainmodel"]
    before, after = map(float, re.search(r"验证损失\s+([\d.]+)\s+([\d.]+)", text).groups())
    assert after < before / 4
    asked, right = map(int, re.search(r"验证题 (\d+) 道，一字不差 (\d+) 道", text).groups())
    assert asked >= 20 and right >= asked / 2
    assert re.search(r"可训练 73,728 / ", text)


def test_trained_model_answers_in_every_way(shown):
    text = shown["infer"]
    assert text.startswith("output_notebook：GlmForCausalLM")
    assert "'<|endoftext|>', '<|user|>', '<|observation|>'" in text
    assert text.count("|") > 10, "nothing came piece by piece"
    assert re.search(r"assistant ： .*屈原。", text), "the page gave no answer"
    assert "Closing server" in text
