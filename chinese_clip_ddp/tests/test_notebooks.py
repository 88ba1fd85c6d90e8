"""The notebooks run from top to bottom in a folder that holds nothing but the recipe, and what they show is so.

The data is a small part of the default's and the training a few steps; what the full training reaches is asked by
`make defaults`.
"""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
from nbclient import NotebookClient
from ranks import RECIPE

SHORTER = [
    ("COUNT = 3000", "COUNT = 400"),
    ("SECONDS = 9", "SECONDS = 0.5"),
    ("STEPS, BATCH, RANKS = 60,", "STEPS, BATCH, RANKS = 8,"),
    ("--num_train_epochs 1", "--max_steps 8"),
]
WRITTEN_BY_RUNS = shutil.ignore_patterns("output*", "cache_data", "__pycache__", ".*_cache", ".ipynb_checkpoints")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = shutil.copytree(
        RECIPE, tmp_path_factory.mktemp("lessons") / "chinese_clip_ddp", symlinks=True, ignore=WRITTEN_BY_RUNS
    )
    program = folder / "data01_scenes.py"
    code = program.read_text()
    assert "FAMILIES = 3000" in code
    program.write_text(code.replace("FAMILIES = 3000", "FAMILIES = 100"))
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


def test_the_lessons_that_train_no_model(folder):
    names = (
        *("code02_test_imageembedding", "code03_test_imageembedding_p2"),
        *("code04_build_dataset_p1", "code05_compare_loss"),
    )
    with ThreadPoolExecutor(2) as pool:
        images, towers, pairs, losses = pool.map(lambda name: execute(folder, name), names)
    assert "第一次：23 张图片，11 张不能用，1 张动图" in images and "结果相同： True" in images
    first, second = (int(count) for count in re.findall(r"打开了 (\d+) 个文件", images))
    assert first == 23 and second == 0
    assert all(float(largest) < 1e-6 for largest in re.findall(r"最大的差 ([\d.e+-]+)", images))
    assert "处理器的后端： pil" in images

    train_mode, eval_mode = re.search(r"训练模式.*相差 ([\d.]+)\n评测模式：相差 ([\d.e+-]+)", towers).groups()
    assert float(train_mode) > 0.01 and float(eval_mode) < 1e-4

    assert "8 of 18 rows can't be trained on" in pairs and "bad_rows.jsonl： 8 行" in pairs
    assert "再读一遍：打开了 0 张图片" in pairs
    assert int(re.search(r"每对一轮恰好一次：True，被拆开的组：(\d+)\n", pairs).group(1)) <= 3

    ratios = {
        name: row.split()
        for name, row in re.findall(r"^(custom|gather|tiled) +([\d.]+ .+)$", losses.split("logit_scale")[0], re.M)
    }
    assert [float(number) for number in ratios["custom"][2:4]] == pytest.approx([0.5, 0.25], abs=1e-3)
    assert [float(number) for number in ratios["gather"][2:4]] == [0, 0]
    assert [float(number) for number in ratios["tiled"][2:4]] == pytest.approx([1, 1], abs=1e-3)


def test_captions_are_embedded_and_a_gallery_is_searched(folder):
    captions = execute(folder, "code01_test_textembedding")
    padded, unmasked = (float(change) for change in re.findall(r"最多相差 ([\d.e+-]+)", captions)[:2])
    assert padded < 1e-5 < unmasked
    search = execute(folder, "infer")  # with the model that the first has trained
    assert "第二次： " in search and "页面地址： http://127.0.0.1:" in search
    assert "索引里有：" in search and "has this index open" in search
