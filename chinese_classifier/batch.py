"""Rows -> batches of nearly equal token counts whose rows are nearly equally long, so that little is padding."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from data import IGNORE_INDEX


def cut_by_tokens(lengths: np.ndarray, num_parts: int) -> np.ndarray:
    """Where to cut rows into parts of nearly equal token counts, none of them empty.

    Args:
        lengths: tokens of each row, in the order in which they are cut; shape (rows,), at least `num_parts` of them.

    Returns:
        The end of each part, shape (num_parts,).
    """
    tokens, total = np.cumsum(lengths), lengths.sum()
    ends = np.searchsorted(tokens, total * np.arange(1, num_parts + 1) / num_parts)
    ends = np.maximum.accumulate(ends - np.arange(num_parts)) + np.arange(num_parts)  # each later than the one before
    return np.clip(ends, np.arange(num_parts), len(lengths) - num_parts + np.arange(num_parts)) + 1


class TokenBudgetSampler(Sampler[list[int]]):
    """Deals the rows of an epoch to steps that have nearly as many tokens each: few long rows, or many short ones.

    A step has as many tokens as `batch_size` rows of the average length have, times the ranks and the accumulation.
    Which rows share a step depends on that product alone: 1 rank with batch 8, 2 ranks with 4 and 1 rank with 4 x 2
    train on the same ones. A step with fewer rows than ranks leaves some batches empty; `collate_padded` makes those
    harmless.

    Args:
        lengths: tokens of each row, shape (rows,).
        batch_size: rows of the average length in one batch of one rank.
        num_batches_per_step: gradient accumulation steps.
    """

    LENGTH_JITTER = 0.1  # by as much a row may look longer than it is: other rows meet in each epoch

    def __init__(self, lengths, batch_size, num_batches_per_step, num_ranks, rank, seed, shuffle=True):
        self.lengths, self.num_batches_per_step = np.asarray(lengths), num_batches_per_step
        self.num_ranks, self.rank, self.seed, self.shuffle, self.epoch = num_ranks, rank, seed, shuffle, 0
        self.num_steps = -(-len(self.lengths) // (batch_size * num_batches_per_step * num_ranks))

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of one rank in one epoch."""
        return self.num_steps * self.num_batches_per_step

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.steps():
            for index in range(self.num_batches_per_step):
                # Neighbours in length run at the same time on different ranks, so none waits for another.
                yield rows[index * self.num_ranks + self.rank :: self.num_batches_per_step * self.num_ranks].tolist()

    def steps(self) -> list[np.ndarray]:
        """The rows of each optimizer step of the epoch, over all ranks, longest first."""
        rng = np.random.default_rng([self.seed, self.epoch])
        jitter = 1 + self.LENGTH_JITTER * rng.random(len(self.lengths)) if self.shuffle else 1
        order = np.argsort(-self.lengths * jitter, kind="stable")
        ends = cut_by_tokens(self.lengths[order], self.num_steps)
        steps = np.split(order, ends[:-1])
        return [steps[index] for index in rng.permutation(len(steps))] if self.shuffle else steps


def collate_padded(rows: list[dict], tokenizer) -> dict:
    """Rows padded to the longest of them; no row at all gives one that has no label.

    Returns:
        What the tokenizer makes of a text (`input_ids`, `attention_mask`, ...), of shape (rows, tokens), and `labels`
        of shape (rows,), -100 for none.
    """
    if not rows:
        rows = [{**tokenizer("。"), "labels": IGNORE_INDEX}]
    return tokenizer.pad(rows, return_tensors="pt")
