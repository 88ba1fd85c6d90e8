"""Failure: one rank dies, or hangs, in the middle of the work; what the other ranks see, and after how long.

Why: a collective waits for all. With gloo a dead rank's closed connections are an error at once, a rank that hangs is
one only after the time-out: 30 minutes, unless a group is made with another. (With NCCL a death may show as an error,
where the ranks talk over sockets or InfiniBand, or may not, over NVLink or shared memory; a hang never does. A watchdog
looks for errors, and ends the process at the latest after the time-out, 10 minutes.) `monitored_barrier` says who is
missing. Always on the CPU, since the errors are gloo's. How to go on after a failure is in code14_restart.py.

    python code14_failure.py
"""

import os
import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD, VICTIM, TIMEOUT = 3, 2, 2.0  # seconds


def run_rank(rank: int, rendezvous: str, trouble: str, queue) -> None:
    """One all-reduce that works; then the victim is gone, and the others go on as if nothing had happened."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if os.uname().sysname == "Darwin" else "lo")
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    timeout, number = timedelta(seconds=TIMEOUT), torch.ones(1)
    group = dist.new_group(timeout=timeout)  # only now, when all are there: starting may take longer
    dist.all_reduce(number, group=group)
    assert number.item() == WORLD
    if rank == VICTIM and trouble == "dies":
        os._exit(13)  # no clean-up, as if killed
    if rank == VICTIM:
        time.sleep(600)
    begin = time.monotonic()
    try:
        if trouble == "hangs, monitored_barrier":
            dist.monitored_barrier(group, timeout=timeout)
        else:
            dist.all_reduce(number, group=group)
        error = "none"
    except RuntimeError as seen:
        error = str(seen).splitlines()[0].split("] ")[-1].split(". ")[0]  # without gloo's file name and advice
    queue.put((rank, time.monotonic() - begin, error))
    queue.close()
    queue.join_thread()
    os._exit(1)  # the group is broken: destroy_process_group might wait for the one that is gone


def main() -> None:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch"])  # imported once; the ranks are forked from there
    seen = {}
    for trouble in ("dies", "hangs", "hangs, monitored_barrier"):
        queue = context.Queue()
        with tempfile.TemporaryDirectory() as folder:
            arguments = (f"file://{folder}/rendezvous", trouble, queue)
            ranks = [context.Process(target=run_rank, args=(rank, *arguments), daemon=True) for rank in range(WORLD)]
            for process in ranks:
                process.start()
            seen[trouble] = sorted(queue.get(timeout=60) for _ in range(WORLD - 1))
            ranks[VICTIM].kill()  # what hangs doesn't end by itself: torchrun does this for its ranks
            for process in ranks:
                process.join()
        print(f"rank {VICTIM} {trouble}; exit codes {[process.exitcode for process in ranks]}")
        for rank, seconds, error in seen[trouble]:
            print(f"  rank {rank} after {seconds:.2f} s: {error}")
    errors = {trouble: [error for *_, error in rows] for trouble, rows in seen.items()}
    assert not [error for error in errors["dies"] if error == "none" or "Timed out" in error]
    assert "none" not in errors["hangs"] and [error for error in errors["hangs"] if "Timed out" in error]
    assert errors["hangs, monitored_barrier"][0].startswith(f"[Rank 0]: Rank {VICTIM} failed to pass monitoredBarrier")
    first = {trouble: min(seconds for _, seconds, _ in rows) for trouble, rows in seen.items()}
    times = f"a death is seen after {first['dies']:.2f} s, a hang after {first['hangs']:.2f} s"
    print(f"proof: {times}, the time-out; monitored_barrier names rank {VICTIM}")


if __name__ == "__main__":
    main()
