"""Workers of the tests' Ray that are forked from a process which has imported verl once.

A Ray worker pays six seconds of a core for its imports, and every lesson and every run has one or two of its own. Ray
starts them by `python setup_worker.py default_worker.py ...`; in the tests' cluster this file stands in for
setup_worker.py: it sends its command line, environment and files to the server, whose child becomes the worker.
"""

import argparse
import json
import os
import runpy
import signal
import socket
import sys

PATH = "WARM_WORKERS"  # the environment variable with the path of the server's socket


def serve(listener: socket.socket) -> None:
    """Imports what the workers import, then forks one for each connection; runs nothing itself."""
    import base02_calc_logit.workers  # noqa: F401
    import fast_path  # noqa: F401
    import worker_groups  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a child
    while True:
        connection, _ = listener.accept()
        message, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            for target, file in enumerate(files):
                os.dup2(file, target)
            become_worker(*json.loads(message))
        connection.close()  # the child has it open for as long as it lives
        for file in files:
            os.close(file)


def become_worker(command: list[str], environment: dict[str, str], folder: str) -> None:
    """What setup_worker.py does, in this process."""
    from ray._private.runtime_env.context import RuntimeEnvContext

    parser = argparse.ArgumentParser()
    parser.add_argument("--serialized-runtime-env-context", default="{}")
    parser.add_argument("--language")
    given, sys.argv = parser.parse_known_args(command)
    os.environ.clear()
    os.environ.update(environment | RuntimeEnvContext.deserialize(given.serialized_runtime_env_context).env_vars)
    os.chdir(folder)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        os._exit(1)  # not on into the server's loop


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(socket.socket(fileno=int(sys.argv[2])))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(os.environ[PATH])
        message = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()])
        socket.send_fds(server, [message.encode()], [0, 1, 2])
        server.recv(1)  # until the worker has ended
