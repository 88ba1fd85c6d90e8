"""Pipeline parallel: each rank holds a stage of the network, and micro-batches keep the stages busy.

Why: with one batch only one stage works at a time. With m micro-batches on p stages (p - 1) / (m + p - 1) of the time
is still lost: the bubble. GPipe (Huang et al. 2019, arXiv:1811.06965) runs all forwards, then all backwards; it keeps m
activations. 1F1B (Narayanan et al. 2021, arXiv:2104.04473) has the same bubble and keeps at most p.

    python code12_pipeline.py
"""

import itertools
import os
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 3  # stages
MICRO, ROWS, WIDTH, COLUMNS = 6, 2, 8, 96
SECONDS = {"F": 0.02, "B": 0.04}  # each is drawn out to this, so that the chart shows the schedule and not the machine


def join(rank: int, rendezvous: str) -> torch.device:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if os.uname().sysname == "Darwin" else "lo")
    cuda = torch.cuda.device_count() >= WORLD  # NCCL, with a GPU for each rank; else gloo, on the loopback interface
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    return torch.device("cuda" if cuda else "cpu")


def make_stages(device: torch.device) -> tuple[list[torch.nn.Module], torch.Tensor]:
    torch.manual_seed(0)
    stages = [torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh()) for _ in range(WORLD)]
    return [stage.double().to(device) for stage in stages], torch.randn(MICRO, ROWS, WIDTH).double().to(device)


def make_schedule(name: str, stage: int) -> list[tuple[str, int]]:
    """What a stage does, in order: forward or backward, of which micro-batch."""
    warmup = MICRO if name == "GPipe" else WORLD - stage - 1
    schedule = [("F", number) for number in range(warmup)]
    for number in range(MICRO - warmup):
        schedule += [("F", warmup + number), ("B", number)]
    return schedule + [("B", number) for number in range(MICRO - warmup, MICRO)]


def run_stage(name: str, rank: int, device: torch.device) -> tuple[dict, int, list[torch.Tensor]]:
    """(F or B, micro-batch) -> (begin, end), the most activations kept at a time, and the stage's gradients."""
    stages, batch = make_stages(device)
    kept, events, most, leaving, on_the_way = {}, {}, 0, [], []
    for kind, number in make_schedule(name, rank):
        source, target = (rank - 1, rank + 1) if kind == "F" else (rank + 1, rank - 1)
        arriving = torch.empty(ROWS, WIDTH, dtype=torch.float64, device=device)
        receives = [dist.P2POp(dist.irecv, arriving, source)] if 0 <= source < WORLD else []
        if leaving + receives:  # together: with NCCL, two ranks that each send first would wait for ever
            on_the_way += dist.batch_isend_irecv(leaving + receives)
        if receives:
            on_the_way.pop().wait()
            arriving[0, 0].item()  # NCCL's wait lets the program go on, but the clock below shouldn't
        begin = time.monotonic()
        if kind == "F":
            inputs = (batch[number] if rank == 0 else arriving).requires_grad_(rank > 0)
            kept[number] = inputs, stages[rank](inputs)
            most, result = max(most, len(kept)), kept[number][1].detach()
        else:
            inputs, output = kept.pop(number)
            loss = output.square().mean() / MICRO if rank == WORLD - 1 else (output * arriving).sum()
            loss.backward()  # the derivative of that sum by `output` is what has arrived
            result = inputs.grad
        leaving = [dist.P2POp(dist.isend, result, target)] if 0 <= target < WORLD else []
        time.sleep(max(0, begin + SECONDS[kind] - time.monotonic()))
        events[kind, number] = begin, time.monotonic()
    for work in on_the_way + (dist.batch_isend_irecv(leaving) if leaving else []):
        work.wait()
    return events, most, [parameter.grad for parameter in stages[rank].parameters()]


def draw(name: str, rows: list[tuple[dict, int, float]]) -> None:
    moments = [moment for events, *_ in rows for times in events.values() for moment in times]
    start, span = min(moments), max(moments) - min(moments)
    print(f"{name}: ABC... forward, abc... backward of micro-batches, {1000 * span:.0f} ms")
    for stage, (events, most, _) in enumerate(rows):
        line = ["."] * COLUMNS
        for (kind, number), times in events.items():
            first, last = (round((moment - start) / span * COLUMNS) for moment in times)
            line[first:last] = chr(ord("A" if kind == "F" else "a") + number) * (last - first)
        print(f"  stage {stage} {''.join(line)} keeps {most}")
    bubble = 1 - sum(end - begin for events, *_ in rows for begin, end in events.values()) / span / WORLD
    print(f"  bubble {bubble:.1%}; (p - 1) / (m + p - 1) = {(WORLD - 1) / (MICRO + WORLD - 1):.1%}")


def run_rank(rank: int, rendezvous: str) -> None:
    device = join(rank, rendezvous)
    stages, batch = make_stages(device)
    torch.nn.Sequential(*stages)(batch.flatten(0, 1)).square().mean().backward()  # one process, one batch
    expected, worst, most = [parameter.grad for parameter in stages[rank].parameters()], 0, {}
    for name in ("GPipe", "1F1B"):
        events, kept, gradients = run_stage(name, rank, device)
        apart = max((one - two).abs().max().item() for one, two in zip(gradients, expected, strict=True))
        rows = [None] * WORLD
        dist.all_gather_object(rows, (events, kept, apart))
        if rank == 0:
            draw(name, rows)
        for (one, *_), (two, *_) in itertools.pairwise(rows):  # two stages, neighbours
            assert all(one["F", n][1] <= two["F", n][0] and two["B", n][1] <= one["B", n][0] for n in range(MICRO))
        worst, most[name] = max(worst, *(apart for *_, apart in rows)), [kept for _, kept, _ in rows]
    assert worst < 1e-12 and most == {"GPipe": [MICRO] * WORLD, "1F1B": list(range(WORLD, 0, -1))}
    if rank == 0:
        print(f"proof: gradients within {worst:.1e} of one process's; activations kept by stage: {most}")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.get_context("forkserver").set_forkserver_preload(["torch"])  # imported once; the ranks are forked from there
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run_rank, (f"file://{folder}/rendezvous",), nprocs=WORLD, start_method="forkserver")
