"""ZeRO stages 1, 2 and 3 by hand: what a rank holds at every moment of a step, and that all of them train like DDP.

Why: with DDP every rank holds all parameters, gradients and Adam moments. ZeRO (Rajbhandari et al., arXiv:1910.02054)
partitions them: stage 1 the moments, 2 the gradients too, 3 the parameters too. The backward pass is written out.

    python code09_zero.py
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD, LAYERS, WIDTH, STEPS, RATE = 2, 4, 64, 4, 0.01
calls = []  # the names of the collectives that were called


def join(rank: int, rendezvous: str) -> torch.device:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if os.uname().sysname == "Darwin" else "lo")
    cuda = torch.cuda.device_count() >= WORLD  # NCCL, with a GPU for each rank; else gloo, on the loopback interface
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    return torch.device("cuda" if cuda else "cpu")


def make_start(rank: int, device: torch.device) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    chain = [part for _ in range(LAYERS) for part in (torch.nn.Linear(WIDTH, WIDTH, bias=False), torch.nn.Tanh())]
    rows = torch.randn(2, WORLD, 6, WIDTH)[:, rank].double().to(device)
    return torch.nn.Sequential(*chain).double().to(device), *rows


def count_bytes(*kinds: list[torch.Tensor]) -> list[int]:
    """Of the memory behind each kind of tensors, once where two of them share it."""
    memories = [[tensor.untyped_storage() for tensor in kind] for kind in kinds]
    return [sum({memory.data_ptr(): memory.nbytes() for memory in kind}.values()) for kind in memories]


def train_ddp(rank: int, device: torch.device) -> tuple[list[torch.Tensor], list[int]]:
    model, inputs, targets = make_start(rank, device)
    model, weights = torch.nn.parallel.DistributedDataParallel(model), list(model.parameters())
    optimizer = torch.optim.Adam(weights, lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return weights, count_bytes(weights, [weight.grad for weight in weights], moments)


def gather(part: torch.Tensor) -> torch.Tensor:
    calls.append("all_gather")
    dist.all_gather_single(full := part.new_empty(WIDTH, WIDTH), part)
    return full


def reduce_scatter(full: torch.Tensor) -> torch.Tensor:
    calls.append("reduce_scatter")
    dist.reduce_scatter_single(part := full.new_empty(WIDTH // WORLD, WIDTH), full)
    return part


def train(stage: int, rank: int, device: torch.device) -> tuple[list[torch.Tensor], dict[str, list[int]], str]:
    model, inputs, targets = make_start(rank, device)
    weights, whole = [weight.detach() for weight in model.parameters()], torch.Tensor.detach  # of the same memory
    if stage == 3:
        weights, whole = [weight.chunk(WORLD)[rank].clone() for weight in weights], gather
    del model  # stage 3 holds parts only, and in memory of their own
    moments, held = [torch.zeros(2, WIDTH // WORLD, WIDTH).to(inputs) for _ in range(LAYERS)], {}
    for step in range(1, STEPS + 1):
        outputs, gradients = [inputs], {}
        for part in weights:
            outputs.append(torch.tanh(outputs[-1] @ whole(part).T))
        slope = 2 * (outputs[-1] - targets) / (WORLD * targets.numel())
        for layer in reversed(range(LAYERS)):
            slope = slope * (1 - outputs[layer + 1].square())
            gradient, weight = slope.T @ outputs[layer], whole(weights[layer])
            slope = slope @ weight
            held["in backward"] = count_bytes([*weights, weight], [*gradients.values(), gradient], moments)
            gradients[layer] = gradient if stage == 1 else reduce_scatter(gradient)
            del gradient, weight
        held["after backward"] = count_bytes(weights, gradients.values(), moments)
        for layer, (mean, square) in enumerate(moments):
            gradient = reduce_scatter(gradients.pop(layer)) if stage == 1 else gradients.pop(layer)
            part = weights[layer] if stage == 3 else weights[layer].chunk(WORLD)[rank]
            mean = mean.lerp_(gradient, 0.1) / (1 - 0.9**step)
            square = square.lerp_(gradient.square(), 0.001) / (1 - 0.999**step)
            part -= RATE * mean / (square.sqrt() + 1e-8)  # Adam
            weights[layer] = part if stage == 3 else gather(part)
    made = " ".join(f"{name} {calls.count(name) / STEPS / LAYERS:g}" for name in sorted(set(calls)))
    return [whole(part) for part in weights], held, made


def run_rank(rank: int, rendezvous: str) -> None:
    ddp, now = train_ddp(rank, device := join(rank, rendezvous))
    rows, totals, apart = [("DDP    after backward", now, "all_reduce, in buckets")], [sum(now)], []
    for stage in (1, 2, 3):
        calls.clear()
        weights, held, made = train(stage, rank, device)
        rows += [(f"ZeRO-{stage} {point}", now, made) for point, now in held.items()]
        totals.append(sum(held["after backward"]))
        apart += [(one - two).abs().max().item() for one, two in zip(weights, ddp, strict=True)]
    assert max(apart) < 1e-12 and [16 * total / totals[0] for total in totals] == [16, 12, 10, 8]
    if rank == 0:
        print(f"bytes on a rank{'':7} parameters gradients   moments     total  calls a layer and step")
        for name, now, made in rows:
            print(f"{name:23}", *(f"{number:>9,}" for number in (*now, sum(now))), "", made)
        print(f"proof: DDP, ZeRO-1, 2, 3 hold {totals} bytes after backward; weights within {max(apart):.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.get_context("forkserver").set_forkserver_preload(["torch", "torch._dynamo"])  # torch.optim needs the second
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run_rank, (f"file://{folder}/rendezvous",), nprocs=WORLD, start_method="forkserver")
