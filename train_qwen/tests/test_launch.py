"""The launch scripts as a user types them: by bash and the real torchrun, from any folder, on several machines."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import pytest
from ranks import RECIPE, losses, start_script
from torch.distributed.elastic.utils.distributed import get_free_port

from launch import find_interface

SHORT = ["--max_steps", "2", "--save_strategy", "no", "--logging_steps", "1", "--eval_strategy", "no"]


def test_relative_paths_are_those_of_the_caller_s_folder(tiny_folder, data_file, tmp_path):
    (tmp_path / "my data").mkdir()
    shutil.copy(data_file, tmp_path / "my data" / "train.jsonl")
    shutil.copytree(tiny_folder, tmp_path / "my_model")
    paths = {"DATA": "my data", "MODEL": "my_model", "NPROC": "1"}
    run = start_script("train.sh", "my output", *SHORT, folder=tmp_path, **paths)
    assert run.communicate(timeout=120) and run.returncode == 0
    assert (tmp_path / "my output" / "adapter_model.safetensors").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"my data", "my_model", "my output"}


def test_the_error_stands_last(tmp_path):
    run = start_script("train_zero2.sh", tmp_path, MODEL="./my_model")
    screen, _ = run.communicate(timeout=120)
    assert run.returncode == 1 and "Traceback" not in screen
    said = [line for line in screen.splitlines() if not line.startswith("DeepSpeed ")]  # the other rank may say that
    assert said[-1].startswith("error: ./my_model: no model could be read there")


def test_a_rank_that_is_killed_is_named(tmp_path):
    (tmp_path / "rank.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    command = [sys.executable, "launch.py", "--nproc_per_node", "1", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", str(tmp_path / "rank.py")]
    run = subprocess.run(command, cwd=RECIPE, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("error: process 0 was ended from outside by SIGKILL; the kernel does")


def test_the_interface_is_the_one_that_leads_there():
    assert find_interface("127.0.0.1") == "lo"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machines(tmp_path):
    """What runs a command on each of two machines, and the first one's name.

    They are network namespaces joined by a cable, where the machine's own name leads to 127.0.1.1, as on Debian, and
    another network of the first, such as containers have, stands before it; where the system allows none, both are this
    machine.
    """
    names = [f"zero-{os.getpid()}-{node}" for node in (0, 1)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "inner0", "netns", names[0], "type", "veth", "peer", "name", "inner1", "netns", names[0])
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True) if shutil.which("ip") else None
        warnings.warn(f"no network namespaces here ({error}): two launchers on one machine", stacklevel=1)
        yield [[], []], "127.0.0.1"
        return
    for node, name in enumerate(names):
        ip("-n", name, "addr", "add", f"192.168.78.{node + 1}/24", "dev", f"cable{node}")
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", f"cable{node}", "up")
        Path("/etc/netns", name).mkdir(parents=True)  # what `ip netns exec` shows as /etc
        first = "192.168.78.1" if node else "127.0.1.1"
        hosts = f"127.0.0.1 localhost\n127.0.1.1 {os.uname().nodename}\n{first} first\n"
        Path("/etc/netns", name, "hosts").write_text(hosts)
        Path("/etc/netns", name, "resolv.conf").touch()  # no name server: nobody would answer on the default route
    ip("-n", names[0], "route", "add", "default", "dev", "cable0")
    ip("-n", names[0], "addr", "add", "172.17.0.1/16", "dev", "inner0")
    for end in ("inner0", "inner1"):
        ip("-n", names[0], "link", "set", end, "up")
    yield [["ip", "netns", "exec", name] for name in names], "first"
    for name in names:
        ip("netns", "delete", name)
        shutil.rmtree(f"/etc/netns/{name}")


def screens_of(nodes: list[subprocess.Popen]) -> list[str]:
    """What each node of a run prints; where one doesn't end, also where its processes wait."""
    screens, waiting = [], False
    for node in nodes:
        try:
            screens.append(node.communicate(timeout=150)[0])
        except subprocess.TimeoutExpired:
            waiting = True
            launchers = [psutil.Process(each.pid) for each in nodes if each.poll() is None]
            for process in [*(child for each in launchers for child in each.children(recursive=True)), *launchers]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGABRT)  # which faulthandler answers with a traceback
            screens.append(node.communicate(timeout=60)[0])
    assert not waiting and [node.returncode for node in nodes] == [0, 0], "\n\n".join(screens)
    return screens


def test_two_machines_find_each_other(machines, tmp_path):
    prefixes, address = machines
    script = "import torch.distributed as d, torch\nd.init_process_group('gloo')\nx = torch.ones(1)\nd.all_reduce(x)\n"
    (tmp_path / "rank.py").write_text(f"{script}print(int(x))\nd.barrier()\nd.destroy_process_group()\n")
    command = [sys.executable, "-X", "faulthandler", f"{RECIPE}/launch.py", "--nproc_per_node", "1", "--nnodes", "2"]
    command += ["--master_addr", address, "--master_port", str(get_free_port()), "--node_rank"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    nodes = [
        subprocess.Popen([*prefix, *command, str(rank), str(tmp_path / "rank.py")], **pipes)
        for rank, prefix in enumerate(prefixes)
    ]
    assert all("2" in screen.splitlines() for screen in screens_of(nodes))


def test_two_machines_form_one_run(tiny_folder, data_file, tmp_path):
    variables = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port()), "NPROC": "1"}
    variables |= {"MODEL": tiny_folder, "DATA": data_file, "PYTHONFAULTHANDLER": "1"}
    nodes = [
        start_script("train_zero3.sh", tmp_path / "two", *SHORT, NODE_RANK=str(rank), **variables) for rank in (0, 1)
    ]
    screens = screens_of(nodes)
    assert "x 2 processes" in screens[0] and len(losses(tmp_path / "two")) == 2
    assert (tmp_path / "two" / "adapter_model.safetensors").exists()


def test_the_deepspeed_launcher_starts_it_too(tiny_folder, data_file, tmp_path):
    flags = ["--use_cpu", "true", "--deepspeed", "ds_zero2_no_offload.json", "--model_name_or_path", tiny_folder]
    flags += ["--data_path", data_file, "--output_dir", str(tmp_path), *SHORT]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    command = ["deepspeed", "--num_accelerators", "2", "train.py", *flags]
    run = subprocess.run(command, cwd=RECIPE, env=environment, capture_output=True, text=True, timeout=150)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "x 2 processes" in run.stdout and len(losses(tmp_path)) == 2


def test_ctrl_c_leaves_no_process_and_no_lock(tiny_folder, data_file, tmp_path):
    from checkpoint import lock_output_dir

    flags = ["--num_train_epochs", "1000", "--save_strategy", "steps", "--save_steps", "2"]
    launcher = start_script("train.sh", tmp_path, *flags, MODEL=tiny_folder, DATA=data_file, NPROC="2")
    deadline = time.time() + 90
    while not list(tmp_path.glob("checkpoint-*")) and time.time() < deadline:
        time.sleep(0.1)
    family = psutil.Process(launcher.pid).children(recursive=True)
    assert len(family) >= 2
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGINT
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    lock_output_dir(str(tmp_path)).close()
