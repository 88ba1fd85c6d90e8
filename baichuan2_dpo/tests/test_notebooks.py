"""The notebooks run from top to bottom in a folder that holds nothing but the recipe, and what they show is so.

They train for one epoch here; what the full training reaches is asked by `make defaults`.
"""

import re
import shutil

import nbformat
from nbclient import NotebookClient
from ranks import RECIPE

SHORTER = ("num_train_epochs=4", "num_train_epochs=1")
WRITTEN_BY_RUNS = shutil.ignore_patterns("output*", "cache_data", "__pycache__", ".*_cache", ".ipynb_checkpoints")


def execute(folder, name: str) -> str:
    """What a notebook shows as text; an error in a cell ends it all."""
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        cell.source, cell.outputs = cell.source.replace(*SHORTER), []
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output["text"] for output in outputs if output.get("name") == "stderr"]
    return "\n".join(output.get("text") or output["data"].get("text/plain", "") for output in outputs)


def test_every_format_is_one_pair_and_no_prompt_is_on_both_sides(tmp_path):
    folder = shutil.copytree(RECIPE, tmp_path / "baichuan2_dpo", ignore=WRITTEN_BY_RUNS)
    text = execute(folder, "code01_processdata")
    assert "拆出来不同的有几种： 1\n" in text
    assert len(set(re.findall(r"bad.jsonl:(\d+): \w", text))) == 11
    assert re.search(r"坏  ⟦.+</s>⟧", text), "no pair is shown with its replies"
    checked = re.findall(r"^(?:回答|问题与|从第一个|一直学到|解码就是).*?(\d+)$", text, re.M)
    assert checked == ["1020"] * 5
    assert "7/7 个文件一字节不差" in text
    assert re.findall(r"两边都有的问题： (\d+)", text) == ["0", "0"]
    assert re.findall(r"只选长的，..集上的准确率： ([\d.]+)", text) == ["0.53", "0.55"]


def test_training_starts_at_log_2_and_learns_what_can_be_learned(tmp_path):
    folder = shutil.copytree(RECIPE, tmp_path / "baichuan2_dpo", ignore=WRITTEN_BY_RUNS)
    text = execute(folder, "code02_trainmodel")
    first, second = re.findall(r"^损失 ([\d.]+)", text, re.M)
    assert first == "0.6931" and float(second) < 0.6931
    starts = re.findall(r"^0 +[\d.]+ +(0.6931) +[\d.]+ +(0.50*) ", text, re.M)  # of the good run and of the timid one
    assert len(starts) == 2
    for kind in ("helpful", "polite"):
        pairs, before, after, _ = re.search(rf"^{kind}　\S+ +(\S+) +(\S+) +(\S+) +(\S+)$", text, re.M).groups()
        assert (pairs, float(before)) == ("30", 0.5) and float(after) > 0.6, kind
    assert len(re.findall(r"^问：.+(?:\n    \S.*：.*){4}$", text, re.M)) == 3
