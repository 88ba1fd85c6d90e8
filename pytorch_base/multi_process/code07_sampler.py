"""DataLoader and DistributedSampler: which rank reads which row, what is padded, and what to do without padding.

Why: all ranks draw the same permutation, from a seed and the epoch's number, and take every WORLD-th row of it. Without
`set_epoch` each epoch has the order of the first. Rows that don't divide evenly are filled up with rows that were there
already, which a mean over a validation set counts twice, or with drop_last are left out. Where shares are uneven a rank
ends first, and the others' all-reduces would wait for it: `Join` answers them in its place.

    python code07_sampler.py
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

WORLD, ROWS, EPOCHS, RATE = 2, 7, 3, 0.1


def join(rank: int, rendezvous: str) -> torch.device:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if os.uname().sysname == "Darwin" else "lo")
    cuda = torch.cuda.device_count() >= WORLD  # NCCL, with a GPU for each rank; else gloo, on the loopback interface
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    return torch.device("cuda" if cuda else "cpu")


def gather(value) -> list:
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


def read(set_epoch: bool, drop_last: bool = False) -> list[list[list[int]]]:
    """Rows by epoch and rank, as the loaders give them."""
    data = TensorDataset(torch.arange(ROWS))
    sampler = DistributedSampler(data, shuffle=True, seed=1, drop_last=drop_last)
    loader, epochs = DataLoader(data, batch_size=2, sampler=sampler), []
    for epoch in range(EPOCHS):
        if set_epoch:
            sampler.set_epoch(epoch)
        epochs.append(gather([row for (rows,) in loader for row in rows.tolist()]))
    return epochs


def draw(epoch: int) -> list[list[int]]:
    """The same by hand."""
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1 + epoch)).tolist()
    order += order[: -len(order) % WORLD]  # filled up with its own beginning
    return [order[rank::WORLD] for rank in range(WORLD)]


def train_uneven(rank: int, device: torch.device) -> tuple[int, torch.Tensor, torch.Tensor]:
    """One row a step: rank 0 has 4 rows, rank 1 has 3. Steps of this rank, DDP's weights, and those by hand."""
    torch.manual_seed(0)
    inputs = torch.randn(ROWS, 3, dtype=torch.float64).to(device)
    layer = torch.nn.Linear(3, 1, bias=False).double().to(device)
    by_hand = layer.weight.detach().clone()
    model, steps = DistributedDataParallel(layer), 0
    with Join([model]):  # whoever is done takes part in the all-reduces of the others, with zeros
        for row in inputs[rank::WORLD]:
            model.zero_grad()
            (model(row) - row.sum()).square().sum().backward()
            with torch.no_grad():
                layer.weight -= RATE * layer.weight.grad
            steps += 1
    for step in range(-(-ROWS // WORLD)):
        rows = inputs[step * WORLD : (step + 1) * WORLD]
        by_hand -= RATE * 2 * ((rows @ by_hand.T) - rows.sum(1, keepdim=True)).mul(rows).sum(0) / WORLD
    return steps, layer.weight.detach(), by_hand


def run_rank(rank: int, rendezvous: str) -> None:
    device = join(rank, rendezvous)
    fixed, shuffled, dropped = read(False), read(True), read(True, drop_last=True)
    assert fixed == [draw(0)] * EPOCHS and shuffled == [draw(epoch) for epoch in range(EPOCHS)]
    assert len({str(rows) for rows in shuffled}) == EPOCHS
    seen = [sorted(sum(rows, [])) for rows in (shuffled[0], dropped[0])]
    twice = [row for row in range(ROWS) if seen[0].count(row) == 2]
    missing = [row for row in range(ROWS) if row not in seen[1]]
    assert len(seen[0]) == ROWS + 1 and len(twice) == 1 and len(seen[1]) == ROWS - 1 and len(missing) == 1
    mean, padded = sum(range(ROWS)) / ROWS, sum(seen[0]) / len(seen[0])
    steps, weights, by_hand = train_uneven(rank, device)
    rows = gather((steps, (weights - by_hand).abs().max().item()))
    worst = max(apart for _, apart in rows)
    assert [steps for steps, _ in rows] == [4, 3] and worst < 1e-12 and abs(padded - mean) > 0.1
    if rank == 0:
        print("epoch  set_epoch: rank 0, rank 1       without               drop_last")
        for epoch, by_rank in enumerate(zip(shuffled, fixed, dropped, strict=True)):
            print(f"{epoch:>5}  ", *(f"{' '.join(map(str, a))} | {' '.join(map(str, b)):12}" for a, b in by_rank))
        print(
            f"epoch 0: row {twice[0]} twice, with drop_last no row {missing[0]}; mean {padded:.3f}, in truth {mean:.3f}"
        )
        print(
            f"uneven, under Join: {rows[0][0]} steps on rank 0, {rows[1][0]} on rank 1, then rank 0's weights on both"
        )
        print(f"proof: {EPOCHS} orders with set_epoch, 1 without; {ROWS} rows read {len(seen[0])} times, or ", end="")
        print(f"{len(seen[1])}; after steps {[steps for steps, _ in rows]} weights within {worst:.1e} of those by hand")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.get_context("forkserver").set_forkserver_preload(["torch"])  # imported once; the ranks are forked from there
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run_rank, (f"file://{folder}/rendezvous",), nprocs=WORLD, start_method="forkserver")
