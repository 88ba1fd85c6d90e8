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
    """Deals the rows of each optimizer step to the ranks so that all get nearly the same number of tokens.

    A step's rows are the next ones of the epoch's permutation, whatever the number of ranks and accumulation steps:
    1 rank with batch 8, 2 ranks with 4 and 1 rank with 4 x 2 train on the same rows in every step. A last step that
    has too few rows leaves some batches empty; `collate_packed` makes those harmless.

    Args:
        lengths: tokens of each sample, shape (samples,).
        rows: sample indices of each row; one sample a row where nothing is packed.
        batch_size: rows in one batch of one rank.
        num_batches_per_step: gradient accumulation steps.
    """

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
        order = np.arange(len(self.rows))
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        rows_per_round = self.batch_size * self.num_ranks
        for start in range(0, len(order), rows_per_round * self.num_batches_per_step):
            step_rows = order[start : start + rows_per_round * self.num_batches_per_step]
            num_rounds = -(-len(step_rows) // rows_per_round)
            batches = self.deal(step_rows, num_rounds * self.num_ranks)
            for round_start in range(0, len(batches), self.num_ranks):
                yield [sample for row in batches[round_start + self.rank] for sample in self.rows[row]]

    def deal(self, step_rows: np.ndarray, num_batches: int) -> list[list[int]]:
        """Longest row first, each to the batch that has the fewest tokens and still has room."""
        batches, tokens = [[] for _ in range(num_batches)], [0] * num_batches
        for row in step_rows[np.argsort(-self.row_tokens[step_rows], kind="stable")].tolist():
            place = min(
                (i for i in range(num_batches) if len(batches[i]) < self.batch_size), key=lambda i: (tokens[i], i)
            )
            batches[place].append(row)
            tokens[place] += int(self.row_tokens[row])
        # Neighbours in this order run at the same time on different ranks, so they should be alike.
        return [batches[i] for i in sorted(range(num_batches), key=lambda i: -tokens[i])]


flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True, separator_id=IGNORE_INDEX)


def collate_packed(samples: list[dict]) -> dict:
    """Samples laid end to end in one row; no sample at all gives a row of two tokens without labels.

    Returns:
        `input_ids`, `labels`, `position_ids` (from 0 in each sample), all of shape (1, tokens);
        `cu_seq_lens_q`, `cu_seq_lens_k` of shape (samples + 1,); `max_length_q`, `max_length_k`.
    """
    return flatten(samples or [{"input_ids": [0, 0], "labels": [IGNORE_INDEX, IGNORE_INDEX]}])
