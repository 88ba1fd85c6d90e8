"""The notebooks run from top to bottom in a folder that holds nothing but the recipe, and what they show is so.

The model that they ask has random weights here, and learns for two steps; what the default's model answers is asked by
`make defaults`.
"""

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
from nbclient import NotebookClient
from ranks import RECIPE

SHORTER = (("PICTURES = 320", "PICTURES = 20"), ("--num_train_epochs 6", "--max_steps 2"))
WRITTEN_BY_RUNS = shutil.ignore_patterns("output*", "cache_data", "__pycache__", ".*_cache", ".ipynb_checkpoints")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import torch

    from data01_scenes import QUESTIONS
    from infer import load_trained_model
    from tiny import build_tiny_model

    folder = shutil.copytree(
        RECIPE, tmp_path_factory.mktemp("lessons") / "train_llava", symlinks=True, ignore=WRITTEN_BY_RUNS
    )
    build_tiny_model(["".join(wordings) for wordings in QUESTIONS.values()], str(folder / "output_zero2"))
    model, _ = load_trained_model(str(folder / "output_zero2"))
    generator = torch.Generator().manual_seed(0)
    for weight in model.model.language_model.parameters():  # so that it has something to say
        if weight.ndim == 2:
            weight.data.normal_(std=0.2, generator=generator)
    model.save_pretrained(folder / "output_zero2")
    return folder


def execute(folder, name: str) -> str:
    """What a notebook shows as text; an error in a cell ends it all."""
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        for long, short in SHORTER:
            cell.source = cell.source.replace(long, short)
        cell.outputs = []
    NotebookClient(notebook, timeout=150, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output["text"] for output in outputs if output.get("name") == "stderr"]
    return "\n".join(output.get("text") or output["data"].get("text/plain", "") for output in outputs)


def test_the_lessons(folder):
    assert os.readlink(RECIPE / "infer.ipynb") == "code05_infer.ipynb"
    names = sorted(path.stem for path in RECIPE.glob("*.ipynb") if not path.is_symlink())
    with ThreadPoolExecutor(2) as pool:
        shown = dict(zip(names, pool.map(lambda name: execute(folder, name), names), strict=True))

    infer, lora = shown["code05_infer"], shown["code05_infer_lora"]
    assert "27 个 token，其中图片 16 个" in infer and "'pixel_values': (1, 3, 64, 64)" in infer
    assert "4/4 条相同" in infer and len(re.findall(r"答对 \d+/40", infer)) == 2
    assert "页面地址： http://127.0.0.1:" in infer and "Closing server" in infer
    assert "'vision_tower': 0, 'multi_modal_projector': 4" in lora
    assert float(re.search(r"logits 最多相差 ([\d.e+-]+)", lora)[1]) < 1e-4 and "8/8 条相同" in lora
    assert "行一样： True ；批次逐位相同： True" in shown["code01_processdata"]
