"""Tensors across processes: torch.multiprocessing sends the address of shared memory, where pickle sends a copy.

Why: a tensor on a queue costs a few hundred bytes whatever its size, and both sides see what the other writes. The
workers of a DataLoader hand their batches over in this way. Built on it: Hogwild! (Recht et al. 2011, arXiv:1106.5730),
where processes train one set of weights in shared memory without any lock.

    python code02_shared_memory.py
"""

import os
import pickle
from multiprocessing.reduction import ForkingPickler
from multiprocessing.shared_memory import SharedMemory

import torch
import torch.multiprocessing as mp

MILLION = 1_000_000
STEPS = 300


def write(name: str, inbox, outbox) -> None:
    """Gets one tensor by the queue and opens another one by its name; writes into both."""
    torch.set_num_threads(1)
    received = inbox.get()
    received[:3] = torch.tensor([1.0, 2.0, 3.0])
    copy = received.clone()  # memory of this process's own
    copy[:] = -1
    memory = SharedMemory(name)
    named = torch.frombuffer(memory.buf, dtype=torch.float32, count=4)
    named[:2] = torch.tensor([8.0, 9.0])
    del named  # the memory can't be closed while a tensor looks into it
    memory.close()
    outbox.put((os.getpid(), received.is_shared(), copy.is_shared()))


def make_rows(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """y = 1 x0 + 2 x1 + 3 x2 + 4 x3, of which both processes draw rows of their own."""
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return inputs, inputs @ torch.tensor([1.0, 2.0, 3.0, 4.0])


def train(rank: int, weights: torch.Tensor, counts: torch.Tensor) -> None:
    """SGD on the shared weights; the other one writes in between, and that does no harm."""
    torch.set_num_threads(1)
    for step in range(STEPS):
        inputs, targets = make_rows(8, seed=rank * STEPS + step)
        gradient = 2 * inputs.T @ (inputs @ weights - targets) / len(inputs)
        weights -= 0.05 * gradient
        counts[rank] += 1


def main() -> None:
    torch.set_num_threads(1)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch"])  # imported once; the processes are forked from there
    inbox, outbox = context.Queue(), context.Queue()

    numbers = torch.zeros(MILLION)
    own = numbers.is_shared()
    numbers.share_memory_()  # moves it; a queue would do it by itself
    sizes = len(pickle.dumps(numbers.numpy())), len(ForkingPickler.dumps(numbers))
    print(f"a tensor of {4 * MILLION:,} bytes: pickled {sizes[0]:,} bytes, on a queue of torch {sizes[1]:,} bytes")
    assert not own and numbers.is_shared() and sizes[0] > 4 * MILLION and sizes[1] < 1000

    memory = SharedMemory(create=True, size=16)  # has a name, so that programs that aren't relatives can open it
    named = torch.frombuffer(memory.buf, dtype=torch.float32, count=4)
    named.zero_()
    process = context.Process(target=write, args=(memory.name, inbox, outbox))
    process.start()
    inbox.put(numbers)
    pid, received_shared, copy_shared = outbox.get(timeout=60)
    process.join()
    seen, seen_named = numbers[:4].tolist(), named.tolist()
    del named
    memory.close()
    memory.unlink()  # else it outlives the program
    print(f"{'':24} {'pid':>8}  shared  the parent sees")
    print(f"{'by the queue':24} {pid:>8}  {received_shared!s:6}  {seen}")
    print(f"{'a clone of it':24} {pid:>8}  {copy_shared!s:6}  nothing")
    print(f"{'by a name':24} {pid:>8}  {True!s:6}  {seen_named}")
    assert pid != os.getpid() and received_shared and not copy_shared
    assert seen == [1, 2, 3, 0] and seen_named == [8, 9, 0, 0]

    weights, counts = torch.zeros(4).share_memory_(), torch.zeros(2, dtype=torch.int64).share_memory_()
    inputs, targets = make_rows(100, seed=-1)
    before = (inputs @ weights - targets).square().mean().item()
    mp.start_processes(train, (weights, counts), nprocs=2, start_method="forkserver")
    after = (inputs @ weights - targets).square().mean().item()
    print(f"Hogwild!, steps by process: {counts.tolist()}, weights {[round(weight, 3) for weight in weights.tolist()]}")
    assert counts.tolist() == [STEPS, STEPS]
    assert after < 1e-6 * before

    print(f"proof: {sizes[1]} bytes sent for {4 * MILLION:,}, parent sees {seen}, loss {before:.1f} -> {after:.1e}")


if __name__ == "__main__":
    main()
