"""Buckets, overlap, DDP: five ways to average the gradients of the same training, with their times beside each other.

Why: each all-reduce costs a fixed time whatever its size, so gradients travel in buckets. The last layers' are there
first and can travel while the backward pass goes on; hooks say when. This is how DistributedDataParallel works (Li et
al. 2020, arXiv:2006.15704). Its gradients are copies of its buckets, or views with gradient_as_bucket_view=True.

    bash run_code08.sh
"""

import os
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

WIDTH, LAYERS, ROWS, STEPS = 128, 24, 32, 12
PER_BUCKET = 8  # parameters, of 4 layers: a quarter of a MiB; DDP's default is 25 MiB


def join() -> torch.device:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if os.uname().sysname == "Darwin" else "lo")
    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    return torch.device("cuda" if cuda else "cpu")


class Averager:
    """Averages gradients bucket by bucket: each as soon as it is full (overlap), or all after the backward pass."""

    def __init__(self, buckets: list[list[torch.nn.Parameter]], overlap: bool):
        self.buckets, self.overlap, self.begun, self.flying, self.buffers = buckets, overlap, 0, [], set()
        self.arrived = [0] * len(buckets)
        for number, bucket in enumerate(buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(lambda _, number=number: self.arrive(number))

    def arrive(self, number: int) -> None:  # in the middle of the backward pass
        self.arrived[number] += 1
        if self.overlap and self.arrived[number] == len(self.buckets[number]):
            self.send(number)

    def send(self, number: int) -> None:
        flat = torch.cat([parameter.grad.flatten() for parameter in self.buckets[number]]) / dist.get_world_size()
        self.flying.append((self.buckets[number], flat, dist.all_reduce(flat, async_op=True)))
        self.begun += 1

    def finish(self) -> None:
        for number in range(len(self.buckets)) if not self.overlap else []:
            self.send(number)
        for bucket, flat, work in self.flying:
            work.wait()
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad.copy_(part.view_as(parameter))
        self.flying, self.arrived = [], [0] * len(self.buckets)


def count_all_reduce(averager: Averager, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    averager.begun += 1
    averager.buffers.add(bucket.buffer().untyped_storage().data_ptr())
    return allreduce_hook(None, bucket)


def train(way: str, device: torch.device) -> tuple[int, int, float, torch.Tensor, int]:
    """All-reduces a step, how many had begun when the first layer's gradient came, ms a step, weights, and views."""
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())]
    model = torch.nn.Sequential(*layers).to(device)
    parameters, early, times = list(model.parameters()), [], []
    optimizer = torch.optim.SGD(parameters, lr=1)
    parameters[0].register_post_accumulate_grad_hook(lambda _: early.append(averager.begun))
    size = 1 if way == "each gradient" else PER_BUCKET
    buckets = [parameters[::-1][start : start + size] for start in range(0, len(parameters), size)]  # last layer first
    averager = Averager([] if "DDP" in way else buckets, overlap=way == "buckets, by hooks")
    if "DDP" in way:
        model = DistributedDataParallel(model, bucket_cap_mb=0.25, gradient_as_bucket_view=way == "DDP, views")
        model.register_comm_hook(averager, count_all_reduce)
    for step in range(STEPS):
        torch.manual_seed(1 + step * dist.get_world_size() + dist.get_rank())  # each rank has rows of its own
        inputs = torch.randn(ROWS, WIDTH).to(device)
        dist.barrier()
        begin, averager.begun = time.perf_counter(), 0
        (model(inputs) - inputs).square().mean().backward()
        averager.finish()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # views of DDP's buckets have to stay
        dist.barrier()
        times.append(1000 * (time.perf_counter() - begin))
    views = sum(parameter.grad.untyped_storage().data_ptr() in averager.buffers for parameter in parameters)
    weights = torch.nn.utils.parameters_to_vector(parameters).detach()
    return averager.begun, early[-1], sorted(times)[STEPS // 2], weights, views


def main() -> None:
    if "RANK" not in os.environ:
        sys.exit("error: this lesson needs torchrun to start it: bash run_code08.sh")
    device, rank = join(), int(os.environ["RANK"])
    ways = ["each gradient", "buckets, after", "buckets, by hooks", "DDP", "DDP, views"]
    rows = {way: train(way, device) for way in ways}
    apart = {way: (row[3] - rows["DDP"][3]).abs().max().item() for way, row in rows.items()}
    each, late, soon, ddp, view = rows.values()
    assert max(apart.values()) < 1e-6 and each[0] == view[4] and each[1] == late[1] == ddp[4] == 0 < soon[1] * ddp[1]
    if rank == 0:
        print(f"{dist.get_world_size()} ranks, {ddp[3].nbytes:,} bytes of gradients, {PER_BUCKET} gradients a bucket")
        print("all-reduce of ...     a step  begun early  ms a step  views of buckets  off DDP by")
        for way, (begun, early, milliseconds, _, views) in rows.items():
            print(f"{way:20} {begun:>7} {early:>12} {milliseconds:>10.1f} {views:>17}  {apart[way]:.1e}")
        print(f"proof: {each[0]} all-reduces became {soon[0]}, {soon[1]} begun early; off DDP by ", end="")
        print(f"{max(apart.values()):.1e}; {ddp[4]} gradients are views of its buckets, {view[4]} if asked for")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
