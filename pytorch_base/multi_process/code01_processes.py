"""Processes: each has a memory of its own, so all that two of them share has to be sent, or be shared on purpose.

Everything later in this folder stands on this: a rank is a process. Python's `multiprocessing`, without PyTorch. There
are three ways to start one: "fork" copies the parent as it is, "spawn" starts an interpreter that imports the program
anew, "forkserver" does so once and forks the processes from there. CUDA works with the last two only.

    python code01_processes.py
"""

import multiprocessing as mp
import os
import signal
import sys
import time

notebook = ["written by the parent"]


def write(queue) -> None:
    """Writes into the child's notebook: a copy of the parent's, or what its own import of this file has made."""
    notebook.append("written by a child")
    queue.put((os.getpid(), os.getppid(), len(notebook)))


def answer(connection) -> None:
    """One end of a pipe: receive, reply, until None comes."""
    while (number := connection.recv()) is not None:
        connection.send(number**2)


def add_carelessly(counter, barrier) -> None:
    """Reads, and writes after the other has read, too: one of two additions is lost."""
    value = counter.value
    barrier.wait()
    counter.value = value + 1


def add_carefully(counter, times: int) -> None:
    """Read and write under the lock that belongs to the value."""
    for _ in range(times):
        with counter.get_lock():
            counter.value += 1


def end(how: str) -> None:
    """Three ways to end badly; the parent has to look, or nobody notices."""
    if how == "sys.exit(3)":
        sys.exit(3)
    if how == "os._exit(7)":
        os._exit(7)
    time.sleep(60)


def square(number: int) -> tuple[int, int]:
    return number**2, os.getpid()


def run_two(context, target, *args) -> None:
    processes = [context.Process(target=target, args=args) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def main() -> None:
    notebook.append("written by the parent, too")
    print(f"{'':18} {'pid':>8} {'parent':>8}  lines in its notebook")
    print(f"{'parent':18} {os.getpid():>8} {os.getppid():>8}  {len(notebook)}")
    lines = {}
    for method in ("fork", "forkserver", "spawn"):
        context = mp.get_context(method)
        queue = context.Queue()  # many may put, many may get; what is put is pickled
        run_two(context, write, queue)
        for _ in range(2):
            pid, parent, lines[method] = queue.get(timeout=60)
            print(f"{method + ' child':18} {pid:>8} {parent:>8}  {lines[method]}")
    assert len(notebook) == 2 and lines == {"fork": 3, "forkserver": 2, "spawn": 2}

    here, there = context.Pipe()  # between two processes, both ways
    process = context.Process(target=answer, args=(there,))
    process.start()
    replies = []
    for number in (3, 4, None):
        here.send(number)
        replies += [here.recv()] if number else []
    process.join()
    print(f"over a pipe: 3 4 -> {replies[0]} {replies[1]}")
    assert replies == [9, 16]

    careless, careful = context.Value("i", 0), context.Value("i", 0)  # an int in shared memory, with a lock
    run_two(context, add_carelessly, careless, context.Barrier(2))
    run_two(context, add_carefully, careful, 1000)
    print(f"2 additions without the lock: {careless.value}; 2 x 1000 with it: {careful.value}")
    assert (careless.value, careful.value) == (1, 2000)

    codes = {}
    for how in ("sys.exit(3)", "os._exit(7)", "killed"):
        process = context.Process(target=end, args=(how,))
        process.start()
        if how == "killed":
            process.kill()
        process.join()
        codes[how] = process.exitcode
    print("exit codes:", *(f"{how}: {code}" for how, code in codes.items()), sep="  ")
    assert list(codes.values()) == [3, 7, -signal.SIGKILL]

    with context.Pool(2) as pool:  # processes that wait for work; results in the order of the arguments
        squares, pids = zip(*pool.map(square, range(8), chunksize=1), strict=True)
    print(f"a pool of 2: squares {list(squares)} by {len(set(pids))} processes")
    assert list(squares) == [number**2 for number in range(8)] and os.getpid() not in pids

    sums = f"with lock {careful.value} of 2000, without {careless.value} of 2"
    print(f"proof: lines seen {lines}; {sums}; exits {' '.join(map(str, codes.values()))}")


if __name__ == "__main__":
    main()
