"""The loss and its gradients on 1, 2 and 4 ranks beside one process with the whole batch; what each mode gives."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from contrastive import SAME_CAPTION, contrastive_loss
from loss_table import LOCAL_OWN_SLICE, measure_table, print_table, run_on_ranks

EXACT = ["gather_nn", "local", "tiled", "sigmoid"]
SIZES = {1: [17], 2: [5, 12], 4: [5, 0, 9, 3]}  # of the ranks; one has no pair
CASES = [(mode, same, block) for mode in EXACT for same in SAME_CAPTION for block in (4, 1024)]


def make_batch():
    """Inputs of two linear towers, the parameters (weights, log of the scale, bias), ids of which some are equal."""
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(17, 16, generator=random) for _ in range(2)]
    weights = [torch.randn(16, 8, generator=random) * 0.3 for _ in range(2)]
    ids = [torch.randint(0, high, (17,), generator=random) for high in (34, 8)]
    return inputs, [*weights, torch.tensor(2.0), torch.tensor(-1.0)], ids


def embed(inputs, parameters, rows: slice):
    return (F.normalize(x[rows] @ weight, dim=-1) for x, weight in zip(inputs, parameters[:2], strict=True))


def plain_loss(mode, images, texts, scale, bias, image_ids, caption_ids, same_caption):
    """Written down for the whole batch."""
    partners = torch.eye(len(images), dtype=torch.bool)
    equal = (image_ids[:, None] == image_ids) | (caption_ids[:, None] == caption_ids)
    left_out = equal & ~partners if same_caption == "mask" else torch.zeros_like(partners)
    targets = equal if same_caption == "positive" else partners
    logits = scale * images @ texts.T
    if mode == "sigmoid":
        losses = -F.logsigmoid((logits + bias) * (2.0 * targets - 1))
        return losses.masked_fill(left_out, 0).sum() / len(images)
    logits = logits.masked_fill(left_out, -1e9)
    shares = targets / targets.sum(1, keepdim=True)
    return -(logits.log_softmax(1) * shares + logits.log_softmax(0) * shares.T).sum() / (2 * len(images))


def plain_counts(images, texts, image_ids, caption_ids) -> dict:
    equal = (image_ids[:, None] == image_ids) | (caption_ids[:, None] == caption_ids)
    cosines = images @ texts.T
    of_others = cosines.masked_fill(equal, -2)
    return {
        "pairs": len(images),
        "same_caption_pairs": int(equal.sum()) - len(images),
        "correct_texts": int((of_others.amax(1) < cosines.diagonal()).sum()),
        "correct_images": int((of_others.amax(0) < cosines.diagonal()).sum()),
    }


def measure(sizes) -> list[tuple]:
    """Of each case, on one rank: loss, gradients (of share x W, averaged as DDP does), counts."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found = []
    for mode, same_caption, block_size in CASES:
        inputs, parameters, ids = make_batch()
        for parameter in parameters:
            parameter.requires_grad_()
        images, texts = embed(inputs, parameters, own)
        own_ids = [some[own] for some in ids]
        share, counts = contrastive_loss(
            mode, images, texts, parameters[2].exp(), parameters[3], *own_ids, same_caption, block_size
        )
        (share * world_size).backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad / world_size for p in parameters]
        numbers = [share.detach(), *gradients, *counts.values()]
        if world_size > 1:
            for number in numbers:
                dist.all_reduce(number)
        counts = dict(zip(counts, map(int, numbers[5:]), strict=True))
        found.append((numbers[0].item(), [number.numpy() for number in numbers[1:5]], counts))
    return found


@pytest.mark.parametrize("world_size", SIZES)
def test_exact_modes_are_one_process_with_the_whole_batch(world_size):
    found = [measure(SIZES[1])] if world_size == 1 else run_on_ranks(world_size, measure, SIZES[world_size])
    for (mode, same_caption, block_size), (loss, gradients, counts) in zip(CASES, found[0], strict=True):
        inputs, parameters, ids = make_batch()
        inputs, parameters = ([x.double() for x in some] for some in (inputs, parameters))
        for parameter in parameters:
            parameter.requires_grad_()
        images, texts = embed(inputs, parameters, slice(None))
        right_loss = plain_loss(mode, images, texts, parameters[2].exp(), parameters[3], *ids, same_caption)
        right_loss.backward()

        case = f"{mode}, {same_caption}, block {block_size}, {world_size} ranks"
        assert loss == pytest.approx(right_loss.item(), rel=1e-5), case
        for name, gradient, parameter in zip(("image", "text", "scale", "bias"), gradients, parameters, strict=True):
            right = torch.zeros(()) if parameter.grad is None else parameter.grad
            error = (torch.from_numpy(gradient) - right).norm()
            assert error <= 1e-5 * right.norm(), f"{case}: {name} {error / right.norm():.1e}"
        assert counts == plain_counts(images, texts, *ids), case


def test_what_each_mode_gives():
    rows = measure_table()
    print_table(rows)
    for row in rows:
        mode, ranks, case = row["mode"], row["ranks"], f"{row['mode']} on {row['ranks']} ranks"
        assert (row["loss"] == pytest.approx(row["right loss"], rel=1e-5)) == (mode != "base"), case
        assert (row["logit_scale"] == pytest.approx(1, abs=1e-5)) == (mode != "base"), case
        if mode in EXACT:
            assert row["error"] < 1e-5, case
        elif mode == "gather":
            assert row["towers"] == 0, case
        elif mode == "custom":
            assert row["towers"] == pytest.approx(1 / ranks, abs=1e-5) and row["direction"] > 0.99999, case
        else:
            assert mode in ("base", LOCAL_OWN_SLICE) and row["direction"] < 0.99, case
    by_name = {(row["mode"], row["ranks"]): row["direction"] for row in rows}
    pinned = [by_name[mode, ranks] for mode in ("base", LOCAL_OWN_SLICE) for ranks in (2, 4)]
    assert pinned == pytest.approx([0.9893, 0.9555, 0.9351, 0.8660], abs=5e-4)


def refuse(*args, **kwargs):
    raise AssertionError("communication in backward")


def step_and_count_communication(mode: str) -> bool:
    """Whether the backward pass asks another rank."""
    inputs, parameters, ids = make_batch()
    own = slice(0, 8) if dist.get_rank() == 0 else slice(8, 17)
    embeds = [x.detach().requires_grad_() for x in embed(inputs, parameters, own)]
    share, _ = contrastive_loss(mode, *embeds, parameters[2].exp(), parameters[3], *(some[own] for some in ids))
    originals = {name: getattr(dist, name) for name in ("all_gather", "all_reduce", "batch_isend_irecv")}
    for name in originals:
        setattr(dist, name, refuse)
    try:
        share.backward()
        return False
    except AssertionError:
        return True
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def backward_communicates() -> dict[str, bool]:
    return {mode: step_and_count_communication(mode) for mode in ("custom", "gather_nn", "local", "tiled", "sigmoid")}


def test_nothing_moves_in_the_backward_pass_of_the_tiled_modes():
    expected = {"custom": False, "gather_nn": True, "local": True, "tiled": False, "sigmoid": False}
    assert run_on_ranks(2, backward_communicates)[0] == expected


def whole_batch_of(mode, images, texts, scale, image_ids, caption_ids, same_caption="mask"):
    scale, bias = torch.tensor(scale), torch.tensor(-3.0)
    return contrastive_loss(mode, images, texts, scale, bias, image_ids, caption_ids, same_caption, block_size=16)


@pytest.mark.parametrize("mode", ["tiled", "gather_nn"])
def test_the_highest_temperature_on_pairs_that_agree_and_one_that_does_not(mode):
    """exp(100 - 0) is beyond fp32: a sum over a tile needs the largest of each row and of each column."""
    images = F.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    texts = images.clone()
    texts[7] = -images[7]
    ids = torch.arange(40)
    images.requires_grad_(), texts.requires_grad_()
    share, _ = whole_batch_of(mode, images, texts, 100.0, ids, ids)
    share.backward()
    doubles = [x.detach().double().requires_grad_() for x in (images, texts)]
    right = plain_loss(mode, *doubles, 100.0, None, ids, ids, "mask")
    right.backward()
    assert share.item() == pytest.approx(right.item(), rel=1e-5)
    for x, double in zip((images, texts), doubles, strict=True):
        assert (x.grad - double.grad).norm() <= 1e-5 * double.grad.norm()


@pytest.mark.parametrize("mode", EXACT)
def test_pairs_that_are_all_equal_have_no_negatives(mode):
    images, texts = (F.normalize(torch.randn(40, 8), dim=-1).requires_grad_() for _ in range(2))
    share, counts = whole_batch_of(mode, images, texts, 10.0, torch.arange(40), torch.zeros(40, dtype=torch.long))
    share.backward()
    assert counts["correct_texts"] == counts["correct_images"] == 40 and counts["same_caption_pairs"] == 40 * 39
    if mode == "sigmoid":
        share = share + F.logsigmoid(10 * (images * texts).sum(1) - 3).mean()
    assert share.item() == pytest.approx(0, abs=1e-5) and images.grad.isfinite().all()


def test_collapsed_embeddings_are_never_right():
    one = torch.full((40, 4), 0.5)  # whose products are exact
    for mode in ("tiled", "gather_nn"):
        _, counts = whole_batch_of(mode, one, one, 14.3, torch.arange(40), torch.arange(40))
        assert counts["correct_texts"] == counts["correct_images"] == 0


@pytest.mark.parametrize("mode", EXACT)
def test_half_precision_is_summed_in_fp32(mode):
    """Under autocast, with bf16 embeddings: their own rounding is all that is lost."""
    halves = [F.normalize(torch.randn(300, 8), dim=-1).bfloat16().requires_grad_() for _ in range(2)]
    ids = torch.arange(300)
    with torch.autocast("cpu", torch.bfloat16):
        share, _ = whole_batch_of(mode, *halves, 50.0, ids, ids)
    share.backward()
    floats = [half.detach().float().requires_grad_() for half in halves]
    right, _ = whole_batch_of(mode, *floats, 50.0, ids, ids)
    right.backward()
    assert share.dtype == torch.float32 and share.item() == pytest.approx(right.item(), rel=1e-6)
    for half, full in zip(halves, floats, strict=True):
        assert torch.equal(half.grad, full.grad.bfloat16())
