"""Messages with pictures -> what the model reads: token ids, in which a picture is many, and pixels.

A message is {"role", "content", "images"}: its text, in which <image> stands where a picture is, and the pictures.
"""

from functools import lru_cache
from pathlib import Path

from PIL import Image
from transformers import BatchFeature

from files import UserError
from images import load_image, read_image_bytes
from pixels import Pixels, count_image_tokens
from rows import IMAGE_MARK, SPELLED_MARK, join_parts
from template import encode_prompt


def open_picture(path: str | Path) -> Image.Image:
    """The picture in a file, as in training (upright, on white); raises UserError, with the file, where it is none."""
    try:
        return load_image(read_image_bytes(str(path)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


@lru_cache(maxsize=4)
def prepare_pictures(processor) -> tuple[Pixels, int]:
    """What turns pictures into pixels, and the image tokens of one."""
    return Pixels(processor.image_processor), count_image_tokens(processor)


def ask_about(images: list[Image.Image], question: str) -> dict:
    """A user's message: the pictures stand before the question, unless it has marks for them itself."""
    text = question if IMAGE_MARK in question else join_parts([None] * len(images) + [question])
    return {"role": "user", "content": text, "images": images}


def take_pictures(messages: list[dict]) -> list[Image.Image]:
    """The pictures of a conversation; raises UserError where a message has more marks than pictures, or fewer."""
    for number, message in enumerate(messages, start=1):
        marks, images = message["content"].count(IMAGE_MARK), message.get("images", [])
        if marks and message["role"] not in ("user", "assistant"):
            raise UserError(f"message {number}, by {message['role']}: {IMAGE_MARK} is in it; only users show pictures")
        if marks != len(images) and message["role"] == "user":
            raise UserError(
                f"message {number}: {marks} {IMAGE_MARK} in the text, {len(images)} pictures. Write one for each, "
                "where it is to be shown, or none: all then stand before the text."
            )
    return [image for message in messages for image in message.get("images", [])]


def encode_prompts(
    processor, conversations: list[list[dict]], tools: list[dict] | None = None, **template_kwargs
) -> BatchFeature:
    """The prompts of several conversations, padded on the left, and their pictures; see `template.encode_prompt`.

    Returns:
        `input_ids` and `attention_mask` of shape (conversations, tokens), in which a picture is as many image tokens as
        the model sees of it; where there are pictures, `pixel_values` (pictures, 3, height, width), in their order.

    Raises:
        UserError: marks and pictures don't match, or the chat template doesn't put each picture into the prompt once.
    """
    pictures = [take_pictures(messages) for messages in conversations]
    pixels, image_tokens = prepare_pictures(processor) if any(pictures) else (None, 0)
    prompts, marks = [], {"user": processor.image_token}
    for messages, images in zip(conversations, pictures, strict=True):
        texts = [
            {key: value for key, value in message.items() if key != "images"}
            | {"content": message["content"].replace(IMAGE_MARK, marks.get(message["role"], SPELLED_MARK))}
            for message in messages
        ]
        ids = encode_prompt(texts, processor.tokenizer, tools, **template_kwargs)
        if ids.count(processor.image_token_id) != len(images):
            found = ids.count(processor.image_token_id)
            raise UserError(f"the chat template puts {found} of {len(images)} pictures into the prompt")
        prompts.append([t for i in ids for t in [i] * (image_tokens if i == processor.image_token_id else 1)])
    inputs = processor.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    if any(pictures):
        inputs["pixel_values"] = pixels.from_images(sum(pictures, []))
    return BatchFeature(inputs)
