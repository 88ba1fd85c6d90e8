"""A milvus-lite file: which process has it, and pymilvus' client of it.

milvus-lite lets one process in at a time, and tells the second one that it is locked but not by whom: a file beside it,
`<path>.holder`, does. What holds it is a lock of the system, which goes with the process, however that ends.
"""

import fcntl
import logging
import os
import socket
import sys
import time
from pathlib import Path

from files import UserError


def hold(path: str):
    """Takes an index for this process, until the file that is returned is closed or the process ends, however it does.

    Raises:
        UserError: another has it, with its number and since when.
    """
    holder = open(f"{path}.holder", "a+", encoding="utf-8")  # noqa: SIM115  (open for as long as the index is)
    own_lock = Path(path, "LOCK")  # milvus-lite's, which says nothing about who has it
    try:
        fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        holder.truncate(0)  # of one that was killed
        if own_lock.exists():
            with open(own_lock, "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder.seek(0)
        who = holder.read().strip() or "another program"
        holder.close()
        raise UserError(
            f"{path}: {who} has this index open, and milvus-lite lets in one process at a time. Ask that one (app.py "
            "answers POST /search), end it (in a notebook: index.close()), or give another file by --index."
        ) from None
    since, command = time.strftime("%Y-%m-%d %H:%M:%S"), Path(sys.argv[0]).name
    holder.write(f"process {os.getpid()} on {socket.gethostname()} ({command}), since {since},")
    holder.flush()
    return holder


def open_milvus(path: str):
    """pymilvus' client of a milvus-lite file, which is served within this process on a port of 127.0.0.1.

    Raises:
        UserError: it can't be opened.
    """
    # gRPC would ask a proxy (http_proxy) for 127.0.0.1; and what these log, tracebacks, is raised as well or no fault.
    os.environ.setdefault("no_grpc_proxy", "127.0.0.1")  # noqa: SIM112  (gRPC reads it in lower case)
    from pymilvus import MilvusClient
    from pymilvus.exceptions import MilvusException

    for name in ("pymilvus", "milvus_lite", "grpc._server"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        return MilvusClient(path)
    except (MilvusException, OSError) as error:
        raise UserError(
            f"{path}: can't be opened as an index ({error}). Where it is broken, delete it and build it anew."
        ) from None
