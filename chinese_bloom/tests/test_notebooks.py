"""The notebooks run from top to bottom in a folder that holds nothing but the recipe, and what they show is so.

A short training stands for the whole one, and 20,000 rows for two million; `make notebooks` runs them as they are.
"""

import re
import shutil
import subprocess

import nbformat
from nbclient import NotebookClient
from ranks import RECIPE

SHORTER = ("ROWS = [20_000, 200_000, 2_000_000]", "ROWS = [2_000, 20_000]")
WRITTEN_BY_RUNS = shutil.ignore_patterns("output*", "opendata", "cache_data", "__pycache__", ".*_cache")


def execute(path) -> str:
    """What a notebook shows as text; an error in a cell ends it all."""
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        cell.source, cell.outputs = cell.source.replace(*SHORTER), []
    resources = {"metadata": {"path": path.parent}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output["text"] for output in outputs if output.get("name") == "stderr"]
    return "\n".join(output.get("text") or output["data"].get("text/plain", "") for output in outputs)


def test_raw_data_are_prepared_without_overlap(tmp_path):
    folder = shutil.copytree(RECIPE, tmp_path / "chinese_bloom", ignore=WRITTEN_BY_RUNS)
    text = execute(folder / "data_proj" / "process_data.ipynb")
    assert text.count("两边都有的问题") == 2 and len(re.findall(r"两边都有的问题.*： 0\n", text)) == 2
    assert "换了边的问题： 0\n" in text
    assert "turn 2 is Human's as well" in text
    assert float(re.search(r"内存是 ([\d.]+) 倍", text)[1]) < 1.2


def test_the_model_answers_in_every_way(tmp_path):
    folder = shutil.copytree(RECIPE, tmp_path / "chinese_bloom", ignore=WRITTEN_BY_RUNS, symlinks=True)
    command = ["bash", folder / "base_run.sh", "--max_steps", "40", "--save_strategy", "no", "--eval_strategy", "no"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert (folder / "infer.ipynb").resolve() == folder / "code05_infer.ipynb"
    text = execute(folder / "infer.ipynb")
    assert text.startswith("output：")
    assert "10/10 条与并排时一字不差" in text
    assert float(re.search(r"最大的差：(\S+?)，", text)[1]) < 1e-5
    assert text.count("|") > 10, "nothing came piece by piece"
    assert re.search(r"user ： What do whales eat\?\nassistant ： ", text), "the page gave no answer"
