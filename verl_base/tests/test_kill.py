"""However a run ends, nothing of it is left: after Ctrl-C, a killed driver, a killed worker.

The last of them is trained in a copy of the recipe that has no fast path.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from conftest import RECIPE, addresses_listened_on, processes_of

HOW = {"driver": 1, "ctrl-c": 1, "term": 1, "worker": 2}  # what is ended, and the run's processes


class Run:
    """train.py with a Ray of its own, since that is what must end with it; in a process group of its own."""

    def __init__(self, folder: Path, recipe: Path, nproc: int, data: list[str]):
        self.output, self.log = folder / "output", folder / "log"
        flags = [*data, "--output_dir", str(self.output), "--nproc", str(nproc), "--max_response_length", "8"]
        flags += ["--train_batch_size", "4", "--ppo_mini_batch_size", "2", "--total_training_steps", "100000"]
        flags += ["--logging_steps", "1", "--test_freq", "100000", "--save_freq", "100000"]
        kept = {name: value for name, value in os.environ.items() if not re.match("RAY_|VERL_|PYTHONPATH", name)}
        self.driver = subprocess.Popen(
            [sys.executable, "-u", "train.py", *flags],
            cwd=recipe,
            env=kept | {"RUN": str(self.output)},
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # a suite that was started in the background ignores Ctrl-C, and so would its children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def wait_for_its_second_step(self) -> None:
        deadline = time.time() + 240
        while "step    2" not in self.log.read_text() and time.time() < deadline and self.driver.poll() is None:
            time.sleep(0.2)
        assert "step    2" in self.log.read_text(), self.log.read_text()

    def end(self, how: str) -> None:
        """Ends it while it trains, after a look at its processes: they listen on this machine only."""
        found = processes_of(self.output)
        workers = [process for process in found if process.name().startswith("ray::WorkerDict")]
        assert len(workers) == HOW[how] and len(found) > HOW[how] + 2
        assert addresses_listened_on(found) == {"127.0.0.1"}
        if how == "driver":
            self.driver.kill()
        elif how == "ctrl-c":
            os.killpg(self.driver.pid, signal.SIGINT)
        elif how == "term":
            self.driver.terminate()
        else:
            workers[1].kill()


@pytest.fixture(scope="session")
def ended_runs(tmp_path_factory, policy_folder, data_file, reward_file):
    """Runs that train side by side until each is ended in its way."""
    data = ["--model_name_or_path", policy_folder, "--data_path", data_file, "--reward_function", reward_file]
    without = tmp_path_factory.mktemp("plain") / "verl_base"
    shutil.copytree(RECIPE, without, ignore=shutil.ignore_patterns("fast_path.py", "output*", "cache_data", ".*_cache"))
    recipes = {how: without if how == "worker" else RECIPE for how in HOW}
    runs = {how: Run(tmp_path_factory.mktemp(how), recipes[how], nproc, data) for how, nproc in HOW.items()}
    try:
        for how, run in runs.items():
            run.wait_for_its_second_step()
            run.end(how)
        yield runs
    finally:
        for run in runs.values():
            for process in processes_of(run.output):
                process.kill()


def wait_until_gone(output, seconds: int) -> list[psutil.Process]:
    deadline = time.time() + seconds
    while (left := processes_of(output)) and time.time() < deadline:
        time.sleep(0.3)
    return left


@pytest.mark.parametrize("how", HOW)
def test_nothing_is_left(how, ended_runs):
    run = ended_runs[how]
    status = run.driver.wait(timeout=60)
    # Two helpers of a Ray that was killed report its end to it for a minute before they go.
    assert wait_until_gone(run.output, 90 if how == "driver" else 30) == []
    assert status == {"ctrl-c": 130, "term": 143, "driver": -signal.SIGKILL, "worker": 1}[how]
    if how == "ctrl-c":
        assert "interrupted; no checkpoint was written yet" in run.log.read_text()
    if how == "worker":
        assert "error: a worker failed" in run.log.read_text()
    assert "Traceback" not in run.log.read_text(), run.log.read_text()[-3000:]
