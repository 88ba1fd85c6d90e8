"""Pictures become the processor's numbers, bit for bit, in the order of their tokens; no batch is without one."""

import hashlib
import tarfile

import numpy as np
import pytest
import torch
import transformers
from small_processor import IMAGE_TOKENS, make_processor, write_mixed_rows, write_pictures
from torch.utils.data import DataLoader

import data
import images
from collator import LlavaCollator
from data import load_encoded
from images import ImageError, Reference, load_image, read_image_bytes
from odd_images import draw_good
from pixels import Pixels, count_image_tokens, number_of
from rows import UserError
from tars import read_members
from template import IGNORE_INDEX

NAMES = ["CLIP", "Siglip", "ViT", "ChineseCLIP", "Bit", "Levit", "DeiT", "ConvNext", "Llava"]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """Rows of 1, 2, 0 and 2 pictures, in turns; and their processor."""
    folder = tmp_path_factory.mktemp("collator")
    with pytest.MonkeyPatch.context() as patch:
        for module in (data, images):
            patch.setattr(module, "CACHE_DIR", folder / "cache")
        processor = make_processor()
        yield load_encoded(write_mixed_rows(folder / "data", 3), processor, 2048)[0], processor


def with_ids(references: list[Reference]) -> list[tuple[int, Reference]]:
    return [(number_of(hashlib.sha256(read_image_bytes(*one)).hexdigest()), one) for one in references]


@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_what_the_towers_processor_gives(name):
    settings = {"do_pad": True, "crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    changed = settings if name == "Llava" else {}
    processor = getattr(transformers, f"{name}ImageProcessorPil")(**changed)
    pictures = [load_image(content) for content in draw_good().values()]
    pixels = Pixels(processor)
    own = processor(images=pictures, return_tensors="pt")["pixel_values"]
    assert own.dtype == torch.float32 and torch.equal(pixels.from_images(pictures), own)
    assert own.shape[1:] == pixels.shape


def test_a_processor_of_several_sizes_is_refused():
    with pytest.raises(UserError, match="CLIPImageProcessorPil makes pictures of different sizes; set its crop_size"):
        Pixels(make_processor(do_center_crop=False).image_processor)


def test_image_tokens_are_counted_by_the_processor_itself():
    processor = make_processor()
    assert count_image_tokens(processor) == IMAGE_TOKENS
    processor.vision_feature_select_strategy = "full"
    assert count_image_tokens(processor) == IMAGE_TOKENS + 1


def test_pictures_stand_in_the_order_of_their_tokens(encoded):
    rows, processor = encoded
    collator = LlavaCollator(Pixels(processor.image_processor), processor.image_token_id, IMAGE_TOKENS, False)
    batch = collator([rows[3], rows[2], rows[0]])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    found = (batch["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert found == [2 * IMAGE_TOKENS, 0, IMAGE_TOKENS] and batch["pixel_values"].shape == (3, 3, 24, 24)
    for number, place in enumerate([*rows["images"][3], *rows["images"][0]]):
        picture = load_image(read_image_bytes(**place))
        own = processor.image_processor(images=picture, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(batch["pixel_values"][number], own)


def test_a_picture_that_was_changed_is_no_picture_of_the_data_set(tmp_path):
    first, second = write_pictures(tmp_path, 2)
    pixels, known = Pixels(make_processor().image_processor), with_ids([Reference(str(tmp_path / first))])
    pixels.from_references(known)
    (tmp_path / first).write_bytes((tmp_path / second).read_bytes())
    with pytest.raises(ImageError, match=rf"{first} was changed since it was checked: it is another picture"):
        pixels.from_references(known)
    (tmp_path / first).unlink()
    with pytest.raises(ImageError, match=rf"{first} was changed since it was checked: can't be read"):
        pixels.from_references(known)


def test_workers_give_the_same_batches(encoded):
    rows, processor = encoded
    collator = LlavaCollator(Pixels(processor.image_processor), processor.image_token_id, IMAGE_TOKENS, True)
    orders = [[0, 1], [2], [3, 2], [], [5, 4]]
    workers = DataLoader(rows, batch_sampler=orders, collate_fn=collator, num_workers=2)
    for batch, order in zip(workers, orders, strict=True):
        expected = collator([rows[number] for number in order])
        assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)


@pytest.mark.parametrize("examples", [[], [2, 6]])
def test_a_batch_without_a_picture_gets_a_blank_one_where_it_is_needed(encoded, examples):
    """Without labels, last, and a single one; none where tower and projector stay as they are."""
    rows, processor = encoded
    examples = [rows[number] for number in examples]
    settings = (Pixels(processor.image_processor), processor.image_token_id, IMAGE_TOKENS)
    plain = LlavaCollator(*settings, always_image=False)(examples)
    assert "pixel_values" not in plain
    batch = LlavaCollator(*settings, always_image=True)(examples)
    assert len(batch["input_ids"]) == len(examples) + 1 and torch.equal(
        batch["pixel_values"], torch.zeros(1, 3, 24, 24)
    )
    assert (
        batch["input_ids"][-1][batch["attention_mask"][-1] == 1].tolist() == [processor.image_token_id] * IMAGE_TOKENS
    )
    assert (batch["labels"][-1] == IGNORE_INDEX).all()
    width = plain["input_ids"].shape[1] if examples else 0
    assert torch.equal(batch["labels"][:-1, :width], plain["labels"][: len(examples)]) or not examples
    assert LlavaCollator(*settings, always_image=True)([rows[0]])["input_ids"].shape[0] == 1


def test_features_take_the_place_of_pictures(encoded):
    class Features:
        """As a cache of the tower's output: by id, of shape (tokens, width)."""

        shape = (IMAGE_TOKENS, 5)

        def __call__(self, references, image_ids):
            return torch.stack([torch.full(self.shape, image_id % 97, dtype=torch.float16) for image_id in image_ids])

    rows, processor = encoded
    collator = LlavaCollator(Features(), processor.image_token_id, IMAGE_TOKENS, always_image=True)
    batch = collator([rows[1], rows[0]])
    expected = [image_id % 97 for image_id in [*rows["image_ids"][1], *rows["image_ids"][0]]]
    assert batch["pixel_values"].shape == (3, IMAGE_TOKENS, 5) and batch["pixel_values"][:, 0, 0].tolist() == expected
    assert collator([rows[2]])["pixel_values"].shape == (1, IMAGE_TOKENS, 5)


def test_many_pictures_at_once_are_each_by_itself_in_a_tar_too(tmp_path):
    names = write_pictures(tmp_path, 20)
    pixels = Pixels(make_processor().image_processor)
    references = with_ids([Reference(str(tmp_path / name)) for name in names])
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in names:
            tar.add(tmp_path / name, name)
    members = [Reference(tar.name, member.offset, member.size) for member in read_members(tar.name)]
    together = pixels.from_references(references)
    assert torch.equal(together, torch.cat([pixels.from_references([one]) for one in references]))
    assert torch.equal(together, pixels.from_references(with_ids(members)))
    assert len(np.unique(together.flatten(1)[:, 0])) > 1 and pixels.from_references([]).shape == (0, 3, 24, 24)
