"""torch.distributed.pipelining: GPipe and 1F1B as PyTorch has them, step by step those of code12_pipeline.py.

Why: a stage is a module that knows its place, a schedule runs all micro-batches through it and does the sending. Each
rank makes its own stage; the first gives the inputs, the last the targets. Hooks on the module show the order, which is
held against the rule. 1F1B: as many forwards as there are stages behind, then one forward, one backward in turn.

    python code12_schedules.py
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

WORLD, MICRO, ROWS, WIDTH = 3, 6, 2, 8  # stages; micro-batches; rows of one


def join(rank: int, rendezvous: str) -> torch.device:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if os.uname().sysname == "Darwin" else "lo")
    cuda = torch.cuda.device_count() >= WORLD  # NCCL, with a GPU for each rank; else gloo, on the loopback interface
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    return torch.device("cuda" if cuda else "cpu")


def make_stages(device: torch.device) -> tuple[list[torch.nn.Module], torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    stages = [torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh()) for _ in range(WORLD)]
    inputs, targets = torch.randn(2, MICRO * ROWS, WIDTH).double().to(device)
    return [stage.double().to(device) for stage in stages], inputs, targets


def compute_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean()


def expect(name: str, stage: int) -> str:
    """F and B in the order in which a stage does them by hand."""
    warmup = MICRO if name == "GPipe" else WORLD - stage - 1
    return "F" * warmup + "FB" * (MICRO - warmup) + "B" * warmup


def run(name: str, rank: int, device: torch.device) -> tuple[str, int, list[float], list[torch.Tensor]]:
    """What the stage did in order, the most activations it kept, the losses (last stage), its gradients."""
    stages, inputs, targets = make_stages(device)
    module, order = stages[rank], []
    module.register_forward_hook(lambda *_: order.append("F"))
    module[0].weight.register_hook(lambda _: order.append("B"))
    kinds = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}
    shape = torch.empty(
        ROWS, WIDTH, dtype=torch.float64, device="meta", requires_grad=True
    )  # else a forward pass would find it out
    stage = PipelineStage(module, rank, WORLD, device, input_args=shape, output_args=shape)
    schedule = kinds[name](stage, n_microbatches=MICRO, loss_fn=compute_loss)
    losses = []
    if rank == 0:
        schedule.step(inputs)
    elif rank == WORLD - 1:
        schedule.step(target=targets, losses=losses)
    else:
        schedule.step()
    kept = max(order[:end].count("F") - order[:end].count("B") for end in range(1, 2 * MICRO + 1))
    gradients = [parameter.grad for parameter in module.parameters()]
    return "".join(order), kept, [loss.item() for loss in losses], gradients


def run_rank(rank: int, rendezvous: str) -> None:
    device = join(rank, rendezvous)
    stages, inputs, targets = make_stages(device)
    whole = compute_loss(torch.nn.Sequential(*stages)(inputs), targets)  # one process, one batch
    whole.backward()
    expected, worst, most = [parameter.grad for parameter in stages[rank].parameters()], 0.0, {}
    for name in ("GPipe", "1F1B"):
        order, kept, losses, gradients = run(name, rank, device)
        apart = max((one - two).abs().max().item() for one, two in zip(gradients, expected, strict=True))
        if rank == WORLD - 1:
            apart = max(apart, abs(sum(losses) / MICRO - whole.item()))
        rows = [None] * WORLD
        dist.all_gather_object(rows, (order, kept, apart))
        for stage, (order, kept, _) in enumerate(rows):
            if rank == 0:
                print(f"{name:6} stage {stage} {order} keeps {kept}")
            assert order == expect(name, stage)
        worst, most[name] = max(worst, *(apart for *_, apart in rows)), [kept for _, kept, _ in rows]
    assert worst < 1e-12 and most == {"GPipe": [MICRO] * WORLD, "1F1B": list(range(WORLD, 0, -1))}
    if rank == 0:
        print(f"proof: loss and gradients within {worst:.1e} of one process's, 6 orders as by hand; kept: {most}")
    dist.destroy_process_group()


if __name__ == "__main__":
    needed = ["torch", "torch.distributed.pipelining"]
    mp.get_context("forkserver").set_forkserver_preload(needed)  # imported once; the ranks are forked from there
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run_rank, (f"file://{folder}/rendezvous",), nprocs=WORLD, start_method="forkserver")
