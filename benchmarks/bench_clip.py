"""The contrastive loss, side by side: chinese_clip_ddp's tiled one and the ways that write the logits down.

    python benchmarks/bench_clip.py                       about 10 minutes and 12 GB of memory
    python benchmarks/bench_clip.py --parts whole --rounds 1

- whole: 16,384 pairs of width 512 in one process. The N x N matrix as one writes it, and as Transformers' CLIPModel has
  it, which multiplies the matrix by the temperature in place of the embeddings.
- ranks: 32,768 pairs on 2 ranks. open_clip's --local-loss --gather-with-grad, n x N twice, written plainly; one of its
  ranks works and the other only takes part in what moves, since both would need 21 GB.
- step: train_ddp_text_image.sh, its default model and data, --cross_embedding tiled and gather_nn: images a CPU second
  of all processes, from two runs of different length, so that their start doesn't count.

fp32, one thread a process, each run in a process of its own; the ways take turns, `--rounds` times, and the median
counts. Memory is how far the peak of the resident memory rises in the forward and the backward pass over what was held
before; the gradients of the embeddings, as large in every way, are in it.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
RECIPE = Path(__file__).resolve().parent.parent / "chinese_clip_ddp"
sys.path.insert(0, str(RECIPE))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from contrastive import Gather, Pairs, contrastive_loss  # noqa: E402
from loss_table import run_on_ranks, server  # noqa: E402

WIDTH, SCALE = 512, 14.3
TILED, WHOLE, TRANSFORMERS, LOCAL = "tiled", "whole matrix", "whole matrix, Transformers", "open_clip's local"


def loss_of(way: str, images, texts, scale):
    """A scalar on which backward() can be called; `images`, `texts` are this rank's."""
    first = len(images) * dist.get_rank()
    numbers = torch.arange(first, first + len(images))
    if way == TILED:
        return contrastive_loss("tiled", images, texts, scale, None, numbers, numbers)[0] * dist.get_world_size()
    if way == WHOLE:
        logits = scale * images @ texts.T
        return (F.cross_entropy(logits, numbers) + F.cross_entropy(logits.T, numbers)) / 2
    if way == TRANSFORMERS:
        logits_per_text = texts @ images.T * scale
        return (F.cross_entropy(logits_per_text, numbers) + F.cross_entropy(logits_per_text.T, numbers)) / 2
    pairs = Pairs(torch.stack([numbers, numbers], 1))
    all_images, all_texts = (Gather.apply(embeds, pairs, "local") for embeds in (images, texts))
    if dist.get_rank() > 0:
        return (all_images.sum() + all_texts.sum()) * 0
    logits_per_image, logits_per_text = scale * images @ all_texts.T, scale * texts @ all_images.T
    return (F.cross_entropy(logits_per_image, numbers) + F.cross_entropy(logits_per_text, numbers)) / 2


def measure(way: str, total: int) -> tuple[float, float, float, float]:
    """CPU seconds, memory in GB, loss, and the norm of the gradients, on one rank."""
    rank, size = dist.get_rank(), total // dist.get_world_size()
    random = torch.Generator().manual_seed(rank)
    images, texts = (F.normalize(torch.randn(size, WIDTH, generator=random), dim=-1).requires_grad_() for _ in range(2))
    scale = torch.tensor(SCALE, requires_grad=True)
    loss_of(way, images[:64], texts[:64], scale).backward()  # what the first call of anything costs
    images.grad = texts.grad = scale.grad = None
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    dist.barrier()
    start = time.process_time()
    loss = loss_of(way, images, texts, scale)
    loss.backward()
    seconds = time.process_time() - start
    peak = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])
    return seconds, (peak * 1024 - before) / 1e9, loss.item(), images.grad.norm().item()


def take_turns(ways: list[str], world_size: int, total: int, rounds: int) -> dict[str, list[float]]:
    """The medians of rank 0 of each way."""
    runs = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            results = run_on_ranks(world_size, measure, way, total)
            runs[way].append(results[0])
            print(
                f"  {way}: {', '.join(f'{seconds:.2f} s {memory:.3f} GB' for seconds, memory, *_ in results)}",
                file=sys.stderr,
            )
    return {way: [statistics.median(column) for column in zip(*found, strict=True)] for way, found in runs.items()}


def print_losses(medians: dict[str, list[float]], than: str) -> None:
    print(f"| way | CPU seconds of a rank | x {than} | memory growth of a rank, GB | x {than} | loss |")
    print("|---|---|---|---|---|---|")
    for way, (seconds, memory, loss, _) in medians.items():
        ratios = seconds / medians[than][0], memory / medians[than][1]
        print(f"| {way} | {seconds:.2f} | {ratios[0]:.2f} | {memory:.3f} | 1/{1 / ratios[1]:.1f} | {loss:.6f} |")


def train_cpu_seconds(mode: str, batch_size: int, steps: int) -> float:
    """Of all processes of a run of train.py on 2 ranks."""
    flags = ["--cross_embedding", mode, "--max_steps", steps, "--per_device_train_batch_size", batch_size]
    flags += ["--validation_split", "0", "--save_strategy", "no"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OUTPUT": f"{folder}/output", "NPROC": "2", "DATA": f"{RECIPE}/cache_data/scenes"}
        command = ["bash", f"{RECIPE}/train_ddp_text_image.sh", *map(str, flags)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command} failed:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure_steps(batch_size: int, rounds: int) -> None:
    subprocess.run([sys.executable, "data01_scenes.py"], cwd=RECIPE, check=True, stdout=subprocess.DEVNULL)
    short, long, speeds = 5, 65, {"gather_nn": [], "tiled": []}
    train_cpu_seconds("tiled", batch_size, short)  # which fills the caches of the images
    for _ in range(rounds):
        for mode, found in speeds.items():
            seconds = [train_cpu_seconds(mode, batch_size, steps) for steps in (short, long)]
            found.append(2 * batch_size * (long - short) / (seconds[1] - seconds[0]))
            print(f"  {mode}: {found[-1]:.1f}", file=sys.stderr)
    plain = statistics.median(speeds["gather_nn"])
    print(f"\n2 ranks x {batch_size} pairs, train.py\n\n| loss | images / CPU second | x gather_nn |\n|---|---|---|")
    for mode, found in speeds.items():
        print(f"| {mode} | {statistics.median(found):.1f} | {statistics.median(found) / plain:.3f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of every way; the median counts")
    parser.add_argument("--parts", nargs="+", choices=["whole", "ranks", "step"], default=["whole", "ranks", "step"])
    parser.add_argument(
        "--pairs", type=int, default=16384, help="of the part `whole`; the part `ranks` has twice as many"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="of each rank in the part `step`")
    options = parser.parse_args()
    server.set_forkserver_preload(["loss_table"])
    if "whole" in options.parts:
        medians = take_turns([WHOLE, TRANSFORMERS, TILED], 1, options.pairs, options.rounds)
        print(f"\n{options.pairs:,} pairs, one process\n")
        print_losses(medians, WHOLE)
    if "ranks" in options.parts:
        medians = take_turns([LOCAL, TILED], 2, 2 * options.pairs, options.rounds)
        matrix = (2 * options.pairs) ** 2 * 4 / 1e9
        total = f"{matrix:.1f} GB, with all of its loss {5 * matrix:.0f}"
        print(f"\n{2 * options.pairs:,} pairs, 2 ranks; the whole matrix would have {total}\n")
        print_losses(medians, LOCAL)
    if "step" in options.parts:
        measure_steps(options.batch_size, options.rounds)


if __name__ == "__main__":
    main()
