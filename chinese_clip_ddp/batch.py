"""Pairs -> batches: pixels as the model's processor gives them, global batches dealt to the ranks, captions padded."""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL
import torch
import transformers
from datasets import Dataset
from filelock import FileLock
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from data import hash_code, number_of
from images import CACHE_DIR, ImageError, Reference, in_processes, load_image, read_image_bytes
from rows import UserError

BATCH_COLUMNS = [*Reference._fields, "image_id", "caption_id", "input_ids", "row"]  # what `PairCollator` reads
DECODED_AT_ONCE = 8  # by one call of the processor: calls cost, and so does the memory of large pictures
SMALLEST_CROP = 0.9  # of the area, as open_clip's RandomResizedCrop
PROBES = ((30, 40), (40, 30), (431, 611), (700, 500), (23, 23))  # pictures that `resize_directly` is tried on


def resize_directly(processor, image: Image.Image) -> np.ndarray:
    """A picture as uint8 of (3, height, width), by the same resize of Pillow's and the same crop as Transformers' own.

    Those go through arrays and back, and check each step, which takes longer than small pictures' resize itself.
    `Pixels` tries on `PROBES` whether the results are the same, and else calls the processor.
    """
    size, (width, height) = processor.size, image.size
    if size.height:
        target = (size.width, size.height)
    else:
        longer = int(size.shortest_edge * max(width, height) / min(width, height))
        target = (size.shortest_edge, longer) if width <= height else (longer, size.shortest_edge)
    image = image.resize(target, processor.resample)
    if processor.do_center_crop:
        crop = processor.crop_size
        left, top = (target[0] - crop.width) // 2, (target[1] - crop.height) // 2
        image = image.crop((left, top, left + crop.width, top + crop.height))
    return np.asarray(image).transpose(2, 0, 1)


class Pixels:
    """Pictures -> (3, height, width) numbers: uint8 as the processor's resize and crop give them, then normalised.

    Resizing is what costs, so its results are kept on disk where they are small enough (`keep`); normalising them is a
    multiplication and an addition.

    Args:
        processor: Transformers' image processor, by PIL (backend="pil"): torchvision's resize gives other pixels.
        image_cache_gb: the largest cache in gigabytes; 0 keeps nothing.
    """

    def __init__(self, processor, image_cache_gb: float = 0.0):
        self.processor, self.image_cache_gb = processor, image_cache_gb
        self.cache_file, self.kept_ids, self.directly = None, np.empty(0, np.int64), False
        rng, name = np.random.default_rng(0), type(processor).__name__
        probes = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in PROBES]
        found = [self.from_image(image) for image in probes]
        self.shape = found[0].shape
        if any(each.shape != self.shape for each in found):
            raise UserError(
                f"{name} makes pictures of different sizes; set its crop_size, or size with height and width, in "
                "preprocessor_config.json."
            )
        scale = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
        mean, std = (np.array(values).reshape(3, 1, 1) for values in (mean, std))
        self.factor, self.summand = (torch.tensor(each, dtype=torch.float32) for each in (scale / std, -mean / std))
        own = processor(images=probes, return_tensors="pt")["pixel_values"]
        if (self.normalise(np.stack(found)) - own).abs().max() > 1e-5:
            raise UserError(f"{name} does more than resize, crop, rescale and normalise.")
        if processor.do_resize and ((size := processor.size).height or size.shortest_edge and not size.longest_edge):
            pairs = zip(probes, found, strict=True)
            self.directly = all(np.array_equal(resize_directly(processor, image), each) for image, each in pairs)

    def from_images(self, images: list[Image.Image]) -> np.ndarray:
        """Pictures of `load_image` as uint8 of (images, 3, height, width)."""
        if self.directly:
            return np.stack([resize_directly(self.processor, image) for image in images])
        found = self.processor(images=images, do_rescale=False, do_normalize=False, return_tensors="np")
        return found["pixel_values"].astype(np.uint8, copy=False)

    def from_image(self, image: Image.Image) -> np.ndarray:
        return self.from_images([image])[0]

    def from_references(self, pictures: list[tuple[int, Reference]]) -> Iterator[np.ndarray]:
        """Pictures by id and place, (3, height, width) each; raises ImageError where one has changed meanwhile."""
        for start in range(0, len(pictures), DECODED_AT_ONCE):
            images = []
            for image_id, reference in pictures[start : start + DECODED_AT_ONCE]:
                try:
                    data = read_image_bytes(*reference)
                    if number_of(hashlib.sha256(data).hexdigest()) != image_id:
                        raise ImageError("it is another picture")
                    images.append(load_image(data))
                except ImageError as error:
                    raise ImageError(f"{reference.path} was changed since it was checked: {error}") from None
            yield from self.from_images(images)

    def from_rows(self, rows: list[dict]) -> np.ndarray:
        """The pictures of pairs (their `image_id` and place) as uint8 of (pairs, 3, height, width)."""
        pixels = np.empty((len(rows), *self.shape), np.uint8)
        ids = np.array([row["image_id"] for row in rows], np.int64)
        places = np.searchsorted(self.kept_ids, ids)
        kept = np.zeros(len(rows), bool)
        if len(self.kept_ids):
            kept = self.kept_ids[np.minimum(places, len(self.kept_ids) - 1)] == ids
        if kept.any():
            file = os.open(self.cache_file, os.O_RDONLY)
            for row in np.flatnonzero(kept):
                os.preadv(file, [pixels[row]], int(places[row]) * pixels[row].nbytes)
            os.close(file)
        others = np.flatnonzero(~kept)
        pictures = [(rows[i]["image_id"], Reference(*(rows[i][name] for name in Reference._fields))) for i in others]
        for row, found in zip(others, self.from_references(pictures), strict=True):
            pixels[row] = found
        return pixels

    def normalise(self, pixels: np.ndarray) -> torch.Tensor:
        """uint8 of (..., 3, height, width) -> the processor's own fp32 values."""
        return torch.from_numpy(pixels).float().mul_(self.factor).add_(self.summand)

    def keep(self, *data_sets: Dataset) -> str:
        """Keeps the pixels of all pictures of the data sets in one file, if they fit; says what was done.

        The file's name is a hash of the pictures' contents and of all that decides their pixels. The first process to
        come writes it, by several processes; the others read it.

        Raises:
            UserError: a picture has changed since it was checked.
        """
        columns = [data_set.select_columns(["image_id", *Reference._fields])[:] for data_set in data_sets]
        places = {}
        for each in columns:
            places |= dict(zip(each.pop("image_id"), zip(*each.values(), strict=True), strict=True))
        ids = np.array(sorted(places), np.int64)
        size = len(ids) * math.prod(self.shape)
        CACHE_DIR.mkdir(exist_ok=True)
        settings = [self.processor.to_json_string(), type(self.processor).__name__, self.processor.backend]
        versions = [transformers.__version__, PIL.__version__, hash_code("images.py", "batch.py")]
        name = hashlib.sha256(json.dumps([settings, versions]).encode() + ids.tobytes()).hexdigest()[:16]
        file = str(CACHE_DIR / f"pixels-{name}")
        with FileLock(f"{file}.lock"), tempfile.TemporaryDirectory(dir=CACHE_DIR) as scratch:
            is_there, free = os.path.exists(file), shutil.disk_usage(CACHE_DIR).free
            if size > self.image_cache_gb * 1e9 or (size > free / 2 and not is_there):
                allowed = f"--image_cache_gb {self.image_cache_gb:g}, {free / 1e9:.1f} GB free on the disk"
                return f"no pixel cache, images are decoded at each step: it would take {size / 1e9:.3f} GB ({allowed})"
            if not is_there:
                items = [(number, (image, Reference(*places[image]))) for number, image in enumerate(ids.tolist())]
                Path(scratch, "whole").touch()
                in_processes(self.write_some, items, (f"{scratch}/whole",), "images resized")
                os.rename(f"{scratch}/whole", file)
        self.cache_file, self.kept_ids = file, ids
        return f"pixel cache: {len(ids):,} images, {size / 1e9:.2f} GB, {file}"

    def write_some(self, items: list[tuple[int, tuple[int, Reference]]], path: str) -> None:
        """Writes some pictures' pixels to their places in the file."""
        numbers, pictures = zip(*items, strict=True)
        with open(path, "r+b") as file:
            for number, pixels in zip(numbers, self.from_references(pictures), strict=True):
                file.seek(number * pixels.nbytes)
                file.write(pixels.tobytes())


def crop_at_random(pixels: np.ndarray, rng: np.random.Generator, resample: int) -> np.ndarray:
    """A part of 90 to 100 % of the area of a picture of (3, height, width), resized to the whole's size."""
    _, height, width = pixels.shape
    area = rng.uniform(SMALLEST_CROP, 1)
    ratio = np.exp(rng.uniform(np.log(area), -np.log(area)))  # so that neither side is longer than the whole's
    crop_width, crop_height = width * math.sqrt(area * ratio), height * math.sqrt(area / ratio)
    left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    box = (left, top, min(left + crop_width, width), min(top + crop_height, height))
    return np.asarray(image.resize((width, height), resample, box=box)).transpose(2, 0, 1)


class PairBatchSampler(Sampler[list[int]]):
    """Global batches of batch_size * world_size pairs, every pair once an epoch, dealt to the ranks in equal shares.

    Which pairs are in a global batch, and in which order, depends on its size alone: 1 rank with 8 and 2 ranks with 4
    train on the same ones. The last one may be smaller; its shares then differ by one, and one may be empty.

    Args:
        groups: a name for each pair, "" for none, shape (pairs,). Pairs of one group are put into one global batch
            where they fit: they are each other's hard negatives.
    """

    LOOK_AHEAD = 64  # groups that may overtake one that doesn't fit into what is left of a batch

    def __init__(self, groups, batch_size: int, world_size: int, rank: int, seed: int, shuffle: bool = True):
        self.groups, self.world_size, self.rank = np.asarray(groups), world_size, rank
        self.global_size, self.seed, self.shuffle, self.epoch = batch_size * world_size, seed, shuffle, 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of one rank in one epoch."""
        return -(-len(self.groups) // self.global_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        for start in range(0, len(order), self.global_size):
            batch = order[start : start + self.global_size]
            # Rounded up, so that the first rank, whose batch norms are kept, is the last to be without a pair.
            first, end = (-(-len(batch) * rank // self.world_size) for rank in (self.rank, self.rank + 1))
            yield batch[first:end]

    def order(self) -> list[int]:
        """The pairs of an epoch in their order, over all ranks."""
        pairs = np.arange(len(self.groups))
        if not self.shuffle:
            return pairs.tolist()
        rng = np.random.default_rng([self.seed, self.epoch])
        pairs = rng.permutation(len(self.groups))
        if not (self.groups != "").any():
            return pairs.tolist()
        members = {}
        for pair, group in zip(pairs.tolist(), self.groups[pairs].tolist(), strict=True):
            members.setdefault(group or pair, []).append(pair)
        members = list(members.values())  # where its first member came, a large group would come early
        waiting = deque(members[place] for place in rng.permutation(len(members)))
        order, space = [], self.global_size
        while waiting:
            ahead = range(min(len(waiting), self.LOOK_AHEAD))
            place = next((i for i in ahead if len(waiting[i]) <= space), None)
            taken = waiting.popleft() if place is None else waiting[place]
            if place is None:  # nothing fits any more: a group is cut
                waiting.append(taken[space:])  # last, or it would cut the next group in turn
                taken = taken[:space]
            else:
                del waiting[place]
            order += taken
            space = space - len(taken) or self.global_size
        return order


class PairCollator:
    """Pairs of a data set -> a batch of tensors; none at all give one row to run through the model, and no pair.

    Args:
        image_augmentation: "none", or "crop": `crop_at_random`, a function of (seed, epoch, row) alone.
    """

    def __init__(
        self,
        pixels: Pixels,
        pad_token_id: int,
        image_augmentation: str = "none",
        seed: int = 0,
    ):
        self.pixels, self.pad_token_id = pixels, pad_token_id
        self.image_augmentation, self.seed = image_augmentation, seed
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # workers that live on see it, too

    def set_epoch(self, epoch: int):
        self.epoch[0] = epoch

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """The batch.

        Returns:
            `pixel_values` (n, 3, height, width) fp32; `input_ids` and `attention_mask` (n, longest); `image_ids`,
            `caption_ids` and `rows` (n,) int64. Of no pair: one picture of zeros, one token; (0,) of the last three.
        """
        if rows:
            pixels = self.pixels.from_rows(rows)
            if self.image_augmentation == "crop":
                for place, row in enumerate(rows):
                    rng = np.random.default_rng([self.seed, int(self.epoch), row["row"]])
                    pixels[place] = crop_at_random(pixels[place], rng, self.pixels.processor.resample)
            pixel_values = self.pixels.normalise(pixels)
        else:
            pixel_values = torch.zeros(1, *self.pixels.shape)
        ids = [torch.tensor(row["input_ids"]) for row in rows] or [torch.tensor([self.pad_token_id])]
        input_ids = pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id)
        attention_mask = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
        numbers = {
            name: torch.tensor([row[key] for row in rows], dtype=torch.int64)
            for name, key in (("image_ids", "image_id"), ("caption_ids", "caption_id"), ("rows", "row"))
        }
        return {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask, **numbers}
