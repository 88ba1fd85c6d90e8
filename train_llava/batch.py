"""Examples -> batches: packed into bins, assigned to steps and ranks, padded."""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import bisect
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from data import IGNORE_INDEX


def pack_best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Fills bins of at most `capacity` tokens by best fit, longest example first.

    Source: Ding et al., "Fewer Truncations Improve Language Modeling" (2024).

    Args:
        lengths: tokens of each example, shape (examples,); none is longer than `capacity`.

    Returns:
        Bins of example indices; each example stands in exactly one.
    """
    bins, free = [], []  # free: sorted (tokens left, bin)
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        place = bisect.bisect_left(free, (length, 0))
        if place < len(free):
            left, number = free.pop(place)
        else:
            left, number = capacity, len(bins)
            bins.append([])
        bins[number].append(example)
        bisect.insort(free, (left - length, number))
    return bins


class BalancedBatchSampler(Sampler[list[int]]):
    """Assigns bins to steps, and the bins of a step to the ranks, so that all get nearly the same number of tokens.

    No rank waits for another, and no step needs much more memory than the others. Which bins share a step depends on
    their number in a step alone: 1 rank with batch 8, 2 ranks with 4 and 1 rank with 4 x 2 train on the same ones. A
    last step that has too few bins leaves some batches empty; `collate` makes those harmless.

    Args:
        lengths: tokens of each example, shape (examples,).
        bins: example indices of each bin; one example a bin where nothing is packed.
        batch_size: bins in one batch of one rank.
        num_batches_per_step: gradient accumulation steps.
    """

    STEPS_ASSIGNED_AT_ONCE = 32

    def __init__(self, lengths, bins, batch_size, num_batches_per_step, num_ranks, rank, seed, shuffle=True):
        self.bins = bins
        self.bin_tokens = np.array([sum(lengths[i] for i in examples) for examples in bins])
        self.batch_size, self.num_batches_per_step = batch_size, num_batches_per_step
        self.num_ranks, self.rank, self.seed, self.shuffle, self.epoch = num_ranks, rank, seed, shuffle, 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of one rank in one epoch."""
        return -(-len(self.bins) // (self.batch_size * self.num_ranks))

    def __iter__(self) -> Iterator[list[int]]:
        for step_bins in self.steps():
            num_rounds = -(-len(step_bins) // (self.batch_size * self.num_ranks))
            # Neighbours in the order of their tokens run at the same time on different ranks, so they are alike.
            batches = self.assign(step_bins, num_rounds * self.num_ranks, self.batch_size)
            for round_start in range(0, len(batches), self.num_ranks):
                yield [example for number in batches[round_start + self.rank] for example in self.bins[number]]

    def steps(self) -> Iterator[list[int]]:
        """The bins of each optimizer step of the epoch, over all ranks."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.bins)) if self.shuffle else np.arange(len(self.bins))
        bins_per_step = self.batch_size * self.num_ranks * self.num_batches_per_step
        in_full_steps = len(order) // bins_per_step * bins_per_step
        for start in range(0, in_full_steps, bins_per_step * self.STEPS_ASSIGNED_AT_ONCE):
            window = order[start : min(in_full_steps, start + bins_per_step * self.STEPS_ASSIGNED_AT_ONCE)]
            steps = self.assign(window.tolist(), len(window) // bins_per_step, bins_per_step)
            for index in rng.permutation(len(steps)):
                yield steps[index]
        if in_full_steps < len(order):
            yield order[in_full_steps:].tolist()

    def assign(self, bins: list[int], num_groups: int, capacity: int) -> list[list[int]]:
        """Longest bin first, each to the group of fewest tokens that has fewer than `capacity`; fullest group first."""
        groups, tokens = [[] for _ in range(num_groups)], [0] * num_groups
        for number in sorted(bins, key=lambda number: -self.bin_tokens[number]):
            group = min((i for i in range(num_groups) if len(groups[i]) < capacity), key=lambda i: tokens[i])
            groups[group].append(number)
            tokens[group] += int(self.bin_tokens[number])
        return [groups[i] for i in sorted(range(num_groups), key=lambda i: -tokens[i])]


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Examples padded on the right to the longest; none at all gives two tokens without labels.

    Returns:
        `input_ids`, `attention_mask` and `labels`, of shape (examples, longest). The first token of an example is
        nobody's target.
    """
    examples = examples or [{"input_ids": [0, 0], "labels": [IGNORE_INDEX, IGNORE_INDEX]}]
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    labels = [torch.tensor([IGNORE_INDEX, *example["labels"][1:]]) for example in examples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    }
