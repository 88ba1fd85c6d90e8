"""The notebooks run from top to bottom in a folder that holds nothing but the recipe, and what they show is so.

They train for an epoch or a few steps here; what the full training reaches is asked by `make defaults`.
"""

import json
import re
import shutil

import nbformat
import pytest
from nbclient import NotebookClient
from ranks import RECIPE

SHORTER = {
    "num_train_epochs=4": "num_train_epochs=1",
    '"train_ds.sh"': '"train_ds.sh", *"--max_steps 10 --learning_rate 1e-2 --save_strategy no".split()',
}
WRITTEN_BY_RUNS = shutil.ignore_patterns("output*", "cache_data", "__pycache__", ".*_cache", ".ipynb_checkpoints")


def execute(folder, name: str) -> str:
    """What a notebook shows as text; an error in a cell ends it all."""
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        cell.outputs = []
        for text, shorter in SHORTER.items():
            cell.source = cell.source.replace(text, shorter)
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
    assert checked == ["1080"] * 5
    assert "8/8 个文件一字节不差" in text
    assert re.findall(r"两边都有的问题： (\d+)", text) == ["0", "0"]
    assert re.findall(r"只选长的，..集上的准确率： ([\d.]+)", text) == ["0.53", "0.55"]
    assert re.search(r"^与整段对话的重合 +0.719 ", text, re.M), "the overlap on real pairs"


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


def test_model_that_is_trained_on_the_spot_is_compared_scored_exported_and_served(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setenv("MODEL", tiny_folder)  # else train_ds.sh would first do an SFT
    monkeypatch.setenv("NPROC", "1")
    folder = shutil.copytree(RECIPE, tmp_path / "baichuan2_dpo", ignore=WRITTEN_BY_RUNS)
    text = execute(folder, "infer")
    assert "训练前： 同一个模型，关掉适配器\n" in text
    scores = re.findall(r"^回答[一二] +(\d+) +(-[\d.]+) +(-[\d.]+) +(-?[\d.]+) +(-?[\d.]+) +[01]$", text, re.M)
    (_, *first), (_, *second) = [map(float, row) for row in scores]
    for before, after, reward, _ in (first, second):
        assert reward == pytest.approx(0.1 * (after - before), abs=1e-3) and reward != 0
    assert first[-1] == pytest.approx(first[2] - second[2], abs=2e-3)
    results = json.loads((folder / "output_zero2" / "train_results.json").read_text())["after"]
    for file in (folder / "data" / "validation").iterdir():
        pairs, found = re.search(rf"^{file.stem} +(\d+) +(\S+) ", text, re.M).groups()
        assert int(pairs) == len(file.read_text(encoding="utf-8").splitlines())
        assert float(found) == pytest.approx(results[f"{file.stem}/rewards/accuracies"], abs=0.006), file
    assert text.count("相同： True\n") == 3 and "Closing server" in text
