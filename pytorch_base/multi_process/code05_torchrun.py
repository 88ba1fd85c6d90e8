"""The collectives of lesson 4 under torchrun, which starts the ranks and tells each who it is by environment variables.

Why: a program that starts its own processes stays on one machine. torchrun runs copies of a program on any number of
machines, ends them all if one fails, and starts them again if asked to. Compare this file to code04: only the beginning
and the end differ.

    bash run_code05.sh
"""

import os
import sys
import time

import torch
import torch.distributed as dist

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join() -> torch.device:
    """`init_process_group` without arguments reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if os.uname().sysname == "Darwin" else "lo")
    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    return torch.device("cuda" if cuda else "cpu")


def show(name: str, before: torch.Tensor, after: torch.Tensor) -> list[list[int]]:
    """Prints the table on rank 0; returns what all ranks hold after, on all ranks."""
    rows = [None] * dist.get_world_size()
    dist.all_gather_object(rows, (before.tolist(), after.tolist()))
    if dist.get_rank() == 0:
        print(f"\n{name}\n  rank  {'before':22}    after")
        for rank, (old, new) in enumerate(rows):
            print(f"  {rank:>4}  {' '.join(f'{number:>3}' for number in old):22} -> ", end="")
            print(" ".join(f"{number:>3}" for number in new))
    return [new for _, new in rows]


def run_collectives(rank: int, world: int, device: torch.device) -> int:
    """Rank r begins each with 10 r, 10 r + 1, 10 r + 2, or with the first of them. Returns how many were right."""
    row = 10 * rank + torch.arange(world, device=device)
    rows = [[10 * r + i for i in range(world)] for r in range(world)]
    firsts, sums = [row[0] for row in rows], [sum(column) for column in zip(*rows, strict=True)]
    one, none = row[:1], torch.empty(0, dtype=row.dtype, device=device)
    right = []

    after = row.clone()
    dist.broadcast(after, src=1)
    right.append(show("broadcast from rank 1", row, after) == [rows[1]] * world)

    after = torch.zeros_like(one)
    dist.scatter(after, list(row.chunk(world)) if rank == 0 else None, src=0)
    right.append(show("scatter from rank 0", row if rank == 0 else none, after) == [[number] for number in rows[0]])

    parts = [torch.empty_like(one) for _ in range(world)] if rank == 0 else None
    dist.gather(one, parts, dst=0)
    right.append(show("gather to rank 0", one, torch.cat(parts) if parts else none) == [firsts] + [[]] * (world - 1))

    after = row.clone()
    dist.reduce(after, dst=0, op=dist.ReduceOp.SUM)  # the others' tensors serve as work space: what is in them is void
    right.append(show("reduce to rank 0 (sum)", row, after if rank == 0 else none) == [sums] + [[]] * (world - 1))

    after = row.clone()
    dist.all_reduce(after, op=dist.ReduceOp.SUM)
    right.append(show("all_reduce (sum)", row, after) == [sums] * world)

    after = torch.empty_like(row)
    dist.all_gather_single(after, one)
    right.append(show("all_gather", one, after) == [firsts] * world)

    after = torch.empty_like(one)
    dist.reduce_scatter_single(after, row, op=dist.ReduceOp.SUM)
    right.append(show("reduce_scatter (sum)", row, after) == [[number] for number in sums])

    after = torch.empty_like(row)
    dist.all_to_all_single(after, row)
    right.append(show("all_to_all", row, after) == [list(column) for column in zip(*rows, strict=True)])

    time.sleep(0.2 * rank)
    arrives = time.monotonic()
    dist.barrier()
    stamps = torch.tensor([arrives, time.monotonic()], dtype=torch.float64, device=device)
    times = torch.empty(2 * world, dtype=torch.float64, device=device)
    dist.all_gather_single(times, stamps)
    start = times.min()
    milliseconds = ((stamps - start) * 1000).round().long()
    show("barrier (ms at which a rank arrives, and leaves)", milliseconds[:1], milliseconds[1:])
    right.append(bool(times[1::2].min() >= times[0::2].max()))  # nobody leaves before the last has come
    return sum(right)


def main() -> None:
    if "RANK" not in os.environ:
        sys.exit("error: this lesson needs torchrun to start it: bash run_code05.sh")
    if os.environ["WORLD_SIZE"] == "1":
        sys.exit("error: one rank has nobody to talk to: NPROC=2 or more")
    device = join()
    rank, world = dist.get_rank(), dist.get_world_size()
    environments = [None] * world
    dist.all_gather_object(environments, [os.environ[name] for name in VARIABLES])
    if rank == 0:
        print("what torchrun has put into the environment of each rank:")
        for name, values in zip(VARIABLES, zip(*environments, strict=True), strict=True):
            print(f"  {name:16}", *(f"{value:>10}" for value in values))
    right = run_collectives(rank, world, device)
    assert right == 9
    if rank == 0:
        print(f"\nproof: {right} of 9 collectives end on {world} ranks as they should, over {dist.get_backend()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
