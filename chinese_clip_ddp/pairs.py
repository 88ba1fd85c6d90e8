"""Which pairs each rank holds, and which of them are equal: what the ranks tell each other before a loss."""

import torch
import torch.distributed as dist
from torch import Tensor


class Pairs:
    """Which pairs each rank holds and which of them are equal, of which all tell all before anything else.

    own: numbers of this rank's pairs among the N. others: (N,) int64, how many pairs have the caption or image of each.
    """

    def __init__(self, own_ids: Tensor):
        """own_ids: (n, 2), of image and caption."""
        distributed = dist.is_initialized()
        self.world_size, self.rank = (dist.get_world_size(), dist.get_rank()) if distributed else (1, 0)
        self.sizes = [len(own_ids)]
        if self.world_size > 1:
            self.sizes = torch.cat(self.all_gather(torch.tensor(self.sizes, device=own_ids.device))).tolist()
        self.starts = [sum(self.sizes[:rank]) for rank in range(self.world_size)]
        self.total = sum(self.sizes)
        self.own = range(self.starts[self.rank], self.starts[self.rank] + len(own_ids))
        self.own_slice = slice(self.own.start, self.own.stop)
        self.ids = self.gather_rows(own_ids)
        image, of_image = count_equal(self.ids[:, 0])
        caption, of_caption = count_equal(self.ids[:, 1])
        self.others = of_image + of_caption - count_equal(image * self.total + caption)[1] - 1
        self.some_are_equal = bool(self.others.any())

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which must be of one shape: of two, gloo aborts one rank and misleads the other."""
        if self.world_size == 1:
            return [tensor]
        tensors = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(tensors, tensor.contiguous())
        return tensors

    def gather_rows(self, rows: Tensor) -> Tensor:
        """(n, ...) of each rank -> (N, ...), padded on the way."""
        padding = rows.new_zeros(max(self.sizes) - len(rows), *rows.shape[1:])
        blocks = self.all_gather(torch.cat([rows, padding]))
        return torch.cat([block[:size] for block, size in zip(blocks, self.sizes, strict=True)])

    def equal(self, rows: range, columns: range) -> tuple[Tensor, Tensor]:
        """Places (i, j) in the tile `rows` x `columns` of pairs that are equal and not the same; mostly none."""
        if not self.some_are_equal:
            return (self.others[:0],) * 2
        i = self.others[rows.start : rows.stop].nonzero()[:, 0]
        j = self.others[columns.start : columns.stop].nonzero()[:, 0]
        same = (self.ids[rows.start + i, None] == self.ids[columns.start + j]).any(-1)
        found, of = (same & ((rows.start + i)[:, None] != columns.start + j)).nonzero(as_tuple=True)
        return i[found], j[of]


def count_equal(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) ids -> their numbers from 0 on, and how often each occurs."""
    _, numbers, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    return numbers, counts[numbers]
