"""Ring attention: each rank has a slice of the sequence; keys and values travel round, the softmax is built up online.

Why: with long sequences, neither one sequence's activations nor its scores [T, T] fit on a device. Each rank keeps its
queries; after WORLD - 1 steps it has met all keys, a slice and a block of scores at a time (Liu et al. 2023,
arXiv:2310.01889). The running maximum and sum are those of the online softmax (Milakov and Gimelshein 2018,
arXiv:1805.02867). Keys' and values' gradients travel with them. The last rank has most to do: code13_zigzag.py.

    python code13_ring_attention.py
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import scaled_dot_product_attention

WORLD, HEADS, LENGTH, SIZE = 3, 2, 96, 16
met = []  # (whose keys, bytes of the scores), for each block that this rank has computed


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


def score(query: torch.Tensor, key: torch.Tensor, owner: int) -> torch.Tensor:
    """[HEADS, slice, slice], causal: of the rank's own keys those up to the query, of earlier slices all."""
    scores = query @ key.transpose(1, 2) / SIZE**0.5
    met.append((owner, scores.nbytes))
    return scores + torch.full_like(scores, -torch.inf).triu(1) if owner == dist.get_rank() else scores


class RingAttention(torch.autograd.Function):
    """Of this rank's slices of query, key, value, each [HEADS, LENGTH / WORLD, SIZE]."""

    @staticmethod
    def forward(ctx, query, key, value):
        output, total = torch.zeros_like(query), query.new_zeros(*query.shape[:2], 1)
        peak, travelling = torch.full_like(total, -torch.inf), torch.stack([key, value])
        for step in range(WORLD):
            owner = (dist.get_rank() - step) % WORLD  # whose keys are here
            if owner <= dist.get_rank():  # else they all lie in the future
                scores = score(query, travelling[0], owner)
                new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
                weights, shrink = (scores - new_peak).exp(), (peak - new_peak).exp()
                total = total * shrink + weights.sum(-1, keepdim=True)
                output = output * shrink + weights @ travelling[1]
                peak = new_peak
            if step < WORLD - 1:
                travelling = rotate(travelling)
        output = output / total
        ctx.save_for_backward(query, key, value, output, peak + total.log())
        return output

    @staticmethod
    def backward(ctx, slope):
        query, key, value, output, log_total = ctx.saved_tensors
        query_gradient, shared = torch.zeros_like(query), (slope * output).sum(-1, keepdim=True)
        travelling = torch.stack([key, value, torch.zeros_like(key), torch.zeros_like(value)])
        for step in range(WORLD):
            owner = (dist.get_rank() - step) % WORLD
            if owner <= dist.get_rank():
                key, value, key_gradient, value_gradient = travelling
                weights = (score(query, key, owner) - log_total).exp()  # computed again instead of kept
                score_gradient = weights * (slope @ value.transpose(1, 2) - shared) / SIZE**0.5
                query_gradient += score_gradient @ key
                key_gradient += score_gradient.transpose(1, 2) @ query
                value_gradient += weights.transpose(1, 2) @ slope
            travelling = rotate(travelling)
        return query_gradient, *travelling[2:]  # after WORLD turns at home again


def run_rank(rank: int, rendezvous: str) -> None:
    device = join(rank, rendezvous)
    torch.manual_seed(0)
    whole = [torch.randn(HEADS, LENGTH, SIZE).to(device).requires_grad_() for _ in range(3)]  # query, key, value
    weights = torch.randn(HEADS, LENGTH, SIZE).to(device)  # of each output in the loss
    full = scaled_dot_product_attention(*whole, is_causal=True)
    theirs = [full, *torch.autograd.grad((full * weights).sum(), whole)]
    own = [tensor.detach().chunk(WORLD, 1)[rank].clone().requires_grad_() for tensor in whole]
    output = RingAttention.apply(*own)
    ours = [output, *torch.autograd.grad((output * weights.chunk(WORLD, 1)[rank]).sum(), own)]
    apart = [(a.chunk(WORLD, 1)[rank] - b).abs().max().item() for a, b in zip(theirs, ours, strict=True)]
    rows = [None] * WORLD
    dist.all_gather_object(rows, (met, apart))
    worst, block, scores = max(max(apart) for _, apart in rows), met[0][1], HEADS * LENGTH**2 * full.element_size()
    for number, (blocks, _) in enumerate(rows):  # forward and backward: its own keys first, then the earlier ones
        assert blocks == [(owner, block) for owner in [*range(number, -1, -1)] * 2]
    assert worst < 1e-5 and block * WORLD**2 == scores
    if rank == 0:
        print(f"{LENGTH} positions, {LENGTH // WORLD} a rank; bytes of scores at a time: {block:,}; in full {scores:,}")
        print("rank  keys met, of rank  off full attention: output  query's gradient    key's  value's")
        for number, (blocks, apart) in enumerate(rows):
            owners = " ".join(str(owner) for owner, _ in blocks[: number + 1])
            print(f"{number:>4}  {owners:17} {apart[0]:>27.1e} {apart[1]:>17.1e} {apart[2]:>8.1e} {apart[3]:>8.1e}")
        share = f"1/{scores // block} of its scores in memory"
        print(f"proof: output and gradients within {worst:.1e} of full attention, with {share}")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.get_context("forkserver").set_forkserver_preload(["torch"])  # imported once; the ranks are forked from there
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run_rank, (f"file://{folder}/rendezvous",), nprocs=WORLD, start_method="forkserver")
