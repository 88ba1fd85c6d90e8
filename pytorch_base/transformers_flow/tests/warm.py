"""Lessons in processes that a warm server forks.

A process pays seconds to import its libraries and to take them down again, and a lesson is often done in less. The
server imports them once and runs nothing. A lesson forked from it is there in a tenth of a second and runs as
`python lesson.py` does: as `__main__`, alone in a process, with all that is to be done at its exit.

    python warm.py 7 torch transformers    the server, which is spoken to by file descriptor 7
"""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import atexit
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from multiprocessing import util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, NoReturn


class Ended(NamedTuple):
    """What is known of a lesson that has ended; its processes are in a session of their own."""

    status: int
    stdout: str
    stderr: str
    session: int


class WarmServer:
    """Runs one lesson after the other.

    Args:
        modules: what is imported before.
        environment: the server's, and so its lessons'.
    """

    def __init__(self, modules: list[str], environment: dict[str, str]):
        self.connection, there = multiprocessing.Pipe()
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(there.fileno()), *modules],
            pass_fds=[there.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        there.close()

    def run(self, script: Path, folder: Path, seconds: float, **variables: str) -> Ended:
        """Runs a lesson to its end.

        Args:
            folder: where it is started.
            seconds: after these it is killed with all its processes.
            variables: environment variables of its own.
        """
        with tempfile.TemporaryDirectory() as kept:
            outputs = [f"{kept}/stdout", f"{kept}/stderr"]
            self.connection.send((str(script), str(folder), outputs, variables))
            session = self.connection.recv()
            if not self.connection.poll(seconds):
                os.killpg(session, signal.SIGKILL)
            status = self.connection.recv()
            return Ended(status, *(Path(output).read_text(encoding="utf-8") for output in outputs), session)

    def close(self) -> None:
        self.connection.close()
        self.process.wait()


def serve(connection: Connection, modules: list[str]) -> NoReturn:
    """Forks a process for each lesson that is asked for, until nobody can ask any more."""
    for module in modules:
        importlib.import_module(module)
    while True:
        try:
            request = connection.recv()
        except EOFError:
            os._exit(0)
        lesson = os.fork()
        if not lesson:
            connection.close()
            run_lesson(*request)
        connection.send(lesson)
        connection.send(os.waitstatus_to_exitcode(os.waitpid(lesson, 0)[1]))


def run_lesson(script: str, folder: str, outputs: list[str], variables: dict[str, str]) -> NoReturn:
    os.setsid()
    for descriptor, output in enumerate(outputs, 1):
        file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(folder)
    os.environ.update(variables)
    sys.argv, sys.path[0] = [script], os.path.dirname(script)
    util.spawnv_passfds = start_helper
    status = 1
    try:
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as end:
        print(end, file=sys.stderr)  # lessons give a text
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


def start_helper(program, arguments, descriptors, spawn=util.spawnv_passfds) -> int:
    """How multiprocessing starts a program; but the lesson's forkserver is forked from it, so that it is warm, too."""
    if "multiprocessing.forkserver" not in arguments[-1]:
        return spawn(program, arguments, descriptors)
    sys.stdout.flush()
    if helper := os.fork():
        return helper
    try:  # with what a new interpreter would have: these descriptors alone, and a __main__ that isn't the lesson
        bounds = [2, *sorted(descriptors), os.sysconf("SC_OPEN_MAX")]
        for kept, next_kept in zip(bounds, bounds[1:], strict=False):
            os.closerange(kept + 1, next_kept)
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(arguments[-1], {})
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(0)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), sys.argv[2:])
