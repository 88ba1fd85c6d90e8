"""Data-parallel training by hand: each rank takes its share of a batch, and the gradients are added up.

Why: N ranks must learn exactly what one process learns from the whole batch. That holds if each rank's loss is the sum
over its rows, divided by the rows of all ranks. The mean of the ranks' means is right only where all have the same
number of rows: here a batch of 7 goes to 2 ranks as 4 + 3, and the last, of 1 row, as 1 + 0.

    python code07_data_parallel.py
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
BATCHES = [range(0, 7), range(7, 14), range(14, 15)]  # 15 rows, 7 a batch
EPOCHS = 5


def join(rank: int, rendezvous: str) -> torch.device:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if os.uname().sysname == "Darwin" else "lo")
    cuda = torch.cuda.device_count() >= WORLD  # NCCL, with a GPU for each rank; else gloo, on the loopback interface
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    return torch.device("cuda" if cuda else "cpu")


def make_model(seed: int, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(device).double()


def make_rows(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(15, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return inputs.to(device), inputs.sin().sum(1, keepdim=True).to(device)


def step(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
            parameter.grad = None


def train_alone(device: torch.device) -> tuple[torch.nn.Module, list[float]]:
    """One process, whole batches: what the ranks have to reach together."""
    model, losses = make_model(0, device), []
    inputs, targets = make_rows(device)
    for _ in range(EPOCHS):
        for rows in BATCHES:
            loss = (model(inputs[rows]) - targets[rows]).square().mean()
            loss.backward()
            step(model)
            losses.append(loss.item())
    return model, losses


def train_together(rank: int, device: torch.device, mean_of_means: bool) -> tuple[torch.nn.Module, list[float]]:
    """Each rank: own rows, then one all-reduce for each parameter's gradient."""
    model, losses = make_model(rank, device), []  # the seeds differ, so the ranks begin with different weights ...
    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), src=0)  # ... but not for long
    inputs, targets = make_rows(device)
    for _ in range(EPOCHS):
        for rows in BATCHES:
            own = rows[rank::WORLD]  # every WORLD-th row, possibly none
            count = max(len(own), 1) * WORLD if mean_of_means else len(rows)
            loss = (model(inputs[own]) - targets[own]).square().sum() / count  # no rows: 0, with gradients of 0
            loss.backward()
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
            dist.all_reduce(total := loss.detach().clone())
            step(model)
            losses.append(total.item())
    return model, losses


def difference(model: torch.nn.Module, other: torch.nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((one - two).abs().max().item() for one, two in pairs)


def run_rank(rank: int, rendezvous: str) -> None:
    device = join(rank, rendezvous)
    alone, alone_losses = train_alone(device)
    together, losses = train_together(rank, device, mean_of_means=False)
    careless, careless_losses = train_together(rank, device, mean_of_means=True)
    apart = torch.tensor([difference(together, alone), difference(careless, alone)], device=device)
    dist.all_reduce(apart, op=dist.ReduceOp.MAX)  # the rank that is furthest off
    assert apart[0] < 1e-12 and apart[1] > 1e-3
    if rank == 0:
        print("step  rows of rank 0  rows of rank 1     loss: alone   together  mean of means")
        for number, rows in enumerate(BATCHES):
            shares = [" ".join(map(str, rows[rank::WORLD])) for rank in range(WORLD)]
            print(f"{number:>4}  {shares[0]:14}  {shares[1]:14}  ", end="")
            print(f"{alone_losses[number]:>14.6f} {losses[number]:>10.6f} {careless_losses[number]:>14.6f}")
        print(f"proof: after {len(losses)} steps {WORLD} ranks differ from one process by {apart[0]:.1e}; ", end="")
        print(f"with the mean of means they would by {apart[1]:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.get_context("forkserver").set_forkserver_preload(["torch"])  # imported once; the ranks are forked from there
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run_rank, (f"file://{folder}/rendezvous",), nprocs=WORLD, start_method="forkserver")
