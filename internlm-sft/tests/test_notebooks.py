"""The notebooks run from top to bottom in a folder that holds nothing but the recipe, and what they show is so.

The model is trained for a few steps here; what the full training reaches is asked by `make defaults`.
"""

import re
import shutil

import nbformat
from nbclient import NotebookClient
from ranks import RECIPE

SHORTER = ('["bash", "train.sh"]', '["bash", "train.sh", "--max_steps", "20", "--save_strategy", "no"]')
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


def test_persona_is_written_for_another_name_and_mistakes_are_refused(tmp_path):
    folder = shutil.copytree(RECIPE, tmp_path / "internlm-sft", ignore=WRITTEN_BY_RUNS)
    text = execute(folder, "code01_processdata")
    assert re.search(r"普通的行里提到.*： 0\n", text) and re.search(r"人设的行里什么都没提到的：\s+0\n", text)
    assert float(re.search(r"是人设的 ([\d.]+) 倍", text)[1]) >= 2
    assert "还有没换掉的吗： False" in text
    assert '"你叫什么？"' in text and "Hello! I am 小爱, an AI assistant developed by 云杉工作室." in text
    assert "--name is empty" in text and "holds the control token <|im_end|>" in text
    assert "has an answer of the persona and an ordinary one" in text and "bad_row.jsonl:1: " in text
    assert "写了什么吗： False" in text and "note: fewer than two ordinary rows" in text
    assert re.search(r"⟦[^⟧]*小爱[^⟧]*<\|im_end\|>⟧", text), "no row is shown with its labels"


def test_model_that_is_trained_on_the_spot_is_asked_in_every_way(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setenv("MODEL", tiny_folder)  # else train.sh would first train a base
    folder = shutil.copytree(RECIPE, tmp_path / "internlm-sft", ignore=WRITTEN_BY_RUNS)
    text = execute(folder, "infer")
    assert re.search(r"^output：基座 [\d,]+ 个参数，适配器 [\d,]+ 个", text, re.MULTILINE)
    assert re.search(r"^0+1+$", text, re.MULTILINE), "no prompt was padded on the left"
    assert "并排问与逐条问相同： True" in text and "回答与“基座 + 适配器”相同： True" in text
    assert all(name in text for name in ("identity accuracy", "refusal recall", "false refusal", "false identity"))
    assert "Closing server" in text
