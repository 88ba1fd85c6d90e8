"""A frozen tower's features, taken once and kept on disk: where images aren't augmented, they stay the same."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate.utils import gather_object, tqdm
from datasets import Dataset

from batch import PairCollator
from data import CACHE_DIR, column, hash_of, number_of
from model import pool_images, pool_texts


class NoPixels:
    """Takes the place of batch.Pixels in a collator whose vision tower's features are kept: nothing is decoded."""

    shape = (3, 1, 1)

    def from_rows(self, rows: list[dict]) -> np.ndarray:
        return np.zeros((len(rows), *self.shape), np.uint8)

    def normalise(self, pixels: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(pixels).float()


class Features:
    """Of pairs by their `row`: (pairs, width), from a file that holds one vector for each distinct image or caption."""

    def __init__(self, file: Path, rows: np.ndarray, numbers: np.ndarray):
        """rows: (pairs,) ascending `row` of each pair; numbers: (pairs,) its vector's place in the file."""
        self.vectors, self.rows, self.numbers = np.load(file, mmap_mode="r"), rows, numbers

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, width) of n rows; zeros of (1, width) where there is none, as `PairCollator` has a dummy."""
        if not len(rows):
            return torch.zeros(1, self.vectors.shape[1])
        places = self.numbers[np.searchsorted(self.rows, rows.cpu().numpy())]
        return torch.from_numpy(self.vectors[places])


def keep_features(
    model, tower: str, dataset: Dataset, collator: PairCollator, accelerator, batch_size: int
) -> Features:
    """The features of a frozen tower of all pairs of a dataset, computed by the ranks of a machine together.

    The file's name is a hash of the images (or the captions' tokens), of the tower's weights and of what makes pixels.

    Args:
        tower: "vision" or "text".
        collator: that of the training, without augmentation.
    """
    if tower == "vision":
        contents = column(dataset, "image_id")
        made_of = [collator.pixels.processor.to_json_string(), type(collator.pixels.processor).__name__]
    else:
        contents = np.array([number_of(hash_of(ids)) for ids in dataset["input_ids"]])
        made_of = [collator.pad_token_id]
    distinct, first, numbers = np.unique(contents, return_index=True, return_inverse=True)
    made_of += [tower, transformers.__version__, str(accelerator.mixed_precision), hash_weights(model, tower)]
    name = hashlib.sha256(json.dumps(made_of).encode() + distinct.tobytes()).hexdigest()
    file = CACHE_DIR / f"features-{name[:16]}.npy"
    rank, ranks = accelerator.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    is_kept, process = zip(*gather_object([(file.exists(), os.getpid())]), strict=True)
    if not all(is_kept):
        share = dataset.select(first[len(first) * rank // ranks : len(first) * (rank + 1) // ranks])
        parts = [file.with_suffix(f".{process[0]}-{number}.npy") for number in range(ranks)]
        np.save(parts[rank], compute_features(model, tower, share, collator, accelerator, batch_size))
        accelerator.wait_for_everyone()
        if accelerator.is_local_main_process:
            join_parts(parts, file)
        accelerator.wait_for_everyone()
    return Features(file, column(dataset, "row"), numbers)


def hash_weights(model, tower: str) -> str:
    """Of the tower's weights and statistics, and of how it is pooled."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, weight in getattr(model, f"{tower}_model").state_dict().items():
        digest.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def compute_features(model, tower: str, rows: Dataset, collator, accelerator, batch_size: int) -> np.ndarray:
    """(rows, width) in fp32."""
    model.to(accelerator.device).eval()
    parts = []
    starts = range(0, len(rows), batch_size)
    for start in tqdm(starts, desc=f"{tower} features", disable=len(starts) < 20):
        batch = collator(list(rows.select(range(start, min(start + batch_size, len(rows))))))
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        with accelerator.autocast():
            if tower == "vision":
                features = pool_images(model, batch["pixel_values"])
            else:
                features = pool_texts(model, batch["input_ids"], batch["attention_mask"])
        parts.append(features.float().cpu().numpy())
    return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)


def join_parts(parts: list[Path], file: Path) -> None:
    """Puts the ranks' parts into one file, which is there whole or not at all."""
    arrays = [array for array in map(np.load, parts) if len(array)]
    np.save(parts[0], np.concatenate(arrays))
    os.rename(parts[0], file)
    for part in parts[1:]:
        part.unlink()
