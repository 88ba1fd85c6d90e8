"""Zig-zag order: with contiguous slices the last rank of ring attention has most to do; here all have the same.

Why: causal attention leaves out what lies in the future, so who has the end of the sequence has most to compute, and in
each step of the ring all wait for the slowest. With a chunk from the front and one from the back a step costs all ranks
the same, and the whole less: Llama 3 (2024, arXiv:2407.21783), the ring-flash-attention package and PyTorch's context
parallelism cut sequences like this. The ring itself, with its backward pass, is in code13_ring_attention.py.

    python code13_zigzag.py
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import scaled_dot_product_attention

WORLD, HEADS, LENGTH, SIZE = 3, 2, 96, 16
CHUNK = LENGTH // (2 * WORLD)
ORDERS = {  # the two chunks of each rank
    "contiguous": [(2 * rank, 2 * rank + 1) for rank in range(WORLD)],
    "zig-zag": [(rank, 2 * WORLD - 1 - rank) for rank in range(WORLD)],
}


def join(rank: int, rendezvous: str) -> torch.device:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if os.uname().sysname == "Darwin" else "lo")
    cuda = torch.cuda.device_count() >= WORLD  # NCCL, with a GPU for each rank; else gloo, on the loopback interface
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    return torch.device("cuda" if cuda else "cpu")


def rotate(tensor: torch.Tensor) -> torch.Tensor:
    """Gives to the right, takes from the left."""
    incoming, right, left = torch.empty_like(tensor), (dist.get_rank() + 1) % WORLD, (dist.get_rank() - 1) % WORLD
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, tensor, right), dist.P2POp(dist.irecv, incoming, left)]):
        work.wait()
    return incoming


def attend(query, key, value, chunks: list[tuple[int, int]]) -> tuple[torch.Tensor, list[int]]:
    """Ring attention of this rank's two chunks, each tensor [2, HEADS, CHUNK, SIZE].

    Returns:
        The output, and how many blocks of scores [CHUNK, CHUNK] were computed in each step; one on the diagonal, of
        which half is in the future, counts as half a block.
    """
    output, total, work = torch.zeros_like(query), torch.zeros_like(query[..., :1]), [0.0] * WORLD
    peak, travelling = torch.full_like(total, -torch.inf), torch.stack([key, value])
    mine = chunks[dist.get_rank()]
    for step in range(WORLD):
        theirs = chunks[(dist.get_rank() - step) % WORLD]
        for i, j in [(i, j) for i in (0, 1) for j in (0, 1) if theirs[j] <= mine[i]]:  # the rest is in the future
            scores = query[i] @ travelling[0, j].transpose(1, 2) / SIZE**0.5
            if theirs[j] == mine[i]:
                scores = scores + torch.full_like(scores, -torch.inf).triu(1)
            work[step] += 0.5 if theirs[j] == mine[i] else 1
            new_peak = torch.maximum(peak[i], scores.amax(-1, keepdim=True))
            weights, shrink = (scores - new_peak).exp(), (peak[i] - new_peak).exp()
            total[i] = total[i] * shrink + weights.sum(-1, keepdim=True)
            output[i] = output[i] * shrink + weights @ travelling[1, j]
            peak[i] = new_peak
        travelling = rotate(travelling)
    return output / total, work


def run_rank(rank: int, rendezvous: str) -> None:
    device = join(rank, rendezvous)
    torch.manual_seed(0)
    whole = [torch.randn(HEADS, LENGTH, SIZE).to(device) for _ in range(3)]  # query, key, value
    whole.append(scaled_dot_product_attention(*whole, is_causal=True))
    worst, waited, shares = 0.0, {}, {}
    for order, chunks in ORDERS.items():
        *own, expected = [torch.stack([tensor.split(CHUNK, 1)[chunk] for chunk in chunks[rank]]) for tensor in whole]
        output, work = attend(*own, chunks)
        rows = [None] * WORLD
        dist.all_gather_object(rows, (work, (output - expected).abs().max().item()))
        worst = max(worst, *(apart for _, apart in rows))
        shares[order] = [sum(work) for work, _ in rows]
        waited[order] = sum(max(work[step] for work, _ in rows) for step in range(WORLD))  # the slowest of each step
        if rank == 0:
            print(f"{order}: {sum(shares[order]):g} blocks, as slow as {waited[order]:g} of one rank after the other")
            print("rank  its chunks  blocks by step of the ring    all")
            for number, (work, _) in enumerate(rows):
                steps = "".join(f"{count:>6}" for count in work)
                print(f"{number:>4}  {chunks[number]!s:10}  {steps:26}  {sum(work):>5}")
    assert worst < 1e-5 and sum(shares["contiguous"]) == sum(shares["zig-zag"]) == (2 * WORLD) ** 2 / 2
    assert len(set(shares["zig-zag"])) == 1 and waited["zig-zag"] == shares["zig-zag"][0] < waited["contiguous"]
    if rank == 0:
        print(f"proof: output within {worst:.1e} of full attention; blocks by rank {shares['contiguous']}, ", end="")
        print(f"zig-zag {shares['zig-zag']}; all steps {waited['contiguous']:g} and {waited['zig-zag']:g} blocks long")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.get_context("forkserver").set_forkserver_preload(["torch"])  # imported once; the ranks are forked from there
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run_rank, (f"file://{folder}/rendezvous",), nprocs=WORLD, start_method="forkserver")
