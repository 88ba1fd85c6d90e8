"""However a run ends, nothing of it is left: after Ctrl-C, a killed driver, a killed worker."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from conftest import RECIPE


def start_run(flags: list[str], log) -> subprocess.Popen:
    """train.py in a process group of its own, waited for until its second step."""
    command = [sys.executable, "-u", "train.py", *flags]
    run = subprocess.Popen(command, cwd=RECIPE, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True)
    deadline = time.time() + 120
    while "step    2" not in log.read_text() and time.time() < deadline and run.poll() is None:
        time.sleep(0.2)
    assert "step    2" in log.read_text(), log.read_text()
    return run


def processes_of(output) -> list[psutil.Process]:
    """Everything that works for a run: its folder is in a command line, an environment or an open log of Ray's."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(output) in word for word in process.cmdline()) or process.environ().get("RUN") == str(output):
                found.append(process)
            elif process.name().startswith("ray::"):  # its title stands where its environment was
                found += [process] if any(str(output) in file.path for file in process.open_files()) else []
    return found


def wait_until_gone(output, seconds: int) -> list[psutil.Process]:
    deadline = time.time() + seconds
    while (left := processes_of(output)) and time.time() < deadline:
        time.sleep(0.3)
    return left


@pytest.mark.parametrize(("how", "nproc"), [("ctrl-c", 1), ("term", 1), ("driver", 1), ("worker", 2)])
def test_nothing_is_left(how, nproc, request, tmp_path, monkeypatch, policy_folder, data_file, reward_file):
    output, log = tmp_path / "output", tmp_path / "log"
    monkeypatch.setenv("RUN", str(output))
    flags = ["--model_name_or_path", policy_folder, "--data_path", data_file, "--output_dir", str(output)]
    flags += ["--reward_function", reward_file, "--max_response_length", "8", "--logging_steps", "1"]
    flags += ["--nproc", str(nproc)]
    flags += ["--train_batch_size", "4", "--ppo_mini_batch_size", "2", "--total_training_steps", "100000"]
    run = start_run([*flags, "--test_freq", "100000", "--save_freq", "100000"], log)
    request.addfinalizer(lambda: [process.kill() for process in processes_of(output)])
    workers = [process for process in processes_of(output) if process.name().startswith("ray::WorkerDict")]
    assert len(workers) == nproc and len(processes_of(output)) > nproc + 2
    listening = {
        connection.laddr.ip
        for process in processes_of(output)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    if how == "ctrl-c":
        os.killpg(run.pid, signal.SIGINT)
    elif how == "term":
        run.terminate()
    elif how == "driver":
        run.kill()
    else:
        workers[1].kill()
    status = run.wait(timeout=60)
    # Two helpers of a Ray that was killed report its end to it for a minute before they go.
    assert wait_until_gone(output, 90 if how == "driver" else 30) == []
    assert status == {"ctrl-c": 130, "term": 143, "driver": -signal.SIGKILL, "worker": 1}[how]
    if how == "worker":
        assert "error: a worker failed" in log.read_text()
    assert "Traceback" not in log.read_text()
