"""flow.ipynb: what is stored is what a fresh run shows."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

LESSONS = Path(__file__).parent.parent
SHOWN = [
    r"77,888 个参数，28 个字\n损失 3\.\d+ -> 0\.\d+；随机猜是 3\.33",
    r"input_ids +\[1, 8\] +表 \[28, 64\] +取出来的词向量 \[1, 8, 64\]",
    r"model\.layers\.0\.self_attn\.k_proj +\[1, 8, 64\] +\[1, 8, 32\] +2,080\n",
    r"model\.layers\.1\.mlp\.down_proj +\[1, 8, 128\] +\[1, 8, 64\] +8,192\n",
    r"lm_head +\[1, 8, 64\] +\[1, 8, 28\] +1,792\n",
    r"位置 5 对 3 的分数 (\S+)，位置 25 对 23 的分数 \1\n",
    r"每层权重的形状 \[1, 4, 8, 8\]\n每行的和：1\.0000\d\d 到 1\.0000\d\d；右上角最大：0\.0\n",
    r"logits 的形状 \[1, 8, 28\]",
    r"今天下 -> 雨（0\.\d+），雨\n",
    r"手算的 logits 与模型的最多相差 (0\.0e\+00|\d\.\de-0[6-9])，",
]


def read_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def stored():
    return nbformat.read(LESSONS / "flow.ipynb", as_version=4)


@pytest.fixture
def fresh(stored, tmp_path, monkeypatch):
    """The notebook after a run in a folder that holds nothing else."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copy(LESSONS / "flow.ipynb", tmp_path)
    notebook = nbformat.read(tmp_path / "flow.ipynb", as_version=4)
    for cell in read_cells(notebook):
        cell.outputs = []
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    return notebook


@pytest.mark.parametrize("which", ["stored", "fresh"])
def test_notebook_shows_the_shapes(which, request):
    outputs = [output for cell in read_cells(request.getfixturevalue(which)) for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    text = "".join(output.get("text", "") for output in outputs)
    for pattern in SHOWN:
        found = re.search(pattern, text)
        assert found, f"{pattern}\nis not in what is left of the output:\n{text}"
        text = text[found.end() :]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 4


def test_stored_notebook_is_small_and_of_no_machine(stored):
    assert (LESSONS / "flow.ipynb").stat().st_size < 300_000
    cells = read_cells(stored)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [cell.metadata for cell in cells if cell.metadata]
