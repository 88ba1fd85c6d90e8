"""FSDP2: `fully_shard` is ZeRO-3 in PyTorch; 2 ranks write a checkpoint, 3 ranks read it and train on.

Why: each parameter becomes a DTensor of which a rank holds some rows; they are gathered for a layer's forward and
backward only. A distributed checkpoint says which rows stand in which file, so any number of ranks can read it.

    python code10_fsdp2.py
"""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

WRITERS, READERS = 2, 3
WIDTH, LAYERS, ROWS, STEPS = 24, 3, 12, 3  # 12 rows: 6 for each of 2 ranks, 4 for each of 3


def join(rank: int, world: int, rendezvous: str) -> torch.device:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if os.uname().sysname == "Darwin" else "lo")
    cuda = torch.cuda.device_count() >= READERS  # NCCL, if both jobs can; else gloo, on the loopback interface
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=rendezvous, rank=rank, world_size=world)
    return torch.device("cuda" if cuda else "cpu")


def build(device: torch.device) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)  # each layer is gathered by itself; what belongs to no layer is the root's
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, device: torch.device) -> list[float]:
    """STEPS steps from step `first` on; the rows of a step are the same whatever the number of ranks."""
    losses = []
    for step in range(first, first + STEPS):
        rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step)).to(device)
        own = rows.chunk(dist.get_world_size())[dist.get_rank()]
        loss = (model(own) - own.cos()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dist.all_reduce(loss := loss.detach() / dist.get_world_size())
        losses.append(loss.item())
    return losses


def gather(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return [tensor.full_tensor().detach().cpu() for tensor in (*model.parameters(), *moments)]


def show(model: torch.nn.Module) -> None:
    parameters = list(model.parameters())
    held = sum(parameter.to_local().nbytes for parameter in parameters)
    rows = [None] * dist.get_world_size()
    dist.all_gather_object(rows, (held, tuple(parameters[0].to_local().shape), str(parameters[0].placements)))
    for rank, (held, shape, placements) in enumerate(rows) if dist.get_rank() == 0 else []:
        whole = sum(parameter.nbytes for parameter in parameters)
        print(f"  rank {rank} holds {held:,} of {whole:,} bytes, {shape} of the first weight: {placements}")
    assert sum(held for held, *_ in rows) == sum(parameter.nbytes for parameter in parameters)


def write(rank: int, folder: str) -> None:
    device = join(rank, WRITERS, f"file://{folder}/writers")
    model, optimizer = build(device)
    train(model, optimizer, 0, device)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=f"{folder}/checkpoint")
    saved = gather(model, optimizer)
    losses = train(model, optimizer, STEPS, device)  # as if nothing had happened
    expected = {"saved": saved, "losses": losses, "final": gather(model, optimizer)}
    if rank == 0:
        torch.save(expected, f"{folder}/expected.pt")
    show(model)
    dist.destroy_process_group()


def read(rank: int, folder: str) -> None:
    device = join(rank, READERS, f"file://{folder}/readers")
    model, optimizer = build(device)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint")  # into the tensors of `state`, each rank its rows
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    expected = torch.load(f"{folder}/expected.pt")
    same = [torch.equal(one, two) for one, two in zip(gather(model, optimizer), expected["saved"], strict=True)]
    show(model)
    losses = train(model, optimizer, STEPS, device)
    pairs = zip(gather(model, optimizer), expected["final"], strict=True)
    apart = max((one - two).abs().max().item() for one, two in pairs)
    assert all(same) and apart < 1e-6
    if rank == 0:
        print("step  loss on the 2 that wrote  on the 3 that read")
        for step, pair in enumerate(zip(expected["losses"], losses, strict=True), STEPS):
            print(f"{step:>4}  {pair[0]:>24.8f}  {pair[1]:>18.8f}")
        print(f"proof: {sum(same)} of {len(same)} tensors read bit for bit; {STEPS} steps later within {apart:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    needed = ["torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"]
    mp.get_context("forkserver").set_forkserver_preload(needed)  # imported once; the ranks are forked from there
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(write, (folder,), nprocs=WRITERS, start_method="forkserver")
        print("files:", *sorted(path.name for path in Path(folder, "checkpoint").iterdir()))
        mp.start_processes(read, (folder,), nprocs=READERS, start_method="forkserver")
