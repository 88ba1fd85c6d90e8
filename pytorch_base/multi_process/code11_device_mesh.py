"""A 2-D DeviceMesh: 4 ranks in 2 rows of 2, tensor parallel within a row, FSDP2 between the rows.

Why: large models need both. Tensor parallel talks in each layer, so its ranks sit in one node; the data-parallel ones
talk once a layer and step. A mesh names the two directions and makes the groups, by hand a `new_group` for each row and
each column. A matrix is then cut twice, and a rank holds a quarter of it.

    python code11_device_mesh.py
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

DATA, TENSOR, WIDTH, HIDDEN, ROWS, STEPS = 2, 2, 8, 32, 12, 3
WORLD = DATA * TENSOR


def join(rank: int, rendezvous: str) -> torch.device:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if os.uname().sysname == "Darwin" else "lo")
    cuda = torch.cuda.device_count() >= WORLD  # NCCL, with a GPU for each rank; else gloo, on the loopback interface
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    return torch.device("cuda" if cuda else "cpu")


def sum_by_hand(rank: int, number: torch.Tensor) -> list[float]:
    """The sums over this rank's column (data) and row (tensor), with groups that all ranks make in the same order."""
    rows = [list(range(first, first + TENSOR)) for first in range(0, WORLD, TENSOR)]
    columns = [list(range(first, WORLD, TENSOR)) for first in range(TENSOR)]
    groups = [(ranks, dist.new_group(ranks)) for ranks in columns + rows]
    sums = []
    for ranks, group in groups:
        if rank in ranks:
            dist.all_reduce(total := number.clone(), group=group)
            sums.append(total.item())
    return sums


def sum_by_mesh(mesh: DeviceMesh, number: torch.Tensor) -> list[float]:
    sums = []
    for name in ("data", "tensor"):
        dist.all_reduce(total := number.clone(), group=mesh.get_group(name))
        sums.append(total.item())
    return sums


def train(model: torch.nn.Module, part: int, parts: int, device: torch.device) -> list[torch.Tensor]:
    """STEPS steps on one part of each batch's rows; the weights after them."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(STEPS):
        rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step)).double().to(device)
        own = rows.chunk(parts)[part]
        optimizer.zero_grad()
        (model(own) - own.cos()).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def cut(whole: list[torch.Tensor], data: int, tensor: int) -> list[torch.Tensor]:
    """A rank's part by hand: neurons first, then rows of what is left. The second bias belongs to all neurons."""
    first, first_bias, second, second_bias = whole
    own = first.chunk(TENSOR)[tensor], first_bias.chunk(TENSOR)[tensor], second.chunk(TENSOR, 1)[tensor], second_bias
    return [part.chunk(DATA)[data] for part in own]


def make_model(device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Linear(WIDTH, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, WIDTH), torch.nn.Tanh()
    return torch.nn.Sequential(*layers).double().to(device)


def run_rank(rank: int, rendezvous: str) -> None:
    device = join(rank, rendezvous)
    mesh = init_device_mesh(device.type, (DATA, TENSOR), mesh_dim_names=("data", "tensor"))
    number = torch.tensor(10.0**rank, device=device)
    by_hand, by_mesh, place = sum_by_hand(rank, number), sum_by_mesh(mesh, number), mesh.get_coordinate()
    alone = train(make_model(device), 0, 1, device)  # one process, whole batches
    model = parallelize_module(make_model(device), mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    first = model[0].weight
    held = first.to_local().numel(), first.numel()
    together = train(model, mesh.get_local_rank("data"), DATA, device)  # ranks of a row read the same rows
    pairs = zip(cut(alone, *place), together, strict=True)
    apart = max((one - two.to_local()).abs().max().item() for one, two in pairs)
    rows = [None] * WORLD
    dist.all_gather_object(rows, (place, by_hand, by_mesh, held, str(first.placements), apart))
    worst = max(apart for *_, apart in rows)
    assert all(hand == mesh for _, hand, mesh, *_ in rows) and worst < 1e-12
    assert [tuple(place) for place, *_ in rows] == [(data, tensor) for data in range(DATA) for tensor in range(TENSOR)]
    assert all(part * WORLD == whole for *_, (part, whole), _, _ in rows)
    if rank == 0:
        print("rank  (data, tensor)  sums by hand: data, tensor  by the mesh    held of the first weight")
        for number, (place, hand, mesh, (part, whole), placements, _) in enumerate(rows):
            print(f"{number:>4}  {place!s:14}  {hand[0]:>18.0f} {hand[1]:>7.0f} ", end="")
            print(f"{mesh[0]:>6.0f} {mesh[1]:>5.0f}    {part} of {whole} {placements}")
        share = f"1/{held[1] // held[0]} of a matrix"
        print(f"proof: {WORLD} ranks have the sums of hand-made groups, each {share}; ", end="")
        print(f"after {STEPS} steps within {worst:.1e} of one process")
    dist.destroy_process_group()


if __name__ == "__main__":
    needed = ["torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"]
    mp.get_context("forkserver").set_forkserver_preload(needed)  # imported once; the ranks are forked from there
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run_rank, (f"file://{folder}/rendezvous",), nprocs=WORLD, start_method="forkserver")
