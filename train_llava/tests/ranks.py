"""Runs of train.py: in this process, in ranks that a warm server forks, or by the command line.

A process pays seconds for its imports, two ranks under torchrun twice that. The server has imported train.py and
DeepSpeed and run nothing; a rank forked from it is there in a tenth of a second and runs train.py as `python train.py`
does, with the variables that torchrun would set.
"""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import faulthandler
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = Path(__file__).parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Environments that share PyTorch's cache of built operators rebuild DeepSpeed's each time that they alternate.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions")
# So they do at each change of ninja's version: the environment's own comes first, as in an activated one.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["train", "deepspeed", "matplotlib.figure", "peft"])


def run_rank(log: str, variables: dict[str, str], flags: list[str]) -> None:
    """One rank, in a process forked from the server; what it prints goes to the file `log`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.register(signal.SIGUSR1)
    os.environ.update(variables)
    os.chdir(RECIPE)
    sys.argv = ["train.py", *flags]
    runpy.run_path("train.py", run_name="__main__")


class Run:
    """The ranks of one run of train.py."""

    def __init__(self, flags: list[str], processes: int):
        self.log = tempfile.NamedTemporaryFile(suffix=".log")  # noqa: SIM115  (it goes with this object)
        variables = [{}]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            rendezvous |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            variables = [rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        self.ranks = [server.Process(target=run_rank, args=(self.log.name, one, flags)) for one in variables]
        folder = os.getcwd()
        os.chdir(RECIPE)  # where the server finds train.py
        for rank in self.ranks:
            rank.start()
        os.chdir(folder)

    def is_running(self) -> bool:
        return any(rank.is_alive() for rank in self.ranks)

    def kill(self) -> None:
        """SIGKILL to all ranks."""
        for rank in self.ranks:
            rank.kill()
        self.wait()

    def wait(self, seconds: float = 180) -> int:
        """Waits for the end; the first status that isn't 0. A rank that fails takes the others along, as torchrun does.

        Raises:
            TimeoutError: it goes on for longer than that (and is killed).
        """
        end = time.monotonic() + seconds
        while self.is_running() and not any(rank.exitcode for rank in self.ranks):
            if time.monotonic() > end:
                for rank in [rank for rank in self.ranks if rank.is_alive()]:
                    os.kill(rank.pid, signal.SIGUSR1)  # says where it waits
                time.sleep(2)
                self.kill()
                raise TimeoutError(self.printed()[-10000:])
            self.ranks[0].join(0.05)
        grace = time.monotonic() + 5  # all have the same to say: let the first say it
        while self.is_running() and time.monotonic() < grace:
            time.sleep(0.05)
        for rank in self.ranks:
            rank.kill()
            rank.join()
        return next((rank.exitcode for rank in self.ranks if rank.exitcode), 0)

    def printed(self) -> str:
        return Path(self.log.name).read_text(encoding="utf-8", errors="replace")


def start_train(*flags, processes: int = 1) -> Run:
    return Run(["--use_cpu", "true", *map(str, flags)], processes)


def run_train(*flags, processes: int = 1, status: int = 0) -> str:
    """What a run of train.py prints that ends with this status."""
    run = start_train(*flags, processes=processes)
    assert run.wait() == status, run.printed()[-5000:]
    return run.printed()


def train_here(monkeypatch, *flags) -> None:
    """train.main() in this process on the CPU; Accelerate's process-wide state is taken down afterwards."""
    from accelerate.state import AcceleratorState, GradientState

    import train

    monkeypatch.setattr(sys, "argv", ["train.py", "--use_cpu", "true", *map(str, flags)])
    try:
        train.main()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def start_script(name: str, output, *flags, folder=None, **variables: str) -> subprocess.Popen:
    """A launch script, started from `folder`, by bash and the real torchrun; what it prints can be read."""
    environment = os.environ | {"OUTPUT": str(output)} | variables
    return subprocess.Popen(
        ["bash", f"{RECIPE}/{name}", *map(str, flags)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a suite that was started in the background ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def read_history(output_dir) -> list[dict]:
    return json.loads(Path(output_dir, "trainer_state.json").read_text())["log_history"]


def losses(output_dir, key: str = "loss") -> list[float]:
    return [entry[key] for entry in read_history(output_dir) if key in entry]
