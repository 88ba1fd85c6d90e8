"""The contrastive loss over the pairs of all ranks, in seven ways side by side: `--cross_embedding`.

W ranks hold n pairs each (n may differ and be 0), N in all; I and T are (n, d), and the negatives of an image are the
texts of all ranks. What moves between the ranks, and which gradient arrives (`python loss_table.py` measures it):

    mode       forward                              backward               towers' gradient   logit_scale's
    base       nothing: own negatives only          nothing                another loss's     another loss's
    gather     I, T -> everyone                     nothing                0: nothing learns  right
    custom     I, T -> everyone                     nothing                1/W of it          right
    gather_nn  I, T -> everyone                     dI, dT -> their owner  right              right
    local      I, T -> everyone                     dI, dT -> their owner  right              right
    tiled      T round the ring, twice, dT with it  nothing                right              right
    sigmoid    T round the ring, once, dT with it   nothing                right              right

    everyone: each rank holds all of it            the ring, here of 4 ranks

      rank 0       rank 1                            rank 0 -- T0 --> rank 1     after W moves each image
      I0 I1 <----> I0 I1                               ^                |        has met each text, and
      T0 T1        T0 T1                              T3               T1        a text's gradient, which
                                                       |                v        all have added to,
      logits N x N (local: 2 n x N; base: n x n)     rank 3 <-- T2 -- rank 2     is at home again

                                                     logits in tiles of --loss_block_size squared

- gather, custom: lessons, as they are known. An all_gather has no gradient. zero_nlp's `custom` keeps the own slice of
  the own loss's gradient, and not what the other ranks' losses say of these rows; open_clip without --gather-with-grad
  does the same. AdamW divides a constant factor away, so its curves lie on each other: SGD, the clipping of gradients
  and the temperature's relative speed tell the difference.
- gather_nn: what torch.distributed.nn's all_gather does. local: open_clip's --local-loss --gather-with-grad.
- tiled: online log-sum-exp (Milakov and Gimelshein 2018) over a ring, as Inf-CL (Cheng et al. 2024). The second trip
  takes the gradients, within the forward pass: nothing moves in backward, where DDP's and ZeRO's collectives run.
- sigmoid: Zhai et al. 2023. It needs no sum over a row, hence one trip. Its bias starts best at log(1 / (N - 1)).
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pairs import Pairs

MODES = ["base", "gather", "gather_nn", "custom", "local", "tiled", "sigmoid"]
SAME_CAPTION = ["mask", "positive", "ignore"]
INF = float("inf")


def contrastive_loss(
    mode: str,
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    image_ids: Tensor,
    caption_ids: Tensor,
    same_caption: str = "mask",
    block_size: int = 1024,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's share of the loss of the global batch; all ranks must call it, also one that has no pair.

    The shares add up to the mean over the N pairs: of both directions, halved; for `sigmoid` the sum over all N x N
    logits, by N. (DDP averages gradients, so a share is to be multiplied by W.) In fp32 always, under autocast too.

    Two pairs with one caption or one image, on whatever ranks, are no negatives of each other:
    - mask: their logits are left out;
    - positive: further positives, that share a row's target evenly (`sigmoid`: more labels of 1);
    - ignore: negatives all the same.

    Args:
        mode: of MODES.
        image_embeds, text_embeds: (n, d), normalised.
        logit_scale: one number, the factor itself and not its logarithm.
        logit_bias: one number, for `sigmoid` only.
        image_ids, caption_ids: (n,) int64, equal where the content is.

    Returns:
        The share, and counts of this rank's own pairs (int64 scalars, to be summed over the ranks): `pairs`;
        `correct_texts`, `correct_images`: those whose logit is above that of every other text (image) of the global
        batch, in `base` of the rank, equal ones aside; `same_caption_pairs`: pairs of the global batch equal to each.
    """
    pairs = Pairs(torch.stack([image_ids, caption_ids], 1))
    with torch.autocast(image_embeds.device.type, enabled=False):
        images, texts, scale = image_embeds.float(), text_embeds.float(), logit_scale.float().squeeze()
        if mode == "tiled":
            loss, correct = TiledSoftmax.apply(images, texts, scale, pairs, same_caption, block_size)
        elif mode == "sigmoid":
            bias = logit_bias.float().squeeze()
            loss, correct = TiledSigmoid.apply(images, texts, scale, bias, pairs, same_caption, block_size)
        elif mode == "base":
            loss, correct = whole_loss(images, texts, scale, pairs, pairs.own, same_caption)
        elif mode == "local":
            all_images, all_texts = (Gather.apply(embeds, pairs, "local") for embeds in (images, texts))
            loss, correct = local_loss(images, texts, all_images, all_texts, scale, pairs, same_caption)
        else:
            images, texts = (Gather.apply(embeds, pairs, mode) for embeds in (images, texts))
            loss, correct = whole_loss(images, texts, scale, pairs, range(pairs.total), same_caption)
            loss, correct = loss / pairs.world_size, correct[:, pairs.own_slice]  # every rank computes all of it
    return loss / pairs.total, {
        "pairs": torch.tensor(len(pairs.own), device=correct.device),
        "correct_texts": correct[0].sum(),
        "correct_images": correct[1].sum(),
        "same_caption_pairs": pairs.others[pairs.own_slice].sum(),
    }


# The modes that write their logits down


class Gather(torch.autograd.Function):
    """(n, d) of each rank -> (N, d) on all; the modes differ in what comes back."""

    @staticmethod
    def forward(ctx, embeds, pairs, mode):
        ctx.pairs, ctx.mode = pairs, mode
        return pairs.gather_rows(embeds)

    @staticmethod
    def backward(ctx, gradient):
        if ctx.mode == "gather":
            gradient = torch.zeros_like(gradient)
        elif ctx.mode != "custom" and ctx.pairs.world_size > 1:
            gradient = gradient.clone()
            dist.all_reduce(gradient)  # what the losses of all ranks say of each row
        return gradient[ctx.pairs.own_slice], None, None


def whole_loss(images: Tensor, texts: Tensor, scale: Tensor, pairs: Pairs, span: range, same_caption: str):
    """Of the square matrix of the pairs `span`: the loss summed over them, and (2, span) what is correct."""
    partners, equal = torch.arange(len(span), device=images.device), pairs.equal(span, span)
    logits = scale * images @ texts.T
    of_images, correct_texts = cross_entropy(logits, partners, equal, same_caption)
    of_texts, correct_images = cross_entropy(logits.T, partners, equal, same_caption)
    return (of_images + of_texts) / 2, torch.stack([correct_texts, correct_images])


def local_loss(images, texts, all_images, all_texts, scale: Tensor, pairs: Pairs, same_caption: str):
    """The same of two n x N matrices: own images against all texts, own texts against all images."""
    equal = pairs.equal(pairs.own, range(pairs.total))
    partners = torch.arange(pairs.own.start, pairs.own.stop, device=images.device)
    of_images, correct_texts = cross_entropy(scale * images @ all_texts.T, partners, equal, same_caption)
    of_texts, correct_images = cross_entropy(scale * texts @ all_images.T, partners, equal, same_caption)
    return (of_images + of_texts) / 2, torch.stack([correct_texts, correct_images])


def cross_entropy(logits: Tensor, partners: Tensor, equal: tuple, same_caption: str) -> tuple[Tensor, Tensor]:
    """Summed over the rows, and (rows,) whether the partner, in the column `partners[row]`, is above the others."""
    rows = torch.arange(len(logits), device=logits.device)
    others = logits.detach().clone()
    others[equal], others[rows, partners] = -INF, -INF
    correct = (others < logits.detach()[rows, partners, None]).all(1)
    if same_caption == "positive":
        targets = torch.zeros_like(logits)
        targets[equal], targets[rows, partners] = 1, 1
        return F.cross_entropy(logits, targets / targets.sum(1, keepdim=True), reduction="sum"), correct
    if same_caption == "mask":
        logits = logits.index_put(equal, logits.new_tensor(-INF))
    return F.cross_entropy(logits, partners, reduction="sum"), correct


# The modes that hold no more of the logits than a tile


def start_exchange(block: Tensor, rows_to_come: int, pairs: Pairs):
    """Sends to the next rank and receives from the one before: what is coming, and the works to wait for."""
    coming = block.new_empty(rows_to_come, *block.shape[1:])
    ends = [(dist.isend, block, pairs.rank + 1), (dist.irecv, coming, pairs.rank - 1)]
    transfers = [dist.P2POp(way, what, end % pairs.world_size) for way, what, end in ends if len(what)]
    return coming, dist.batch_isend_irecv(transfers) if transfers else []


def ring(pairs: Pairs, texts: Tensor, d_texts: Tensor | None):
    """Yields each rank's number, its texts (n_k, d) and the sum of their gradient, for this rank to add to.

    The next texts travel while these are worked on. The sum moves on afterwards, W times; `d_texts` is it in the end.
    """
    sums = d_texts
    for step in range(pairs.world_size):
        holder, rows_to_come = (pairs.rank - step) % pairs.world_size, pairs.sizes[pairs.rank - step - 1]
        works, next_texts, next_sums = [], texts, sums
        if step < pairs.world_size - 1:
            next_texts, works = start_exchange(texts, rows_to_come, pairs)
        yield holder, texts, sums
        if sums is not None and pairs.world_size > 1:
            next_sums, more_works = start_exchange(sums, rows_to_come, pairs)
            works = works + more_works
        for work in works:
            work.wait()
        texts, sums = next_texts, next_sums
    if sums is not d_texts:
        d_texts.copy_(sums)


class Tile(NamedTuple):
    """A block of own images, its rows, against a block of some rank's texts, its columns."""

    rows: slice  # of the own n
    columns: slice  # of all N
    logits: Tensor  # (rows, columns); as `scratch` only until the next tile
    scratch: Tensor  # (rows, columns) of memory, since new memory for each tile costs a CPU a tenth of the time
    images: Tensor  # (rows, d)
    texts: Tensor  # (columns, d)
    d_texts: Tensor | None  # (columns, d), a part of the sum that travels along
    partners: Tensor  # k: pair (k, k) of the tile is a pair of the batch; all of the tile or none
    apart: tuple[Tensor, Tensor]  # places of the partners and of the pairs equal to them
    positives: tuple[Tensor, Tensor]  # places of the targets


def tiles(pairs: Pairs, images, texts, scale, same_caption: str, block_size: int, d_texts: Tensor | None = None):
    """The tiles of own images against everyone's texts; with `mask` the logits of equal pairs are -inf."""
    memory = images.new_empty(2, min(block_size, len(images)) * min(block_size, max(pairs.sizes)))
    for holder, theirs, sums in ring(pairs, texts.contiguous(), d_texts):
        for row in range(0, len(images), block_size):
            rows = slice(row, min(row + block_size, len(images)))
            some_images = images[rows] * scale
            for column in range(0, len(theirs), block_size):
                part = slice(column, min(column + block_size, len(theirs)))
                own = range(pairs.own.start + rows.start, pairs.own.start + rows.stop)
                all_columns = range(pairs.starts[holder] + part.start, pairs.starts[holder] + part.stop)
                partners = torch.arange(len(own) if own == all_columns else 0, device=images.device)
                equal = pairs.equal(own, all_columns)
                apart = tuple(torch.cat([places, partners]) for places in equal)
                logits, scratch = memory[:, : len(own) * len(all_columns)].view(2, len(own), len(all_columns))
                torch.mm(some_images, theirs[part].T, out=logits)
                if same_caption == "mask":
                    logits[equal] = -INF
                positives = apart if same_caption == "positive" else (partners, partners)
                d_part, columns = None if sums is None else sums[part], slice(all_columns.start, all_columns.stop)
                blocks = logits, scratch, images[rows], theirs[part], d_part
                yield Tile(rows, columns, *blocks, partners, apart, positives)


class Contest:
    """Whether a partner's logit is above those of all others that don't equal it, tile by tile."""

    def __init__(self, pairs: Pairs, like: Tensor):
        self.pairs = pairs
        self.partners, self.of_rows = like.new_full((2, len(pairs.own)), -INF)
        self.of_columns = like.new_full((pairs.total,), -INF)

    def add(self, tile: Tile) -> None:
        kept = tile.logits[tile.apart]
        if len(tile.partners):
            self.partners[tile.rows] = kept[-len(tile.partners) :]
        tile.logits[tile.apart] = -INF
        for best, part, dim in ((self.of_rows, tile.rows, 1), (self.of_columns, tile.columns, 0)):
            best[part] = torch.maximum(best[part], tile.logits.amax(dim))
        tile.logits[tile.apart] = kept

    def correct(self) -> Tensor:
        """(2, n) bool: the right text for each image, the right image for each text."""
        of_columns = torch.stack(self.pairs.all_gather(self.of_columns)).amax(0)[self.pairs.own_slice]
        return torch.stack([self.partners > self.of_rows, self.partners > of_columns])


def log_sum_exp2(logits: Tensor, dim: int, scratch: Tensor | None = None) -> Tensor:
    """log2 of the sum of 2 ** logits, -inf where all are. (torch.logsumexp takes ten times as long on a CPU.)"""
    largest = logits.amax(dim, keepdim=True).clamp_(min=-1e4)
    return (torch.sub(logits, largest, out=scratch).exp2_().sum(dim, keepdim=True).log2_() + largest).squeeze(dim)


class TiledSoftmax(torch.autograd.Function):
    """Two trips: the log-sum-exp of each row and each column; then, known these, the gradients.

    Logits are to the base 2, since exp2 takes a third of exp's time on a CPU.
    """

    @staticmethod
    def forward(ctx, images, texts, scale, pairs, same_caption, block_size):
        contest, to_base_2 = Contest(pairs, images), scale / math.log(2)
        of_rows = images.new_full((len(images),), -INF)
        of_columns = images.new_full((pairs.total,), -INF)
        for tile in tiles(pairs, images, texts, to_base_2, same_caption, block_size):
            contest.add(tile)
            for sums, part, dim in ((of_rows, tile.rows, 1), (of_columns, tile.columns, 0)):
                sums[part] = torch.logaddexp2(sums[part], log_sum_exp2(tile.logits, dim, tile.scratch))
        of_columns = log_sum_exp2(torch.stack(pairs.all_gather(of_columns)), 0)

        # Each logit's gradient: the softmax of its row and that of its column, less the targets of both.
        targets = 1 / (1.0 + pairs.others) if same_caption == "positive" else torch.ones_like(of_columns)
        loss = of_rows.sum() + of_columns[pairs.own_slice].sum()
        d_images, d_texts = torch.zeros_like(images), torch.zeros_like(texts)
        for tile in tiles(pairs, images, texts, to_base_2, same_caption, block_size, d_texts):
            i, j = tile.positives
            targets_of_both = targets[pairs.own_slice][tile.rows][i] + targets[tile.columns][j]
            loss -= (targets_of_both * tile.logits[i, j]).sum()
            d_logits = torch.sub(tile.logits, of_rows[tile.rows, None], out=tile.scratch).exp2_()
            d_logits += tile.logits.sub_(of_columns[tile.columns]).exp2_()
            d_logits[i, j] -= targets_of_both
            d_images[tile.rows].addmm_(d_logits, tile.texts)
            tile.d_texts.addmm_(d_logits.T, tile.images)
        d_scale = (d_images * images).sum() / 2
        ctx.save_for_backward(d_images.mul_(scale / 2), d_texts.mul_(scale / 2), d_scale)
        correct = contest.correct()
        ctx.mark_non_differentiable(correct)
        return loss * (math.log(2) / 2), correct

    @staticmethod
    def backward(ctx, gradient, _):
        return *(saved * gradient for saved in ctx.saved_tensors), None, None, None


class TiledSigmoid(torch.autograd.Function):
    """One trip: each logit is a decision by itself."""

    @staticmethod
    def forward(ctx, images, texts, scale, bias, pairs, same_caption, block_size):
        contest = Contest(pairs, images)
        loss, d_bias = images.new_zeros(2)
        d_images, d_texts = torch.zeros_like(images), torch.zeros_like(texts)
        for tile in tiles(pairs, images, texts, scale, same_caption, block_size, d_texts):
            contest.add(tile)
            logits = tile.logits.add_(bias)
            # softplus(logit) for a negative; for a positive softplus(-logit), which is as much less the logit
            loss += F.softplus(logits).sum() - logits[tile.positives].sum()
            d_logits = logits.sigmoid_()
            d_logits[tile.positives] -= 1
            d_bias += d_logits.sum()
            d_images[tile.rows].addmm_(d_logits, tile.texts)
            tile.d_texts.addmm_(d_logits.T, tile.images)
        d_scale = (d_images * images).sum()
        ctx.save_for_backward(d_images.mul_(scale), d_texts.mul_(scale), d_scale, d_bias)
        correct = contest.correct()
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, gradient, _):
        return *(saved * gradient for saved in ctx.saved_tensors), None, None, None
