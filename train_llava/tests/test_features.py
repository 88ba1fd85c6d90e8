"""A frozen tower's features: computed once, kept within the limit, read by workers, and the loss stays what it was."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from ranks import losses, run_train, train_here
from transformers import LlavaForConditionalGeneration

import features
from data import list_image_ids, load_encoded
from features import FeatureCache, keep_features, name_of
from images import Reference
from model import freeze, set_aspect_ratio
from pixels import Pixels
from rows import UserError


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CACHE_DIR", tmp_path / "cache")
    return tmp_path / "cache"


class CountedPixels(Pixels):
    decoded = 0

    def from_references(self, pictures):
        self.decoded += len(pictures)
        return super().from_references(pictures)


def read_model(folder: str, train_type: str = "freeze_vision"):
    model = LlavaForConditionalGeneration.from_pretrained(folder).train()
    freeze(model, train_type)
    return model


def copy_of(config, **settings):
    config = copy.deepcopy(config)
    for name, value in settings.items():
        setattr(config, name, value)
    return config


def keep(model, pixels, rows, limit_gb=10.0):
    args = SimpleNamespace(per_device_eval_batch_size=4, dataloader_num_workers=0)
    return keep_features(model, pixels, rows, args, Accelerator(cpu=True), limit_gb)


@torch.no_grad()
def project(model, pixel_values) -> torch.Tensor:
    """What the language model is given for some pictures, or for what the tower hands on."""
    names = ("vision_feature_layer", "vision_feature_select_strategy")
    settings = {name: getattr(model.config, name) for name in names}
    return torch.stack(model.model.get_image_features(pixel_values=pixel_values, **settings).pooler_output)


@pytest.mark.parametrize("tower", ["tiny_folder", "levit_folder"])
def test_features_are_the_tower_s_and_computed_once(tower, processor, data_file, eval_file, request):
    folder = request.getfixturevalue(tower)
    rows, _ = load_encoded(data_file, processor, 2048)
    others, _ = load_encoded(eval_file, processor, 2048)
    ids = np.unique(list_image_ids(rows))
    pixels = CountedPixels(processor.image_processor)
    model = read_model(folder)
    places = rows[1]["images"] + rows[0]["images"]
    image_ids = rows[1]["image_ids"] + rows[0]["image_ids"]
    pixel_values = pixels(places, image_ids)
    expected = project(model, pixel_values)
    pixels.decoded = 0
    cache, messages = keep(model, pixels, [rows])
    assert pixels.decoded == len(ids) and f"features of {len(ids)} pictures" in messages[0]
    assert cache.shape == (16, 128)
    kept = pickle.loads(pickle.dumps(cache))(places, image_ids)  # as a worker does
    assert kept.dtype == torch.float16 and kept.shape == (3, 16, 128)
    torch.testing.assert_close(project(model, kept), expected, rtol=1e-2, atol=5e-3)

    pixels.decoded = 0  # the next run computes what is new, and the one after it nothing
    keep(read_model(folder), pixels, [rows, others])
    assert pixels.decoded == len(set(list_image_ids(others)) - set(ids))
    keep(read_model(folder), pixels, [rows, others])
    assert pixels.decoded == len(set(list_image_ids(others)) - set(ids))


def test_what_decides_a_feature_names_its_cache(tiny_folder, processor, cache_dir):
    """Another tower, layer, strategy, treatment of pictures or precision never meets an old cache."""
    accelerator, own, model = Accelerator(cpu=True), processor.image_processor, read_model(tiny_folder)
    tower, config = model.model.vision_tower, model.config

    def name(tower=tower, own=own, accelerator=accelerator, **settings):
        return name_of(tower, copy_of(config, **settings), own, accelerator)

    moved = read_model(tiny_folder).model.vision_tower
    next(moved.parameters()).data[0] += 0.1
    half = SimpleNamespace(mixed_precision="bf16")
    layer, strategy = config.vision_feature_layer - 1, {"default": "full", "full": "default"}
    names = [
        *(name(), name(tower=moved), name(own=set_aspect_ratio(own, "crop")), name(accelerator=half)),
        *(name(vision_feature_layer=layer), name(own=type("OtherPil", (type(own),), {})(**own.to_dict()))),
        name(vision_feature_select_strategy=strategy[config.vision_feature_select_strategy]),
    ]
    assert len(set(names)) == len(names) and name() == names[0]


def test_the_cache_never_grows_beyond_its_limit(tiny_folder, processor, data_file, cache_dir):
    rows, _ = load_encoded(data_file, processor, 2048)
    pixels, count = Pixels(processor.image_processor), len(np.unique(list_image_ids(rows)))
    size = count * 16 * 128 * 2 / 1e9
    source, messages = keep(read_model(tiny_folder), pixels, [rows], 0.99 * size)
    assert source is pixels and not cache_dir.exists()
    assert "are not kept" in messages[0] and "--feature_cache_gb" in messages[0]
    assert isinstance(keep(read_model(tiny_folder), pixels, [rows], 1.3 * size)[0], FeatureCache)
    assert sum(file.stat().st_size for file in cache_dir.rglob("*.fp16")) == round(size * 1e9)
    (folder,) = cache_dir.glob("features-*")
    (folder / "3-of-4.partial").write_bytes(b"torn")  # by ranks that won't be so many again
    keep(read_model(tiny_folder), pixels, [rows])
    assert not list(folder.glob("*.partial"))
    changed = read_model(tiny_folder)
    next(changed.model.vision_tower.parameters()).data[0] += 0.1
    assert keep(changed, pixels, [rows], 1.3 * size)[0] is pixels  # those of another tower count too
    assert keep(read_model(tiny_folder), pixels, [rows], 0.0) == (pixels, [])
    assert keep(read_model(tiny_folder, "none"), pixels, [rows]) == (pixels, [])


def test_features_that_fp16_cannot_hold_are_refused(tiny_folder, processor, data_file, cache_dir):
    rows, _ = load_encoded(data_file, processor, 2048)
    model = read_model(tiny_folder)
    model.model.vision_tower.embeddings.position_embeddings.data[:, 1:] += 1e6
    with pytest.raises(UserError, match="too large for fp16: --feature_cache_gb 0"):
        keep(model, Pixels(processor.image_processor), [rows])
    assert not list(cache_dir.rglob("*.npy"))  # what was begun doesn't count


def test_two_ranks_share_the_work_and_equal_one_that_reads_pixels(
    levit_folder, data_file, eval_file, tmp_path, monkeypatch
):
    """A frozen LeViT: its batch norms keep their statistics, so ranks and batches don't matter."""
    common = ["--model_name_or_path", levit_folder, "--data_path", data_file, "--eval_data_path", eval_file]
    common += ["--learning_rate", "1e-3", "--logging_steps", "1", "--save_strategy", "no", "--num_train_epochs", "1"]
    one = ["--feature_cache_gb", "0", "--per_device_train_batch_size", "8", "--output_dir", tmp_path / "one"]
    train_here(monkeypatch, *common, *one)
    two = ["--per_device_train_batch_size", "4", "--dataloader_num_workers", "1", "--output_dir", tmp_path / "two"]
    screen = run_train(*common, *two, processes=2)
    assert "of them to be computed) are kept in cache_data/features-" in screen
    for key in ("loss", "eval_loss", "eval_loss_exchanged"):
        assert losses(tmp_path / "two", key) == pytest.approx(losses(tmp_path / "one", key), abs=1e-4)


def test_half_a_part_is_none(tmp_path):
    cache = FeatureCache(tmp_path, (2, 3))
    (tmp_path / "0-of-1.partial").write_bytes(b"torn")
    (tmp_path / "abc.fp16").write_bytes(b"its ids were never written")
    ids = np.array([7, -5, 3])
    values = np.arange(18, dtype=np.float16).reshape(3, 2, 3)
    cache.add(ids, iter([values[:2], values[2:]]), "0-of-1")
    cache = FeatureCache(tmp_path, (2, 3))
    assert cache.lacks(np.array([3, 4, -5, 4])).tolist() == [4]
    assert torch.equal(cache([Reference("x")._asdict()] * 3, [3, 7, 7]), torch.from_numpy(values[[2, 0, 0]]))
    with pytest.raises(UserError, match="features are not kept"):
        cache([Reference("x")._asdict()], [4])
    with cache.files[0].open("r+b") as file:
        file.truncate(30)
    with pytest.raises(UserError, match="is cut off"):
        cache([Reference("x")._asdict()], [3])
