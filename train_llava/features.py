"""A frozen tower's features, taken once and kept on disk: the projector reads them in the place of pictures."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate.utils import broadcast_object_list, tqdm
from datasets import Dataset
from filelock import FileLock, Timeout
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlavaModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPooling

from checkpoint import write_through
from images import CACHE_DIR, Reference
from rows import UserError
from tower import feature_layers, feature_shape


class FeatureCache:
    """The features of pictures by their ids, from disk; `LlavaCollator` takes it in the place of `pixels.Pixels`.

    A folder of pairs of files: NAME.npy with the ids of some pictures, NAME.fp16 with their features one after the
    other. A pair never changes. Reading leaves nothing in memory, and works in the DataLoader's workers.

    Attributes:
        shape: (image tokens, width) of one picture.
    """

    def __init__(self, folder: Path, shape: tuple[int, int]):
        self.folder, self.shape, self.size = folder, shape, 2 * shape[0] * shape[1]
        lists = sorted(folder.glob("*.npy"))
        ids = [np.load(file) for file in lists]
        self.files = [file.with_suffix(".fp16") for file in lists]
        every = np.concatenate([np.empty(0, np.int64), *ids])
        order = np.argsort(every)
        self.ids = every[order]
        self.file_numbers = np.repeat(np.arange(len(ids)), [len(some) for some in ids])[order]
        self.offsets = np.concatenate([np.empty(0, np.int64), *(np.arange(len(some)) for some in ids)])[order]
        self.offsets *= self.size

    def lacks(self, ids: np.ndarray) -> np.ndarray:
        """Those of some ids that aren't there, each once."""
        return np.setdiff1d(ids, self.ids)

    def add(self, ids: np.ndarray, features: Iterator[np.ndarray], partial: str) -> None:
        """Writes the features of new pictures; they are there whole or not at all.

        Args:
            features: fp16, (pictures, *shape), some pictures after the other.
            partial: name of what isn't complete yet.
        """
        name, aside = hashlib.sha256(ids.tobytes()).hexdigest()[:16], self.folder / f"{partial}.partial"
        for ending, parts in ((".fp16", features), (".npy", [ids])):
            with aside.open("wb") as file:
                for part in parts:
                    np.save(file, part) if ending == ".npy" else file.write(part.tobytes())
            write_through(aside)
            os.replace(aside, self.folder / f"{name}{ending}")

    def __call__(self, references: list[dict], image_ids: list[int]) -> torch.Tensor:
        """fp16 of (pictures, image tokens, width); raises UserError where a picture's are not there."""
        features = np.empty((len(image_ids), *self.shape), np.float16)
        places = np.searchsorted(self.ids, image_ids).clip(max=len(self.ids) - 1)
        if not np.array_equal(self.ids[places], image_ids):
            raise UserError("a picture's features are not kept: evaluate other rows with --feature_cache_gb 0")
        with ExitStack() as opened:
            numbers = self.file_numbers[places].tolist()
            files = {number: opened.enter_context(self.files[number].open("rb")) for number in set(numbers)}
            for one, number, offset in zip(features, numbers, self.offsets[places].tolist(), strict=True):
                if os.preadv(files[number].fileno(), [one], offset) < self.size:
                    raise UserError(f"{self.files[number]}: is cut off. Remove its folder, and start again.")
        return torch.from_numpy(features)


def keep_features(model, pixels, datasets: list[Dataset], trainer_args, accelerator, limit_gb: float):
    """A cache that holds all pictures of some data sets, where the tower is frozen and the limit allows it.

    The ranks of a machine share the work; what another run has computed, or is computing, is not computed again.

    Args:
        pixels: `pixels.Pixels`, for the pictures that the cache lacks.
        limit_gb: of all features on the disk, those of other towers too.

    Returns:
        The cache, whose features the model's tower hands on from now; or `pixels` as it was. And what there is to say.

    Raises:
        UserError: features that fp16 can't hold.
    """
    llava = next(module for module in model.modules() if isinstance(module, LlavaModel))
    tower, config = llava.vision_tower, llava.config
    references = list_pictures(datasets)
    if any(parameter.requires_grad for parameter in tower.parameters()) or not limit_gb or not references:
        return pixels, []
    positions, width = feature_shape(config, pixels.shape, config.name_or_path)
    shape = (positions - (config.vision_feature_select_strategy == "default"), width * len(feature_layers(config)))
    ids = np.array(list(references))
    with whole(tower):
        folder = CACHE_DIR / f"features-{name_of(tower, config, pixels.processor, accelerator)}"
        cache = FeatureCache(folder, shape)
        remove_unfinished(folder)
        is_kept, said = broadcast_object_list([fits(cache, ids, limit_gb)])[0]
        if not is_kept:
            return pixels, [said]
        folder.mkdir(parents=True, exist_ok=True)
        rank, ranks = accelerator.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        # Which rank has which pictures depends on nothing that another run might be changing.
        share = f"{rank}-of-{ranks}"
        with FileLock(folder / f"{share}.lock"):
            missing = FeatureCache(folder, shape).lacks(ids[ids % ranks == rank])
            if len(missing):
                pictures = [(number, references[number]) for number in missing.tolist()]
                cache.add(missing, compute(llava, pixels, pictures, trainer_args, accelerator), share)
    accelerator.wait_for_everyone()
    hand_features_on(llava)
    return FeatureCache(folder, shape), [said]


def list_pictures(datasets: list[Dataset]) -> dict[int, Reference]:
    """Where each picture of some data sets is, by its id."""
    found = {}
    for rows in datasets:
        for ids, images in zip(rows["image_ids"][:], rows["images"][:], strict=True):
            found |= {number: Reference(**image) for number, image in zip(ids, images, strict=True)}
    return found


def remove_unfinished(folder: Path) -> None:
    """Removes what a run that was killed has left: one of another number of ranks would never write there again."""
    for unfinished in folder.glob("*.partial"):
        with suppress(Timeout), FileLock(unfinished.with_suffix(".lock"), timeout=0):
            unfinished.unlink(missing_ok=True)


def fits(cache: FeatureCache, ids: np.ndarray, limit_gb: float) -> tuple[bool, str]:
    """Whether the cache may grow by what it lacks, and the estimate in words."""
    missing, there = len(cache.lacks(ids)), sum(file.stat().st_size for file in CACHE_DIR.glob("features-*/*"))
    gigabytes, of_all = missing * cache.size / 1e9, len(ids) * cache.size / 1e9
    what = f"features of {len(ids):,} pictures ({of_all:.2g} GB, {missing:,} of them to be computed)"
    if missing and gigabytes + there / 1e9 > limit_gb:
        return False, (
            f"{what} are not kept: with {there / 1e9:.2g} GB in {CACHE_DIR.name}/features-* they would be more than "
            f"--feature_cache_gb {limit_gb:g}; the tower is asked at each step. Raise the limit, or remove old ones"
        )
    return True, f"{what} are kept in {CACHE_DIR.name}/{cache.folder.name}: no step decodes a picture or asks the tower"


def name_of(tower: nn.Module, config, image_processor, accelerator) -> str:
    """A hash of all that decides the features of a picture."""
    settings = config.vision_config.to_dict()
    for name in ("down_ops", "dtype", "transformers_version", "_name_or_path"):  # LeViT's class changes the first
        settings.pop(name, None)
    made_of = [
        *(settings, config.vision_feature_layer, config.vision_feature_select_strategy),
        *(json.loads(image_processor.to_json_string()), type(image_processor).__name__),  # ...Pil: the backend
        *(transformers.__version__, str(tower.dtype), str(accelerator.mixed_precision)),
    ]
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode())
    for name, weight in tower.state_dict().items():
        digest.update(name.encode() + weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def whole(tower: nn.Module) -> Iterator[None]:
    """The tower with all of its weights, of which under ZeRO-3 each rank has a part."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(tower.parameters())):
        yield


@torch.no_grad()
def compute(
    llava: LlavaModel, pixels, pictures: list[tuple[int, Reference]], trainer_args, accelerator
) -> Iterator[np.ndarray]:
    """The features that the projector would be given, fp16, some pictures at a time; these are decoded by workers."""
    tower, config = llava.vision_tower.to(accelerator.device), llava.config
    size = trainer_args.per_device_eval_batch_size
    loader = DataLoader(
        [pictures[start : start + size] for start in range(0, len(pictures), size)],
        batch_size=None,
        collate_fn=pixels.from_references,
        num_workers=trainer_args.dataloader_num_workers,
        generator=torch.Generator(),  # its own, so that the model's random numbers are not moved
    )
    for pixel_values in tqdm(loader, desc="features", disable=len(loader) < 20):
        with accelerator.autocast():
            hidden_states = tower(
                pixel_values.to(accelerator.device, tower.dtype), output_hidden_states=True
            ).hidden_states
        features = torch.cat([hidden_states[layer] for layer in feature_layers(config)], dim=-1)
        features = features[:, int(config.vision_feature_select_strategy == "default") :].half()
        if not torch.isfinite(features).all():
            raise UserError("the vision tower's features are no numbers, or too large for fp16: --feature_cache_gb 0.")
        yield features.cpu().numpy()


def hand_features_on(llava: LlavaModel) -> None:
    """The tower's forward hands on what it is given; projector and all else stay inside the model's own forward."""
    layers, has_class_token = feature_layers(llava.config), llava.config.vision_feature_select_strategy == "default"

    def forward(features: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        features = features.to(next(llava.multi_modal_projector.parameters()).dtype)
        if has_class_token:  # which is cut off again
            features = F.pad(features, (0, 0, 1, 0))
        return BaseModelOutputWithPooling(
            hidden_states=dict(zip(layers, features.chunk(len(layers), dim=-1), strict=True))
        )

    llava.vision_tower.forward = forward
