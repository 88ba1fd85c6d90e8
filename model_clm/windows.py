"""Windows of tokens -> examples for `batch.collate`; validation rows, in order, with as much context as is wanted."""

from functools import partial

from torch.utils.data import Dataset, Sampler

from batch import collate
from data import IGNORE_INDEX, WindowsInOrder


def cut_at_borders(input_ids: list[int], labels: list[int], borders: list[int]) -> list[dict]:
    """The parts of a window that belong to one document each, an example apiece.

    A part begins with the EOS before its document and ends with the EOS after it, which begins the next part too; there
    it is nobody's target, as the first token of any example. So each token remains a target once.

    Args:
        borders: the places of the EOS in the window, in order.
    """
    edges = sorted({0, *borders, len(input_ids) - 1})
    return [
        {"input_ids": input_ids[start : end + 1], "labels": labels[start : end + 1]}
        for start, end in zip(edges, edges[1:], strict=False)
    ]


def collate_windows(windows: list[dict], document_mask: bool) -> dict:
    """Rows of a `TrainingRows` or `ValidationRows` as a batch of `collate`; under a document mask cut at borders."""
    examples = []
    for window in windows:
        ids, labels = window["input_ids"], window.get("labels", window["input_ids"])
        examples += cut_at_borders(ids, labels, window["starts"] if document_mask else [])
    return collate(examples)


class TrainingRows(Dataset):
    """`data.Windows` by number; a slice of them gives columns, as a `datasets.Dataset` does."""

    def __init__(self, windows):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, number: int | slice):
        if isinstance(number, slice):
            rows = [self.windows[i] for i in range(*number.indices(len(self)))]
            return {name: [row[name] for row in rows] for name in rows[0]}
        return self.windows[number if number >= 0 else len(self) + number]


class WindowSampler(Sampler[list[int]]):
    """Deals the rows of each step to the ranks in their order; which rows a step has depends on their number alone.

    1 rank with batch 8, 2 ranks with 4 and 1 rank with 4 x 2 train on the same ones. An epoch's last step has what is
    left, and may leave a rank without a row, which `collate` makes harmless.
    """

    def __init__(self, count: int, batch_size: int, num_ranks: int, rank: int):
        """count: rows of an epoch; batch_size: of one rank."""
        self.count, self.batch_size, self.num_ranks, self.rank, self.epoch = count, batch_size, num_ranks, rank, 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of one rank in one epoch."""
        return -(-self.count // (self.batch_size * self.num_ranks))

    def __iter__(self):
        first = self.epoch * self.count
        for number in range(len(self)):
            start = (number * self.num_ranks + self.rank) * self.batch_size
            yield list(range(first + start, first + max(start, min(start + self.batch_size, self.count))))


class ValidationRows(Dataset):
    """A source's stream in order, each token but the first a target once; how a document ends is not asked for.

    Bits per byte divide by the bytes of the texts, in which an EOS has none: as in nanochat's loss_eval.py
    (https://github.com/karpathy/nanochat) it is context, and nobody's target.

    Args:
        stride: targets of a row; the rest of its `length` tokens is context. All but one if None.
    """

    def __init__(self, folder, length: int, source: str, stride: int | None = None):
        self.windows, self.length, self.source = WindowsInOrder(folder, length, source), length, source
        self.stride = stride or length - 1
        self.tokens = self.windows.manifest["sources"][source]["tokens"]
        self.bytes = self.windows.manifest["sources"][source]["bytes"]
        self.eos = self.windows.manifest["eos_token_id"]

    def __len__(self) -> int:
        return -(-(self.tokens - 1) // self.stride)

    def __getitem__(self, number: int) -> dict:
        first = number * self.stride + 1
        begin, end = max(0, first + self.stride - self.length), min(first + self.stride, self.tokens)
        ids = self.windows.read(self.source, begin, end).tolist()
        labels = [IGNORE_INDEX if token == self.eos or begin + i < first else token for i, token in enumerate(ids)]
        return {"input_ids": ids, "labels": labels, "starts": [i for i, token in enumerate(ids) if token == self.eos]}


def validation_rows(folder, length: int, stride: int | None = None) -> dict[str, ValidationRows]:
    """By source; empty where nothing was held out."""
    sources = WindowsInOrder(folder, length).sources
    rows = {source: ValidationRows(folder, length, source, stride) for source in sources}
    return {source: of_source for source, of_source in rows.items() if len(of_source)}


def window_collator(document_mask: bool):
    """`collate_windows` as a DataLoader takes it, also in a worker process."""
    return partial(collate_windows, document_mask=document_mask)
