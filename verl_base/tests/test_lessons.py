"""The lessons of base01 and base02: each asserts its own claims; here their numbers are pinned.

Most run in the Ray of these tests. One runs by the command at its top, in a copy of the recipe, with a Ray of its own:
nothing of it is left. So does the notebook.
"""

import contextlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import uuid

import nbformat
import psutil
import pytest
import ray
from nbclient import NotebookClient
from verl.single_controller.ray import RayResourcePool

import cluster
from conftest import RECIPE

WRITTEN_BY_RUNS = shutil.ignore_patterns("output*", "cache_data", "tests", "__pycache__", ".*_cache")
SHOWN = {
    "base01_worker_and_ray.code02_ray_actor": [
        r"account 0: +pid \d+, balance 5\naccount 1: +pid \d+, balance 105\n",
        r"from call to call: \[6, 7, 8\]",
        r"sum them up to \[499999500000, 499999500000\]",
        r"proof: 3 processes, each state kept, calls to two actors overlap, calls to one queue",
    ],
    "base01_worker_and_ray.code03_worker_group": [
        r"RANK +0 +1\n +WORLD_SIZE +2 +2\n +LOCAL_RANK +0 +0\n +MASTER_ADDR +(\S+) +\1\n +MASTER_PORT +(\d+) +\2\n",
        r"rank 0 alone: 'hello, verl, from rank 0 of 2'",
        r"proof: ranks 0 and 1 of 2 in two processes, one rendezvous, all-reduce gives 30.0 on both",
    ],
    "base01_worker_and_ray.code04_data_proto": [
        r"5 rows on 2 ranks: only support equal chunk",
        r"padded by 1 to 6 rows: a b c d e a\n",
        r"c \[4, 5\] -> +90 by rank 0\n +d \[6, 7\] -> 130 by rank 1\n",
        r"names a a b b c c d d e e\n +ranks 0 0 0 0 0 1 1 1 1 1\n",
        r"proof: scores 10 50 90 130 170 in the order of the rows, 3 by rank 0 and 2 by rank 1",
    ],
    "base01_worker_and_ray.code05_custom_dispatch": [
        r"dispatched in halves: rank +0 +0 +0 +0 +1 +1 +1 +1 +\[22, 128\]",
        r"dispatched by length: .* +\[75, 75\]",
        r"proof: tokens per rank \[75, 75\], rows in order",
    ],
    "base01_worker_and_ray.code06_generate": [
        r"prompt 2: rank 0: .*\nprompt 3: rank 1: ",
        r"proof: 60 tokens in 5 completions by 2 workers, all equal to those of one process",
    ],
    "base01_worker_and_ray.code07_accelerate": [
        r"rank 1: answered 2 prompts itself and has 5 completions",
        r"proof: \[3, 2\] prompts per rank; both ranks have all 5 completions, equal to those of one process",
    ],
    "base01_worker_and_ray.code08_colocated_roles": [
        r"pids of the actor: +(\d+ \d+)\npids of the reference: +\1\n",
        r"step 0: loss on rank 0 and 1: 6\.23\d+ 6\.23\d+\n",
        r"proof: same pids; .* is 0\.0000 before learning and 1\.7\d+ after it",
    ],
    "base02_calc_logit.code09_get_logits": [
        r"rank 0 holds 279,680 of 559,360 bytes .*\nrank 1 holds 279,680 of 559,360 bytes",
        r"model_world_size_2_rank_1\.pt\n",
        r"log-probs, sharded - plain +differ by at most \d\.\de-(0[789]|[1-9]\d)\n",
        r"logits, loaded - saved +differ by at most 0\.0e\+00\n",
        r"logits, exported - saved +differ by at most \d\.\de[-+](00|0[789])\n",
        r"proof: a step moved the logits by 0\.\d+; all that should be equal differs by at most \d\.\de-(0[789])",
    ],
}
BY_COMMAND = "base01_worker_and_ray.code02_ray_actor"


@pytest.fixture
def folder(tmp_path):
    """The recipe as a user has it, with nothing that a run has written."""
    return shutil.copytree(RECIPE, tmp_path / "verl_base", ignore=WRITTEN_BY_RUNS)


@pytest.fixture
def environment() -> dict[str, str]:
    """Without what conftest.py has set for Ray and Python, and with a mark that all processes of this run inherit."""
    kept = {name: value for name, value in os.environ.items() if not re.match("RAY_|VERL_|PYTHONPATH", name)}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RUN_MARK": uuid.uuid4().hex}


def find_processes(environment: dict[str, str]) -> list[psutil.Process]:
    """The processes that have this environment's mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RUN_MARK") == environment["RUN_MARK"]:
                found.append(process)
    return found


def process_names(processes: list[psutil.Process]) -> set[str]:
    names = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            names.add(process.name())
    return names


def assert_shown(lesson: str, text: str) -> None:
    for pattern in SHOWN[lesson]:
        assert re.search(pattern, text), f"{pattern}\nis not in\n{text}"


@pytest.mark.parametrize("lesson", [lesson for lesson in SHOWN if lesson != BY_COMMAND])
def test_lesson_proves_its_point(lesson, ray_here, tmp_path, monkeypatch, capsys):
    pool = RayResourcePool([2], use_gpu=cluster.ON_GPU, max_colocate_count=1)

    @contextlib.contextmanager
    def tests_cluster(processes, output_dir):
        yield pool

    monkeypatch.setattr(cluster, "local_cluster", tests_cluster)
    monkeypatch.chdir(tmp_path)
    try:
        runpy.run_module(lesson, run_name="__main__")
    finally:
        for placement_group in pool.pgs or []:
            ray.util.remove_placement_group(placement_group)  # and with it, its workers
    assert_shown(lesson, capsys.readouterr().out)


def test_command_leaves_no_process(folder, environment, tmp_path):
    printed = tmp_path / "printed.txt"
    with open(printed, "w") as file:
        command = [sys.executable, "-m", BY_COMMAND]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
    seen, deadline = set(), time.time() + 240
    while process.poll() is None and time.time() < deadline:
        seen |= process_names(find_processes(environment))
        time.sleep(1)
    _, alive = psutil.wait_procs(find_processes(environment), timeout=10)
    left = process_names(alive)
    for forgotten in alive:
        forgotten.kill()
    text = printed.read_text()
    assert process.returncode == 0, text[-5000:]
    assert_shown(BY_COMMAND, text)
    assert {"raylet", "gcs_server"} <= seen and not left
    assert not (folder / "output_base01" / "ray").exists(), "Ray's logs are left"


def test_notebook_shows_equal_logits(folder, environment):
    path = folder / "base02_calc_logit" / "code10_get_logits.ipynb"
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        cell.outputs = []
    client = NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": path.parent}})
    client.execute(env=environment)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output["text"] for output in outputs if output.get("name") == "stderr"]
    text = "\n".join(output.get("text") or output["data"].get("text/plain", "") for output in outputs)
    assert re.search(r"0 +279680 +559360 +0\.5\n1 +279680 +559360 +0\.5", text)
    assert re.search(r"logits 最多动了 0\.\d+", text)
    table = dict(re.findall(r"(?m)^(\S+ - \S+) +(\d\.\de[-+]\d\d)$", text[text.index("最大差别") :]))
    assert len(table) == 5 and max(map(float, table.values())) < 1e-6
    assert float(table["logits：读回的 - 存之前的"]) == 0
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    _, alive = psutil.wait_procs(find_processes(environment), timeout=10)
    assert not process_names(alive)
    assert not (folder / "output_base02" / "ray").exists(), "Ray's logs are left"
