"""Pixels are the processor's, each pair comes once an epoch, groups stay together, ranks get equal shares."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_pairs import data_settings, make_pictures, make_tokenizer, write_table
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil, LevitImageProcessorPil, ViTImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import batch
import data
import images
from batch import BATCH_COLUMNS, PairBatchSampler, PairCollator, Pixels
from data import load_splits
from rows import UserError

SMALL = {"size": {"height": 24, "width": 24}}
CLIP = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for module in (images, data, batch):
        monkeypatch.setattr(module, "CACHE_DIR", tmp_path / "cache")


@pytest.fixture
def pairs(tmp_path):
    path = write_table(tmp_path / "d.jsonl", make_pictures(tmp_path / "images", 7))
    return load_splits(data_settings(path), make_tokenizer(tmp_path / "tokenizer"), 0, None)[0]


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(**SMALL),
        ViTImageProcessorPil(**SMALL, do_normalize=False),
        ViTImageProcessorPil(**SMALL, image_mean=[0, 0, 0], image_std=[1, 1, 1], rescale_factor=1 / 127.5),
        SiglipImageProcessorPil(**SMALL),
        CLIPImageProcessorPil(**CLIP),
        CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 24, "width": 24}, resample=2),
        LevitImageProcessorPil(**CLIP),
    ],
    ids=["vit", "no normalisation", "own mean", "siglip", "clip", "clip, cropped", "a resize of its own"],
)
def test_pixels_are_the_processors_own(processor):
    pixels, rng = Pixels(processor), np.random.default_rng(1)
    assert pixels.directly == (type(processor) is not LevitImageProcessorPil)
    for size in ((40, 30), (17, 90), (1, 1), (3, 3), (1, 60), (24, 24), (333, 517)):
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        found = pixels.normalise(pixels.from_image(image))
        expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
        assert found.shape == expected.shape == (3, 24, 24) and found.dtype == torch.float32
        assert (found - expected).abs().max() < 1e-6


def test_processors_that_are_not_resize_crop_normalise_are_refused(tmp_path):
    with pytest.raises(UserError, match="makes pictures of different sizes"):
        Pixels(CLIPImageProcessorPil(size={"shortest_edge": 24}, do_center_crop=False))


def test_kept_pixels_are_the_decoded_ones_and_need_no_picture(pairs, tmp_path, monkeypatch):
    rows = list(pairs)
    pixels = Pixels(ViTImageProcessorPil(**SMALL), image_cache_gb=1)
    decoded = pixels.from_rows(rows)
    assert pixels.keep(pairs, pairs).startswith("pixel cache: 7 images")
    monkeypatch.setattr(batch, "read_image_bytes", None)
    assert np.array_equal(pixels.from_rows(rows[::-1]), decoded[::-1])
    again = Pixels(ViTImageProcessorPil(**SMALL), image_cache_gb=1)
    again.keep(pairs)  # by another run
    assert np.array_equal(again.from_rows(rows), decoded)
    with monkeypatch.context() as full_disk:  # which the cache itself has filled
        full_disk.setattr(batch.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        assert again.keep(pairs).startswith("pixel cache: 7 images")
        assert "0.0 GB free" in Pixels(ViTImageProcessorPil(**SMALL, resample=0), 1).keep(pairs)
    others = [Pixels(ViTImageProcessorPil(**SMALL, resample=0), 1), Pixels(ViTImageProcessorPil(**SMALL), 1e-6)]
    monkeypatch.undo()
    monkeypatch.setattr(batch, "CACHE_DIR", tmp_path / "cache")
    others[0].keep(pairs)
    assert others[0].cache_file != pixels.cache_file and not np.array_equal(others[0].from_rows(rows), decoded)
    assert others[1].keep(pairs).startswith("no pixel cache, images are decoded at each step: it would take")
    assert others[1].cache_file is None and np.array_equal(others[1].from_rows(rows), decoded)


@pytest.mark.parametrize("change", ["it is another picture", "can't be read"])
def test_a_picture_that_was_changed_since_it_was_checked_is_named(pairs, tmp_path, change):
    (tmp_path / "images/3.png").unlink()
    if change == "it is another picture":
        shutil.copy(tmp_path / "images/4.png", tmp_path / "images/3.png")
    pixels = Pixels(ViTImageProcessorPil(**SMALL), image_cache_gb=1)
    for use in (pixels.keep, lambda rows: pixels.from_rows(list(rows))):
        with pytest.raises(UserError, match=rf"images/3.png was changed since it was checked: {change}"):
            use(pairs)
    assert not list((tmp_path / "cache").glob("tmp*")) and not list((tmp_path / "cache").glob("pixels-*[!k]"))


def test_a_batch_and_one_without_any_pair(pairs):
    pixels = Pixels(ViTImageProcessorPil(**SMALL))
    rows = list(pairs.select_columns(BATCH_COLUMNS))
    rows[1]["input_ids"] = rows[1]["input_ids"][:2]
    found = PairCollator(pixels, pad_token_id=9)(rows[:2])
    assert found["pixel_values"].shape == (2, 3, 24, 24) and found["pixel_values"].dtype == torch.float32
    assert found["input_ids"].tolist() == [rows[0]["input_ids"], rows[1]["input_ids"] + [9, 9]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert found["image_ids"].tolist() == [row["image_id"] for row in rows[:2]] and found["rows"].tolist() == [0, 1]
    empty = PairCollator(pixels, pad_token_id=9)([])
    assert empty["pixel_values"].shape == (1, 3, 24, 24) and not empty["pixel_values"].any()
    assert empty["input_ids"].tolist() == [[9]] and empty["attention_mask"].tolist() == [[1]]
    assert [empty[name].shape for name in ("image_ids", "caption_ids", "rows")] == [(0,)] * 3


def test_crops_depend_on_seed_epoch_and_row_alone(pairs):
    pixels = Pixels(ViTImageProcessorPil(**SMALL))
    rows = list(pairs.select_columns(BATCH_COLUMNS))
    plain = PairCollator(pixels, 0)(rows)["pixel_values"]
    collate = PairCollator(pixels, 0, "crop", seed=1)
    first = collate(rows)["pixel_values"]
    assert torch.equal(collate(rows[::-1])["pixel_values"], first.flip(0)) and not torch.equal(first, plain)
    collate.set_epoch(1)
    assert not torch.equal(collate(rows)["pixel_values"], first)
    assert not torch.equal(PairCollator(pixels, 0, "crop", seed=2)(rows)["pixel_values"], first)
    flat = Image.new("RGB", (24, 24), (10, 20, 30))
    assert np.array_equal(
        batch.crop_at_random(pixels.from_image(flat), np.random.default_rng(0), 3), pixels.from_image(flat)
    )


@pytest.mark.parametrize(("pairs", "batch_size", "ranks"), [(64, 8, 4), (67, 4, 4), (3, 4, 4), (10, 3, 1)])
def test_every_pair_once_an_epoch_in_equal_shares(pairs, batch_size, ranks):
    groups = [""] * pairs
    samplers = [PairBatchSampler(groups, batch_size, ranks, rank, seed=0) for rank in range(ranks)]
    whole = PairBatchSampler(groups, batch_size * ranks, 1, 0, seed=0)
    steps = list(zip(*samplers, strict=True))
    assert len(steps) == len(samplers[0]) == len(whole)
    for shares, together in zip(steps, whole, strict=True):
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1 and sum(shares, []) == together
    assert all(len(share) == batch_size for shares in steps[:-1] for share in shares)
    assert sorted(index for shares in steps for share in shares for index in share) == list(range(pairs))
    first = list(whole)
    whole.set_epoch(1)
    assert pairs < 10 or list(whole) != first
    ordered = PairBatchSampler(groups, batch_size, 1, 0, seed=0, shuffle=False)
    assert sum(ordered, []) == list(range(pairs))


@pytest.mark.parametrize(
    ("sizes", "singles", "cut"),
    [([4] * 20, 0, 0), ([4] * 9 + [3] * 5 + [2] * 3, 30, 0), ([5] * 12, 0, 3), ([40], 7, 1), ([16] * 3, 0, 0)],
    ids=["fours", "mixed", "fives", "larger than a batch", "whole batches"],
)
def test_groups_stay_in_one_global_batch_where_they_fit(sizes, singles, cut):
    groups = [f"g{number}" for number, size in enumerate(sizes) for _ in range(size)] + [""] * singles
    for epoch in range(3):
        sampler = PairBatchSampler(groups, 8, 2, 0, seed=0)
        sampler.set_epoch(epoch)
        order = sampler.order()
        assert sorted(order) == list(range(len(groups)))
        batch_of = {pair: place // 16 for place, pair in enumerate(order)}
        spread = [len({batch_of[i] for i, group in enumerate(groups) if group == f"g{n}"}) for n in range(len(sizes))]
        assert sum(batches > 1 for batches in spread) == cut


def test_families_and_single_pairs_are_mixed_all_through_an_epoch():
    groups = [f"family {number // 4}" for number in range(2000)] + [""] * 2000
    batches = list(PairBatchSampler(groups, 200, 1, 0, seed=0))
    in_families = [sum(row < 2000 for row in batch) for batch in batches]
    large = PairBatchSampler([f"g{number // 16}" for number in range(160)] + [""], 8, 2, 0, seed=0)
    cut = [len({place // 16 for place, pair in enumerate(large.order()) if pair // 16 == group}) for group in range(10)]
    assert sum(batches > 1 for batches in cut) <= 1  # one at most for the single pair
    assert len(batches) == 20 and all(60 < count < 140 for count in in_families), in_families


def test_an_epoch_of_a_loader_with_workers_is_the_same_and_an_empty_share_passes(pairs):
    pixels = Pixels(ViTImageProcessorPil(**SMALL), image_cache_gb=1)
    pixels.keep(pairs)
    collate = PairCollator(pixels, 0, "crop")
    sampler = PairBatchSampler([""] * 7, 2, 3, 2, seed=0)  # 6 pairs, then 1: none for ranks 1 and 2
    loaders = [
        DataLoader(pairs.select_columns(BATCH_COLUMNS), batch_sampler=sampler, collate_fn=collate, num_workers=workers)
        for workers in (0, 1)
    ]
    plain, by_worker = (list(loader) for loader in loaders)
    assert [len(each["rows"]) for each in plain] == [2, 0]
    for one, other in zip(plain, by_worker, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
