"""What each way of contrastive.py gives on several ranks, beside one process with the whole batch.

    python loss_table.py                the table of the gradients, on 2 and 4 ranks

Two small towers on pairs drawn from a common latent; real ranks over gloo, and the real DDP in `train_curves`.
"""

import multiprocessing
import queue
import tempfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from contrastive import MODES, Gather, contrastive_loss, local_loss, ring
from pairs import Pairs

server = multiprocessing.get_context("forkserver")
LOCAL_OWN_SLICE = "local, own slice"  # open_clip's --local-loss without --gather-with-grad
WIDTH, LATENT = 24, 6


# -------------------------------------------------------------------------------------------------- ranks
def work(rank: int, world_size: int, meeting: str, results, function, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    results.put((rank, function(*arguments)))
    dist.barrier()
    dist.destroy_process_group()


def run_on_ranks(world_size: int, function, *arguments) -> list:
    """What `function(*arguments)` returns on each rank of a gloo group: numbers, lists, arrays, no tensors.

    Raises:
        RuntimeError: a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = server.Queue()
        given = (world_size, f"{folder}/meeting", results, function, arguments)
        ranks = [server.Process(target=work, args=(rank, *given), daemon=True) for rank in range(world_size)]
        for rank in ranks:
            rank.start()
        found = {}
        while len(found) < world_size:
            try:
                found |= [results.get(timeout=1)]
            except queue.Empty:
                if any(rank.exitcode for rank in ranks):
                    for rank in ranks:  # the others would wait for it
                        rank.kill()
                    raise RuntimeError(f"the ranks ended with {[rank.exitcode for rank in ranks]}") from None
        for rank in ranks:
            rank.join()
    return [found[rank] for rank in range(world_size)]


# -------------------------------------------------------------------------------------------------- towers and pairs
class Towers(nn.Module):
    """Two MLPs, the temperature and the bias: what model.py's models return, small."""

    def __init__(self):
        super().__init__()
        random_state = torch.get_rng_state()
        torch.manual_seed(0)
        self.image, self.text = (nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(2))
        torch.set_rng_state(random_state)
        self.logit_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07)).float())
        self.logit_bias = nn.Parameter(torch.tensor(-3.0))

    def forward(self, images: Tensor, texts: Tensor):
        """(n, WIDTH) each -> embeddings (n, 8) each, the factor, the bias."""
        embeds = (F.normalize(tower(x), dim=-1) for tower, x in ((self.image, images), (self.text, texts)))
        return *embeds, self.logit_scale.exp(), self.logit_bias


def make_pairs(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """(size, WIDTH) each: two noisy views, each linear, of the same (size, LATENT)."""
    views, random = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    maps = torch.randn(2, LATENT, WIDTH, generator=views) / LATENT**0.5
    latent, noise = torch.randn(size, LATENT, generator=random), torch.randn(2, size, WIDTH, generator=random)
    return tuple(latent @ maps + 0.2 * noise)


def share_of(mode: str, towers: nn.Module, images: Tensor, texts: Tensor, first: int) -> Tensor:
    """This rank's share of the loss; the first of its pairs is the batch's number `first`."""
    numbers = torch.arange(first, first + len(images))
    outputs = towers(images, texts)
    if mode != LOCAL_OWN_SLICE:
        return contrastive_loss(mode, *outputs, numbers, numbers)[0]
    pairs = Pairs(torch.stack([numbers, numbers], 1))
    everyones = (Gather.apply(embeds, pairs, "custom") for embeds in outputs[:2])
    return local_loss(*outputs[:2], *everyones, outputs[2], pairs, "mask")[0] / pairs.total


# -------------------------------------------------------------------------------------------------- the table
def gradients_of_modes(modes: list[str], total: int) -> list[tuple[float, np.ndarray, float]]:
    """Of each mode the loss, the towers' gradient (a vector) and logit_scale's, averaged over the ranks as by DDP."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = slice(total * rank // world_size, total * (rank + 1) // world_size)
    images, texts = (x[own] for x in make_pairs(total, seed=1))
    found = []
    for mode in modes:
        towers = Towers()
        share = share_of(mode, towers, images, texts, own.start)
        (share * world_size).backward()
        of_towers = torch.cat([p.grad.flatten() for part in (towers.image, towers.text) for p in part.parameters()])
        numbers = torch.cat([share.detach()[None], towers.logit_scale.grad[None] / world_size, of_towers / world_size])
        if world_size > 1:
            dist.all_reduce(numbers)
        found.append((numbers[0].item(), numbers[2:].numpy(), numbers[1].item()))
    return found


def measure_table(world_sizes=(2, 4), total: int = 24) -> list[dict]:
    """A row for each mode and number of ranks: its loss and gradient over those of one process with the whole batch.

    towers: ratio of the norms; direction: cosine; logit_scale: ratio; error: of the towers' gradient, relative.
    """
    modes = [*MODES, LOCAL_OWN_SLICE]
    of_softmax, of_sigmoid = gradients_of_modes(["gather_nn", "sigmoid"], total)
    rows = []
    for world_size in world_sizes:
        for mode, found in zip(modes, run_on_ranks(world_size, gradients_of_modes, modes, total)[0], strict=True):
            right = of_sigmoid if mode == "sigmoid" else of_softmax
            norm, right_norm = np.linalg.norm(found[1]), np.linalg.norm(right[1])
            row = {"mode": mode, "ranks": world_size, "loss": found[0], "right loss": right[0]}
            row["towers"] = norm / right_norm
            row["direction"] = found[1] @ right[1] / (norm * right_norm) if norm else float("nan")
            row["logit_scale"] = found[2] / right[2]
            row["error"] = np.linalg.norm(found[1] - right[1]) / right_norm
            rows.append(row)
    return rows


def print_table(rows: list[dict]) -> None:
    print("| ranks | mode | loss (of the whole) | towers' gradient | its direction (cos) | logit_scale's | error |")
    print("|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: row["ranks"]):
        cells = [row["ranks"], row["mode"], f"{row['loss']:.5f} ({row['right loss']:.5f})", f"{row['towers']:.4f}"]
        cells += [f"{row['direction']:.4f}", f"{row['logit_scale']:.4f}", f"{row['error']:.0e}"]
        print(f"| {' | '.join(map(str, cells))} |")


# -------------------------------------------------------------------------------------------------- the curves
def train_curves(runs: list[tuple], steps: int, batch_size: int, seed: int = 0) -> list[dict]:
    """Trains under DDP on the same batches, and measures after each step on 256 held-out pairs.

    Args:
        runs: (mode, "adamw" or "sgd", the towers' learning rate, logit_scale's).
        batch_size: of all ranks together.

    Returns:
        For each run {"loss": the softmax loss of the held-out pairs, "recall": the share of images whose text is the
        nearest, "logit_scale": the factor}, each a list of steps + 1 numbers.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = slice(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)
    held_out, numbers = make_pairs(256, seed=10_000), torch.arange(256)
    found = []
    for mode, optimizer_name, rate, rate_of_scale in runs:
        towers = Towers()
        towers.logit_bias.requires_grad_(mode == "sigmoid").data.fill_(-np.log(batch_size - 1))
        model = DistributedDataParallel(towers)
        scalars = [towers.logit_scale, towers.logit_bias]
        of_towers = [parameter for part in (towers.image, towers.text) for parameter in part.parameters()]
        groups = [{"params": of_towers, "lr": rate}, {"params": scalars, "lr": rate_of_scale, "weight_decay": 0}]
        optimizer = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer_name](groups)
        curves = {"loss": [], "recall": [], "logit_scale": []}
        for step in range(steps + 1):
            with torch.no_grad():
                images, texts, scale, _ = towers(*held_out)
                logits = scale * images @ texts.T
                losses = F.cross_entropy(logits, numbers) + F.cross_entropy(logits.T, numbers)
            curves["loss"].append(losses.item() / 2)
            curves["recall"].append((logits.argmax(1) == numbers).float().mean().item())
            curves["logit_scale"].append(scale.item())
            images, texts = (x[own] for x in make_pairs(batch_size, seed=1 + step + seed * 100_000))
            optimizer.zero_grad()
            (share_of(mode, model, images, texts, own.start) * world_size).backward()
            optimizer.step()
        found.append(curves)
    return found


def trace_ring() -> list[int]:
    """The ranks whose texts this rank's images meet, in their order."""
    numbers = torch.arange(1) + dist.get_rank()
    return [holder for holder, *_ in ring(Pairs(torch.stack([numbers, numbers], 1)), torch.zeros(1, 1), None)]


if __name__ == "__main__":
    server.set_forkserver_preload(["loss_table"])
    print_table(measure_table())
