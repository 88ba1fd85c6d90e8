"""Tensor-parallel linear layers: two ranks hold half of each matrix, and compute what one with the whole computes.

Why: for layers too big or too slow for one device. In gelu(x A) B, A is cut by columns, so that each rank goes on to
the GELU alone, and B by rows, so that one sum makes the output whole. Two autograd functions do all the talking, f and
g, as in Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053).

    python code11_tensor_parallel.py
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import gelu, linear

WORLD, WIDTH, HIDDEN, ROWS = 2, 8, 32, 5
calls = []  # the pass of each all-reduce


def join(rank: int, rendezvous: str) -> torch.device:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if os.uname().sysname == "Darwin" else "lo")
    cuda = torch.cuda.device_count() >= WORLD  # NCCL, with a GPU for each rank; else gloo, on the loopback interface
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    return torch.device("cuda" if cuda else "cpu")


class CopyToRanks(torch.autograd.Function):
    """f: all ranks get the same input, so its gradient is the sum of what the ranks' parts send back."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        calls.append("backward")
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient


class SumOverRanks(torch.autograd.Function):
    """g: each rank has one summand of the output, and all summands have the gradient of the sum."""

    @staticmethod
    def forward(ctx, tensor):
        calls.append("forward")
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def make_dense(device: torch.device) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, WIDTH))
    return model.double().to(device), torch.randn(ROWS, WIDTH).double().to(device).requires_grad_()


def run_by_hand(parts: list[torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    first, first_bias, second, second_bias = parts
    hidden = gelu(linear(CopyToRanks.apply(inputs), first, first_bias))  # [ROWS, HIDDEN / WORLD]: this rank's neurons
    return SumOverRanks.apply(linear(hidden, second)) + second_bias  # the bias once, not once a rank


def cut(rank: int, first, first_bias, second, second_bias) -> list[torch.Tensor]:
    """A rank's part of weights and biases, or of their gradients. A weight is [out, in]: its rows are A's columns."""
    own = first.chunk(WORLD, 0)[rank], first_bias.chunk(WORLD)[rank], second.chunk(WORLD, 1)[rank], second_bias
    return [tensor.detach().clone() for tensor in own]


def derive(output: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and the gradients of a loss in which each number of the output has a weight of its own."""
    weights = torch.arange(ROWS * WIDTH).view(ROWS, WIDTH).cos().to(output)
    return [output, *torch.autograd.grad((output * weights).sum(), tensors)]


def run_rank(rank: int, rendezvous: str) -> None:
    device = join(rank, rendezvous)
    dense, inputs = make_dense(device)
    output, gradient, *gradients = derive(dense(inputs), [inputs, *dense.parameters()])
    expected = [output, gradient, *cut(rank, *gradients)]
    parts = [part.requires_grad_() for part in cut(rank, *dense.parameters())]
    by_hand = derive(run_by_hand(parts, inputs), [inputs, *parts])
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(make_dense(device)[0], init_device_mesh(device.type, (WORLD,)), plan)
    output, gradient, *gradients = derive(model(inputs), [inputs, *model.parameters()])
    by_torch = [output, gradient, *(gradient.to_local() for gradient in gradients)]
    ways = [[(a - b).abs().max().item() for a, b in zip(way, expected, strict=True)] for way in (by_hand, by_torch)]
    worst = torch.tensor(ways, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    assert worst.max() < 1e-12 and calls == ["forward", "backward"]
    if rank == 0:
        print("                       on a rank  by hand - dense  torch's - dense")
        names = ["output", "input's gradient", "first weight's", "first bias's", "second weight's", "second bias's"]
        for name, tensor, *apart in zip(names, expected, *worst.tolist(), strict=True):
            print(f"{name:18} {list(tensor.shape)!s:>13}  {apart[0]:>15.1e}  {apart[1]:>15.1e}")
        held, whole = (sum(tensor.numel() for tensor in tensors) for tensors in (parts, dense.parameters()))
        print(f"parameters on a rank: {held} of {whole}; all-reduces by hand: {' '.join(calls)}")
        print(f"proof: output and all gradients within {worst[0].max():.1e} by hand, {worst[1].max():.1e} by torch")
    dist.destroy_process_group()


if __name__ == "__main__":
    needed = ["torch", "torch.distributed.tensor.parallel"]
    mp.get_context("forkserver").set_forkserver_preload(needed)  # imported once; the ranks are forked from there
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run_rank, (f"file://{folder}/rendezvous",), nprocs=WORLD, start_method="forkserver")
