"""Ray alone: an actor is an object that lives in a process of its own; a call is a message, and its result a future.

python -m base01_worker_and_ray.code02_ray_actor
"""

import os
import time

from cluster import local_cluster  # before Ray and verl: they read the environment that it sets

# isort: split
import ray
import torch


@ray.remote
class Account:
    """An object with a state. Calls to it wait in a queue and run one after another."""

    def __init__(self, balance: int):
        self.balance = balance

    def add(self, amount: int) -> tuple[int, int]:
        self.balance += amount
        return os.getpid(), self.balance

    def work(self, seconds: float) -> tuple[float, float]:
        begin = time.time()
        time.sleep(seconds)
        return begin, time.time()

    def sum(self, numbers: torch.Tensor) -> int:
        return int(numbers.sum())


with local_cluster(2, "output_base01"):
    accounts = [Account.remote(balance) for balance in (0, 100)]  # .remote(...) starts a process

    futures = [account.add.remote(5) for account in accounts]  # returns at once; the work goes on elsewhere
    print(f"a call gives an {type(futures[0]).__name__}, a future; ray.get waits for its value")
    print(f"this program: pid {os.getpid()}")
    pids, balances = zip(*ray.get(futures), strict=True)
    for index, (pid, balance) in enumerate(zip(pids, balances, strict=True)):
        print(f"account {index}:    pid {pid}, balance {balance}")
    assert len({os.getpid(), *pids}) == 3 and balances == (5, 105)

    balances = [ray.get(accounts[0].add.remote(1))[1] for _ in range(3)]
    print(f"account 0 keeps its state from call to call: {balances}")
    assert balances == [6, 7, 8]

    (begin, end), (other_begin, other_end) = ray.get([account.work.remote(0.5) for account in accounts])
    shared = min(end, other_end) - max(begin, other_begin)
    print(f"two actors work at the same time: of 0.5 s each they share {shared:.1f} s")
    assert shared > 0

    (_, end), (begin, _) = ray.get([accounts[0].work.remote(0.1) for _ in range(2)])
    print(f"one actor works in turn: its second call begins {1000 * (begin - end):.1f} ms after the end of the first")
    assert begin >= end

    numbers = ray.put(torch.arange(1_000_000))  # into shared memory, once; a call then carries only its address
    sums = ray.get([account.sum.remote(numbers) for account in accounts])
    print(f"both read the same million numbers in shared memory, and sum them up to {sums}")
    assert sums == [499_999_500_000] * 2
print("proof: 3 processes, each state kept, calls to two actors overlap, calls to one queue")
