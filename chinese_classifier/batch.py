"""Examples -> batches of nearly equal token counts and examples of nearly equal length, so that little is padding."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from data import IGNORE_INDEX


def cut_by_tokens(lengths: np.ndarray, num_parts: int) -> np.ndarray:
    """Where to cut examples into parts of nearly equal token counts, none of them empty.

    Args:
        lengths: tokens of each example, in the order to cut them in; shape (examples,), at least `num_parts` of them.

    Returns:
        The end of each part, shape (num_parts,).
    """
    tokens, total = np.cumsum(lengths), lengths.sum()
    ends = np.searchsorted(tokens, total * np.arange(1, num_parts + 1) / num_parts)
    ends = np.maximum.accumulate(ends - np.arange(num_parts)) + np.arange(num_parts)  # each later than the one before
    return np.clip(ends, np.arange(num_parts), len(lengths) - num_parts + np.arange(num_parts)) + 1


class TokenBudgetSampler(Sampler[list[int]]):
    """Assigns the examples of an epoch to steps of nearly as many tokens each: few long examples, or many short ones.

    A step has the tokens of `batch_size` examples of the average length, times the ranks and the accumulation, and the
    same examples wherever that product is the same. One with fewer than there are ranks leaves some batches empty.

    Args:
        lengths: tokens of each example, shape (examples,).
        batch_size: examples of the average length in one batch of one rank.
        num_batches_per_step: gradient accumulation steps.
    """

    LENGTH_JITTER = 0.1  # by as much an example may look longer than it is: others meet in each epoch

    def __init__(self, lengths, batch_size, num_batches_per_step, num_ranks, rank, seed, shuffle=True):
        self.lengths = np.asarray(lengths)
        self.num_batches_per_step = num_batches_per_step
        self.num_ranks, self.rank = num_ranks, rank
        self.seed, self.shuffle = seed, shuffle
        self.epoch = 0
        self.num_steps = -(-len(self.lengths) // (batch_size * num_batches_per_step * num_ranks))

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of one rank in one epoch."""
        return self.num_steps * self.num_batches_per_step

    def __iter__(self) -> Iterator[list[int]]:
        num_batches = self.num_batches_per_step * self.num_ranks
        for examples in self.steps():
            for index in range(self.num_batches_per_step):
                # Neighbours in length run at the same time on different ranks, so none waits for another.
                yield examples[index * self.num_ranks + self.rank :: num_batches].tolist()

    def steps(self) -> list[np.ndarray]:
        """The examples of each optimizer step of the epoch, over all ranks, longest first."""
        rng = np.random.default_rng([self.seed, self.epoch])
        jitter = 1 + self.LENGTH_JITTER * rng.random(len(self.lengths)) if self.shuffle else 1
        order = np.argsort(-self.lengths * jitter, kind="stable")
        ends = cut_by_tokens(self.lengths[order], self.num_steps)
        steps = np.split(order, ends[:-1])
        return [steps[index] for index in rng.permutation(len(steps))] if self.shuffle else steps


def collate_padded(examples: list[dict], tokenizer) -> dict:
    """Examples padded to the longest of them; none at all gives one that has no label.

    Returns:
        What the tokenizer makes of a text (`input_ids`, `attention_mask`, ...), of shape (examples, tokens), and
        `labels` of shape (examples,), -100 for none.
    """
    if not examples:
        examples = [{**tokenizer("。"), "labels": IGNORE_INDEX}]
    return tokenizer.pad(examples, return_tensors="pt")
