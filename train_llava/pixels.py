"""Pictures -> the numbers that the tower sees, by the model's own image processor.

What costs is decoding and resizing, which gives bytes; rescaling and normalising them is a look-up in a table of
3 x 256 numbers, so that bytes can be sent (`web_dataset.py`) and give the same numbers elsewhere.
"""

import hashlib
from itertools import groupby

import numpy as np
import torch
from PIL import Image
from transformers import AddedToken, AutoProcessor, LlavaProcessor

from files import UserError
from images import ImageError, Reference, load_image, read_image_bytes
from template import read_tokenizer
from web_dataset import WEB, fetch_pixels

DECODED_AT_ONCE = 8  # by one call of the processor: calls cost, and so does the memory of large pictures
# Before the templates of llava-hf's models, which leave out a content that is no list of typed parts.
STRINGS_AS_PARTS = (
    "{%- set turns = namespace(all=[]) -%}{%- for message in messages -%}{%- if message.content is string -%}"
    "{%- set message = dict(message, content=[{'type': 'text', 'text': message.content}]) -%}{%- endif -%}"
    "{%- set turns.all = turns.all + [message] -%}{%- endfor -%}{%- set messages = turns.all -%}"
)
PROBES = ((30, 40), (40, 30), (431, 611), (700, 500), (23, 23))


def read_processor(path: str, trust_remote_code: bool = False) -> LlavaProcessor:
    """The processor in a folder or on the hub, with PIL's resizing and a tokenizer that saves as itself.

    <image> becomes a token that is not special: the one of those a template sets that may stand in a message.

    Raises:
        OSError, ValueError: there is none, or one of another kind.
    """
    # Where torchvision is installed, its resizing would be taken, which gives other pixels.
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code, backend="pil")
    if not isinstance(processor, LlavaProcessor):
        raise UserError(f"{path}: its processor is {type(processor).__name__}, not a LLaVA's.")
    tokenizer = processor.tokenizer = read_tokenizer(path, trust_remote_code)
    tokenizer.add_tokens([AddedToken(processor.image_token, special=False, normalized=False)])
    tokenizer.chat_template = tokenizer.chat_template or processor.chat_template
    if tokenizer.chat_template and not takes_strings(tokenizer):
        tokenizer.chat_template = processor.chat_template = STRINGS_AS_PARTS + tokenizer.chat_template
        if not takes_strings(tokenizer):
            raise UserError(f"{path}: the chat template drops what the user says.")
    return processor


def number_of(sha256: str) -> int:
    """A picture's id: 64 bits of its content's SHA-256, as the int64 that tensors hold."""
    return int.from_bytes(bytes.fromhex(sha256)[:8], "big", signed=True)


def takes_strings(tokenizer) -> bool:
    """Whether the chat template renders a message whose content is text, not a list of typed parts."""
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False)
    return "你好" in rendered


def count_image_tokens(processor) -> int:
    """Image tokens of one picture, as the processor itself sets them."""
    encoded = processor(text=processor.image_token, images=Image.new("RGB", (32, 32)))
    return sum(token == processor.image_token_id for token in np.ravel(encoded["input_ids"]).tolist())


class Pixels:
    """Pictures -> fp32 tensors of (pictures, 3, height, width), bit for bit what the image processor gives.

    Attributes:
        shape: of one picture, (3, height, width).

    Raises:
        UserError: the processor gives pictures of different sizes, or does more than resize, crop, pad and normalise.
    """

    def __init__(self, image_processor):
        self.processor, name = image_processor, type(image_processor).__name__
        values = np.tile(np.arange(256, dtype=np.uint8), (3, 16, 1)).transpose(1, 2, 0)
        plain = {"do_resize": False, "do_center_crop": False, "do_pad": False}
        table = image_processor(images=[Image.fromarray(values)], return_tensors="np", **plain)["pixel_values"]
        self.table = np.ascontiguousarray(np.asarray(table)[0][:, 0], dtype=np.float32)
        rng = np.random.default_rng(0)
        probes = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in PROBES]
        found = [self.to_bytes([image]) for image in probes]
        if len({each.shape for each in found}) > 1:
            raise UserError(
                f"{name} makes pictures of different sizes; set its crop_size, or size with height and width, in "
                "preprocessor_config.json."
            )
        self.shape = found[0].shape[1:]
        own = image_processor(images=probes, return_tensors="pt")["pixel_values"]
        if not torch.equal(self.normalise(np.concatenate(found)), own.float()):
            raise UserError(f"{name} does more than resize, crop, pad, rescale and normalise.")

    def to_bytes(self, pictures: list[Image.Image]) -> np.ndarray:
        """Pictures of `load_image`, resized, as uint8 of (pictures, 3, height, width)."""
        found = self.processor(images=pictures, do_rescale=False, do_normalize=False, return_tensors="np")
        return np.asarray(found["pixel_values"]).astype(np.uint8, copy=False)

    def normalise(self, pixels: np.ndarray) -> torch.Tensor:
        """uint8 of (pictures, 3, height, width) as the tower sees it, fp32."""
        result = np.empty(pixels.shape, np.float32)
        for picture, numbers in zip(pixels, result, strict=True):
            for channel in range(3):
                np.take(self.table[channel], picture[channel], out=numbers[channel], mode="clip")
        return torch.from_numpy(result)

    def from_images(self, pictures: list[Image.Image]) -> torch.Tensor:
        """Pictures of `load_image` as fp32 of (pictures, 3, height, width)."""
        return self.normalise(self.to_bytes(pictures))

    def read(self, pictures: list[tuple[int, Reference]]) -> np.ndarray:
        """Pictures by id and place, uint8; raises ImageError where one has changed since it was checked."""
        pixels = np.empty((len(pictures), *self.shape), np.uint8)
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
            pixels[start : start + DECODED_AT_ONCE] = self.to_bytes(images)
        return pixels

    def from_references(self, pictures: list[tuple[int, Reference]]) -> torch.Tensor:
        """Pictures by id and place as fp32 of (pictures, 3, height, width), read here or by the server they are at.

        Raises:
            ImageError: one has changed since it was checked.
            UserError: the server isn't there any more, or serves other data.
        """
        if not pictures:
            return torch.empty(0, *self.shape)
        parts = []
        for address, group in groupby(pictures, key=lambda one: one[1].path if one[1].coding == WEB else None):
            some = list(group)
            if address is None:
                parts.append(self.read(some))
            else:
                parts.append(fetch_pixels(address, [place.offset for _, place in some], self.shape))
        return self.normalise(np.concatenate(parts))

    def __call__(self, references: list[dict], image_ids: list[int]) -> torch.Tensor:
        """What `LlavaCollator` asks for: the pictures of the columns `images` and `image_ids`."""
        places = [Reference(**reference) for reference in references]
        return self.from_references(list(zip(image_ids, places, strict=True)))
