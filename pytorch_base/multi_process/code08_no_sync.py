"""Gradient accumulation with DDP: `no_sync` leaves out the all-reduces of all micro-batches but the last.

Why: a batch that is too large for the memory is taken in parts, whose gradients add up in `.grad`. DDP would send after
each part what is needed once, after the last. Both the forward and the backward pass of a part have to stand under
`no_sync`: it is in the forward pass that DDP decides. And each part's loss is divided by the number of parts.

    python code08_no_sync.py
"""

import os
import tempfile
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

WORLD, PARTS, ROWS, WIDTH = 2, 4, 3, 8  # parts of a batch on each rank, rows of a part
WAYS = ["sync each", "no_sync", "backward alone", "not divided"]


def join(rank: int, rendezvous: str) -> torch.device:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if os.uname().sysname == "Darwin" else "lo")
    cuda = torch.cuda.device_count() >= WORLD  # NCCL, with a GPU for each rank; else gloo, on the loopback interface
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    return torch.device("cuda" if cuda else "cpu")


def make_model(device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, 1)
    return torch.nn.Sequential(*layers).double().to(device)


def flatten(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def accumulate(way: str, parts: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """How many all-reduces there were after each part, and the gradients."""
    model, sent, after = DistributedDataParallel(make_model(parts.device)), [], []
    model.register_comm_hook(None, lambda _, bucket: sent.append(bucket.index()) or allreduce_hook(None, bucket))
    for number, part in enumerate(parts):
        quiet = way != "sync each" and number < PARTS - 1
        with model.no_sync() if quiet and way != "backward alone" else nullcontext():
            loss = (model(part) - part.sum(1, keepdim=True)).square().mean() / (1 if way == "not divided" else PARTS)
            if way != "backward alone":
                loss.backward()
        if way == "backward alone":
            with model.no_sync() if quiet else nullcontext():
                loss.backward()
        after.append(len(sent))
    return after, flatten(model)


def run_rank(rank: int, rendezvous: str) -> None:
    device = join(rank, rendezvous)
    rows = torch.randn(WORLD, PARTS, ROWS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = rows.to(device)
    alone = make_model(device)  # one process, the whole batch at once
    (alone(rows) - rows.sum(-1, keepdim=True)).square().mean().backward()
    counts, apart = {}, {}
    for way in WAYS:
        counts[way], gradients = accumulate(way, rows[rank])
        apart[way] = ((gradients - flatten(alone)).norm() / flatten(alone).norm()).item()
        if rank == 0:
            print(f"{way:15} all-reduces after each part: {counts[way]}, off the whole batch by {apart[way]:.1e}")
    assert counts["no_sync"] == counts["not divided"] == [0] * (PARTS - 1) + [1]
    assert counts["sync each"] == counts["backward alone"] == list(range(1, PARTS + 1))
    right = max(apart[way] for way in WAYS[:3])
    assert right < 1e-12 and abs(apart["not divided"] - (PARTS - 1)) < 1e-9
    if rank == 0:
        each, once, late = (counts[way][-1] for way in WAYS[:3])
        print(f"proof: {each} all-reduces became {once}, and stay {late} if only backward is under no_sync; ", end="")
        print(f"gradients within {right:.1e} of the whole batch's")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.get_context("forkserver").set_forkserver_preload(["torch"])  # imported once; the ranks are forked from there
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run_rank, (f"file://{folder}/rendezvous",), nprocs=WORLD, start_method="forkserver")
