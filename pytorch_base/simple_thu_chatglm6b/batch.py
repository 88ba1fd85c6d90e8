"""Samples -> batches without padding: packing, dealing to the ranks, laying end to end."""

import bisect
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler
from transformers import DataCollatorWithFlattening

from data import IGNORE_INDEX


def pack_best_fit(lengths: np.ndarray, row_length: int) -> list[list[int]]:
    """Fills rows of at most `row_length` tokens by best fit, longest sample first.

    Source: Ding et al., "Fewer Truncations Improve Language Modeling" (2024).

    Args:
        lengths: tokens of each sample, shape (samples,); none is longer than `row_length`.

    Returns:
        Rows of sample indices; each sample stands in exactly one.
    """
    rows, room = [], []  # room: sorted (tokens left, row)
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        place = bisect.bisect_left(room, (length, 0))
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row = row_length, len(rows)
            rows.append([])
        rows[row].append(index)
        bisect.insort(room, (left - length, row))
    return rows


class BalancedBatchSampler(Sampler[list[int]]):
    """Deals rows to steps, and the rows of a step to the ranks, so that all get nearly the same number of tokens.

    No rank waits for another, and no step needs much more memory than the others. Which rows share a step depends on
    the rows in a step alone: 1 rank with batch 8, 2 ranks with 4 and 1 rank with 4 x 2 train on the same ones. A last
    step that has too few rows leaves some batches empty; `collate_packed` makes those harmless.

    Args:
        lengths: tokens of each sample, shape (samples,).
        rows: sample indices of each row; one sample a row where nothing is packed.
        batch_size: rows in one batch of one rank.
        num_batches_per_step: gradient accumulation steps.
    """

    STEPS_DEALT_AT_ONCE = 32

    def __init__(self, lengths, rows, batch_size, num_batches_per_step, num_ranks, rank, seed, shuffle=True):
        self.rows = rows
        self.row_tokens = np.array([sum(lengths[i] for i in row) for row in rows])
        self.batch_size, self.num_batches_per_step = batch_size, num_batches_per_step
        self.num_ranks, self.rank, self.seed, self.shuffle, self.epoch = num_ranks, rank, seed, shuffle, 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of one rank in one epoch."""
        return -(-len(self.rows) // (self.batch_size * self.num_ranks))

    def __iter__(self) -> Iterator[list[int]]:
        for step_rows in self.steps():
            num_rounds = -(-len(step_rows) // (self.batch_size * self.num_ranks))
            # Neighbours in the order of their tokens run at the same time on different ranks, so they are alike.
            batches = self.deal(step_rows, num_rounds * self.num_ranks, self.batch_size)
            for round_start in range(0, len(batches), self.num_ranks):
                yield [sample for row in batches[round_start + self.rank] for sample in self.rows[row]]

    def steps(self) -> Iterator[list[int]]:
        """The rows of each optimizer step of the epoch, over all ranks."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.rows)) if self.shuffle else np.arange(len(self.rows))
        rows_per_step = self.batch_size * self.num_ranks * self.num_batches_per_step
        in_full_steps = len(order) // rows_per_step * rows_per_step
        for start in range(0, in_full_steps, rows_per_step * self.STEPS_DEALT_AT_ONCE):
            window = order[start : min(in_full_steps, start + rows_per_step * self.STEPS_DEALT_AT_ONCE)]
            steps = self.deal(window.tolist(), len(window) // rows_per_step, rows_per_step)
            for index in rng.permutation(len(steps)):
                yield steps[index]
        if in_full_steps < len(order):
            yield order[in_full_steps:].tolist()

    def deal(self, rows: list[int], num_hands: int, room: int) -> list[list[int]]:
        """Longest row first, each to the hand that has the fewest tokens and still has room; fullest hand first."""
        hands, tokens = [[] for _ in range(num_hands)], [0] * num_hands
        for row in sorted(rows, key=lambda row: -self.row_tokens[row]):
            hand = min((i for i in range(num_hands) if len(hands[i]) < room), key=lambda i: tokens[i])
            hands[hand].append(row)
            tokens[hand] += int(self.row_tokens[row])
        return [hands[i] for i in sorted(range(num_hands), key=lambda i: -tokens[i])]


flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True, separator_id=IGNORE_INDEX)


def collate_packed(samples: list[dict]) -> dict:
    """Samples laid end to end in one row; no sample at all gives a row of two tokens without labels.

    Returns:
        `input_ids`, `labels`, `position_ids` (from 0 in each sample), all of shape (1, tokens);
        `cu_seq_lens_q`, `cu_seq_lens_k` of shape (samples + 1,); `max_length_q`, `max_length_k`.
    """
    return flatten(samples or [{"input_ids": [0, 0], "labels": [IGNORE_INDEX, IGNORE_INDEX]}])
