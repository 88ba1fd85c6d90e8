"""The notebooks run from top to bottom in a folder that holds nothing but the recipe, and what they show is so."""

import re
import shutil

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import RECIPE

NOTEBOOKS = ("code01_processdata", "code02_trainmodel", "infer")
WRITTEN_BY_RUNS = shutil.ignore_patterns("output*", "cache_data", "__pycache__", ".*_cache", ".ipynb_checkpoints")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[str, str]:
    """What each notebook shows as text; infer finds the model that code02 trained. An error in a cell ends it all."""
    folder = tmp_path_factory.mktemp("copy") / "chinese_classifier"
    shutil.copytree(RECIPE, folder, ignore=WRITTEN_BY_RUNS)
    texts = {}
    for name in NOTEBOOKS:
        notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for cell in cells:
            cell.outputs = []
            cell.source = cell.source.replace("num_train_epochs=3", "num_train_epochs=1")
            cell.source = cell.source.replace("((500, 12), (1500, 6), (4500, 3))", "((500, 1),)")
        NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
        shown = [output for cell in cells for output in cell.outputs]
        texts[name] = "\n".join(output.get("text") or output["data"].get("text/plain", "") for output in shown)
        assert not [output["text"] for output in shown if output.get("name") == "stderr"]
    return texts


def test_reviews_are_split_without_copies(outputs):
    text = outputs["code01_processdata"]
    assert re.search(r"train +13,866 rows .*\nvalidation +1,732 rows .*\ntest +1,735 rows", text)
    assert "训练集与测试集共有的话： 0\n" in text and "训练集与验证集共有的话： 0\n" in text
    assert "bad.csv:3: the row that begins here has broken quotes" in text
    assert "two encodings in one file, GB18030 in line 2 and UTF-8 in line 5" in text
    assert "bad.csv:3: a cell that begins here holds 3 lines that look like rows" in text and "probably Big5" in text
    assert "train rows: output_tables/split/train_data.csv\nvalidation rows: output_tables/split/Dev.tsv" in text
    assert re.search(r"地名 +31302", text), "the word lists are missing"


def test_the_small_encoder_learns_and_the_linear_model_wins(outputs):
    text = outputs["code02_trainmodel"]
    linear, small = map(float, re.search(r"\n13866 +([\d.]+) +([\d.]+)", text).groups())
    assert 0.75 < small < linear and linear == pytest.approx(0.8457, abs=0.002)
    few, _ = map(float, re.search(r"\n500 +([\d.]+) +([\d.]+)", text).groups())
    assert few < linear
    assert re.search(r"与“酒店”最近的词： .*宾馆", text)


def test_the_trained_model_is_used_in_every_way(outputs):
    text = outputs["infer"]
    assert text.startswith("output_notebook：")
    assert "结果相同：True" in text
    assert re.search(r"003 +送货太慢，包装也破了 +负面", text) and re.search(r"002 +NaN", text)
    assert re.search(r"得分的最大差别：\d", text)
    assert re.search(r"负面 \[\('负面', 0\.\d+\), \('正面', 0\.\d+\)\]", text), "the page gave no answer"


def test_both_names_of_the_third_notebook_are_one_file():
    assert (RECIPE / "code03_predict.ipynb").read_bytes() == (RECIPE / "infer.ipynb").read_bytes()
