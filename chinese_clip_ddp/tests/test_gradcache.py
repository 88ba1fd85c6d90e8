"""GradCache gives the gradients of the whole batch, dropout included, in one process and under DDP."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradcache
from contrastive import contrastive_loss
from gradcache import gradcache_backward
from loss_table import run_on_ranks
from rows import UserError

SIZES = [11, 5]  # chunks of 4: three and two


class Towers(nn.Module):
    """Two small towers with dropout; forward gives embeddings, temperature and bias, as those of model.py do."""

    def __init__(self, dropout: float):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (
            nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 8)) for _ in range(2)
        )
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, pixels, ids):
        embeds = [F.normalize(tower(x), dim=-1) for tower, x in ((self.image, pixels), (self.text, ids))]
        return *embeds, self.logit_scale.exp(), None


def make_batch(rows: slice) -> dict:
    random = torch.Generator().manual_seed(1)
    return {name: torch.randn(sum(SIZES), 12, generator=random)[rows] for name in ("pixels", "ids")}


def loss_of(rows: slice, world_size: int, mode: str = "tiled"):
    numbers = torch.arange(sum(SIZES))[rows]
    return lambda images, texts, scale, bias: (
        contrastive_loss(mode, images, texts, scale, bias, numbers, numbers)[0] * world_size
    )


def embed(model, chunk):
    return model(**chunk)


def gradients_of(model) -> dict:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def whole_batch(dropout: float) -> tuple[float, dict]:
    """One process, one forward pass of all rows."""
    model = Towers(dropout)
    loss = loss_of(slice(None), 1)(*model(**make_batch(slice(None))))
    loss.backward()
    return loss.item(), gradients_of(model)


def assert_equal(found: dict, right: dict) -> None:
    assert found.keys() == right.keys()
    for name, gradient in right.items():
        assert (torch.as_tensor(found[name]) - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_one_process_has_the_gradients_of_the_whole_batch(chunk_size):
    right_loss, right = whole_batch(0.0)
    model = Towers(0.0)
    loss = gradcache_backward(model, embed, make_batch(slice(None)), chunk_size, loss_of(slice(None), 1))
    assert loss.item() == pytest.approx(right_loss, rel=1e-6)
    assert_equal(gradients_of(model), right)


def test_dropout_is_the_same_in_both_passes():
    batch, loss_of_embeddings = make_batch(slice(None)), loss_of(slice(None), 1)
    model = Towers(0.5)
    torch.manual_seed(5)
    chunks = [{name: values[start : start + 4] for name, values in batch.items()} for start in range(0, 16, 4)]
    images, texts, scales, _ = zip(*(model(**chunk) for chunk in chunks), strict=True)  # the graphs of all are kept
    loss_of_embeddings(torch.cat(images), torch.cat(texts), scales[0], None).backward()
    right, next_number = gradients_of(model), torch.rand(1)

    model = Towers(0.5)
    torch.manual_seed(5)
    gradcache_backward(model, embed, batch, 4, loss_of_embeddings)
    assert_equal(gradients_of(model), right)
    assert torch.equal(torch.rand(1), next_number)  # and the run goes on as it would have


def test_a_frozen_tower_gets_none():
    _, right = whole_batch(0.0)
    model = Towers(0.0)
    model.image.requires_grad_(False)
    gradcache_backward(model, embed, make_batch(slice(None)), 4, loss_of(slice(None), 1))
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert_equal(found, {name: gradient for name, gradient in right.items() if not name.startswith("image")})


def on_one_of_two_ranks(mode: str):
    """Gradients by GradCache under DDP, the calls of no_sync and the all-reduces of gradients."""
    import torch.distributed as dist

    rank = dist.get_rank()
    rows = slice(0, SIZES[0]) if rank == 0 else slice(SIZES[0], None)
    model, calls = DistributedDataParallel(Towers(0.0)), []
    plain_no_sync, reduced = model.no_sync, []
    model.no_sync = lambda: calls.append(1) or plain_no_sync()
    model.register_comm_hook(
        None,
        lambda _, bucket: (
            reduced.append(1)
            or dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])
        ),
    )
    for _ in range(2):  # a second step finds DDP in order
        model.zero_grad()
        loss = gradcache_backward(model, embed, make_batch(rows), 4, loss_of(rows, 2, mode))
    total = loss / 2
    dist.all_reduce(total)
    return total.item(), {n: g.numpy() for n, g in gradients_of(model.module).items()}, len(calls), len(reduced)


@pytest.mark.parametrize("mode", ["tiled", "gather_nn"])
def test_two_ranks_have_them_too_and_average_once(mode):
    right_loss, right = whole_batch(0.0)
    results = run_on_ranks(2, on_one_of_two_ranks, mode)
    for (loss, gradients, no_sync, reduced), chunks in zip(results, (3, 2), strict=True):
        assert loss == pytest.approx(right_loss, rel=1e-6)
        assert_equal(gradients, right)
        assert (no_sync, reduced) == (2 * (chunks - 1), 2)  # two steps; one bucket each


def test_batch_norms_are_refused():
    model = nn.Sequential(nn.BatchNorm1d(4))
    with pytest.raises(UserError, match="1 batch norms \\(0, ...\\)"):
        gradcache.refuse_batch_norms(model)
    gradcache.refuse_batch_norms(model.eval())
