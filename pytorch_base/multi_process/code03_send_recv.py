"""A process group: ranks meet, and send tensors to each other.

Why: a queue joins a parent and its children on one machine. A process group joins equals, on any number of machines:
each knows its rank and the world size, and all run the same program. NCCL carries tensors between GPUs, gloo between
CPUs.

    python code03_send_recv.py
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 3


def join(rank: int, rendezvous: str) -> torch.device:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if os.uname().sysname == "Darwin" else "lo")
    cuda = torch.cuda.device_count() >= WORLD  # NCCL, with a GPU for each rank; else gloo, on the loopback interface
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    return torch.device("cuda" if cuda else "cpu")


def pass_token(rank: int, device: torch.device) -> float:
    """Once round the ring: each adds its rank to what it gets. Blocking calls, so the order is that of the ring."""
    token = torch.zeros(1, device=device)
    if rank > 0:
        dist.recv(token, src=rank - 1)
    received = token.item()
    token += rank
    dist.send(token, dst=(rank + 1) % WORLD)
    if rank == 0:
        dist.recv(token, src=WORLD - 1)
        received = token.item()
    return received


def shift(rank: int, device: torch.device) -> list[float]:
    """All send to the right and receive from the left at once.

    `send` may wait until the other side receives: if all ranks began with it, none would get further. `isend` and
    `irecv` return at once, and NCCL needs both of one rank to be handed over in one batch.
    """
    outgoing = torch.tensor([10.0 * rank, 10.0 * rank + 1], device=device)
    incoming = torch.empty(2, device=device)
    transfers = [
        dist.P2POp(dist.isend, outgoing, (rank + 1) % WORLD),
        dist.P2POp(dist.irecv, incoming, (rank - 1) % WORLD),
    ]
    for work in dist.batch_isend_irecv(transfers):
        work.wait()  # `incoming` holds nothing and `outgoing` may not be changed before this
    return incoming.tolist()


def ask_for_shape(rank: int, device: torch.device) -> list[list[float]]:
    """The receiver has to know shape and dtype; where it can't, they are sent first."""
    if rank == 0:
        matrix = torch.arange(6.0, device=device).view(2, 3)
        dist.send(torch.tensor(matrix.shape, device=device), dst=1)
        dist.send(matrix, dst=1)
    if rank != 1:
        return []
    shape = torch.empty(2, dtype=torch.int64, device=device)
    dist.recv(shape, src=0)
    matrix = torch.empty(shape.tolist(), device=device)
    dist.recv(matrix, src=0)
    return matrix.tolist()


def run_rank(rank: int, rendezvous: str) -> None:
    device = join(rank, rendezvous)
    row = [os.getpid(), pass_token(rank, device), shift(rank, device), ask_for_shape(rank, device)]
    rows = [None] * WORLD if rank == 0 else None
    dist.gather_object(row, rows)  # to rank 0: any Python object, pickled
    if rank == 0:
        show(rows)
    dist.destroy_process_group()


def show(rows: list[list]) -> None:
    print(f"backend {dist.get_backend()}, world size {dist.get_world_size()}; what each rank received:")
    print(f"{'rank':>4} {'pid':>8}  {'token':>5}  {'from the left':14} matrix")
    for rank, (pid, token, shifted, matrix) in enumerate(rows):
        print(f"{rank:>4} {pid:>8}  {token:>5.0f}  {shifted!s:14} {matrix}")
    pids, tokens, shifts, matrices = zip(*rows, strict=True)
    assert len({*pids, os.getppid()}) == WORLD + 1
    assert tokens == (3, 0, 1)
    assert shifts == ([20.0, 21.0], [0.0, 1.0], [10.0, 11.0])
    assert matrices == ([], [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], [])
    print(f"proof: the token comes back as {tokens[0]:.0f} = 0 + 1 + 2; {WORLD} ranks have their left neighbour's pair")


if __name__ == "__main__":
    mp.get_context("forkserver").set_forkserver_preload(["torch"])  # imported once; the ranks are forked from there
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run_rank, (f"file://{folder}/rendezvous",), nprocs=WORLD, start_method="forkserver")
