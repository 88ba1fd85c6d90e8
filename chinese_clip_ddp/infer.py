"""Embeds images and captions with a trained model, and tells what is on an image.

    python infer.py output --image my.png --labels 猫 狗 鸟                              which label fits best
    python infer.py output --image my.png --labels 猫 狗 鸟 --templates templates.txt    each put into sentences

The way of an image: load_image (upright, RGB) -> Pixels (resized as in training) -> embed_images -> a unit vector; of a
caption: tokenizer -> embed_texts -> a unit vector. Their cosine says how well they fit.
"""

import argparse
import re
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from PIL import Image

from batch import Pixels
from files import UserError, detect_encoding
from images import load_image, read_image_bytes
from model import count_positions, embed_images, embed_texts, load_model, load_processors

BATCH_SIZE = 64


def hide_progress_bars() -> None:
    """Of Transformers and datasets, in commands that say what they have to say themselves."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def check_model_path(path: str) -> None:
    """Raises UserError where `path` is neither a folder with a model nor the form of a hub id."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            checkpoints = ", ".join(map(str, sorted(folder.glob("checkpoint-*")))) or "none"
            raise UserError(
                f"{path}: config.json is not in this folder. The training writes it when it ends; its checkpoints: "
                f"{checkpoints}."
            )
    elif folder.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise UserError(
            f"{path}: there is no such folder. Train first (bash train_ddp_text_image.sh), or give the folder of a "
            "model, or a hub id (owner/name)."
        )


def load_trained_model(path: str):
    """A trained model in eval mode, fp32, on the GPU where there is one.

    Args:
        path: folder of a dual encoder, a CLIP, Chinese-CLIP or SigLIP, or a hub id.

    Returns:
        model, tokenizer, image_processor.

    Raises:
        UserError: there is no such model.
    """
    check_model_path(path)
    tokenizer, image_processor = load_processors(path)
    model = load_model(path)
    tokenizer.model_max_length = min(tokenizer.model_max_length, count_positions(model.config.text_config))
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, image_processor


@torch.no_grad()
def embed_token_ids(model, tokenizer, captions: list[list[int]], batch_size: int = BATCH_SIZE) -> torch.Tensor:
    """Unit vectors of captions that are tokenised already, special tokens included: (captions, d), fp32.

    Captions of like length go together, so that hardly anything is padding.
    """
    order = sorted(range(len(captions)), key=lambda index: -len(captions[index]))
    parts = []
    for start in range(0, len(order), batch_size):
        ids = [captions[index] for index in order[start : start + batch_size]]
        batch = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt").to(model.device)
        parts.append(embed_texts(model, batch["input_ids"], batch["attention_mask"]).float())
    return torch.cat(parts)[torch.tensor(order).argsort().to(model.device)]


def embed_captions(model, tokenizer, captions: list[str], batch_size: int = BATCH_SIZE) -> torch.Tensor:
    """Unit vectors of captions, (captions, d); one longer than the model takes is cut as in training."""
    return embed_token_ids(model, tokenizer, tokenizer(captions, truncation=True)["input_ids"], batch_size)


@torch.no_grad()
def embed_pixels(model, pixels: Pixels, values: np.ndarray) -> torch.Tensor:
    """Unit vectors of what `Pixels` gives, uint8 (images, 3, height, width) -> (images, d), fp32."""
    return embed_images(model, pixels.normalise(values).to(model.device)).float()


def embed_pictures(model, pixels: Pixels, pictures: list[Image.Image], batch_size: int = BATCH_SIZE) -> torch.Tensor:
    """Unit vectors of what `load_image` gives, (pictures, d), fp32."""
    parts = [pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size)]
    return torch.cat([embed_pixels(model, pixels, np.stack(list(map(pixels.from_image, part)))) for part in parts])


def zero_shot(
    model, tokenizer, image_embeds: torch.Tensor, class_names: list[str], templates: list[str]
) -> torch.Tensor:
    """Cosine of each image and each class, (images, classes).

    A class is the mean of the unit vectors of its name in each template, scaled to a unit vector again.
    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), 3.1.4.

    Args:
        image_embeds: (images, d), normalised.
        templates: sentences in which {} stands for the name.
    """
    sentences = [template.replace("{}", name) for name in class_names for template in templates]
    embeds = embed_captions(model, tokenizer, sentences).unflatten(0, (len(class_names), len(templates)))
    return image_embeds @ torch.nn.functional.normalize(embeds.mean(1), dim=-1).T


def probabilities(model, scores: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension of cosines at the temperature that the model has learnt."""
    return (scores * model.logit_scale.detach().float().exp()).softmax(-1)


def read_lines(path: str) -> list[tuple[int, str]]:
    """(number, text) of the lines of a text file that aren't empty; raises UserError where there is none."""
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file.")
    lines = Path(path).read_text(encoding=detect_encoding(path)[0]).splitlines()
    lines = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not lines:
        raise UserError(f"{path}: there is nothing in it; it takes one entry a line.")
    return lines


def read_templates(path: str | None) -> list[str]:
    """The sentences of a file of templates; the name alone where there is none.

    Raises:
        UserError: a line has no {}, or more than one.
    """
    lines = read_lines(path) if path else [(1, "{}")]
    for number, line in lines:
        if line.count("{}") != 1:
            raise UserError(f"{path}:{number}: {{}} must stand in a template once, for the name of the class.")
    return [line for _, line in lines]


def open_picture(path: str) -> Image.Image:
    """The picture in a file; raises UserError, with the file, where it is none."""
    try:
        return load_image(read_image_bytes(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a trained model, or a hub id")
    parser.add_argument("--image", required=True, help="file of the image")
    parser.add_argument("--labels", required=True, nargs="+", help="what may be on it, in words")
    parser.add_argument("--templates", help="file of sentences, one a line, in which {} stands for a label")
    args = parser.parse_args(argv)
    hide_progress_bars()
    try:
        templates, picture = read_templates(args.templates), open_picture(args.image)
        model, tokenizer, image_processor = load_trained_model(args.model)
        image_embeds = embed_pictures(model, Pixels(image_processor), [picture])
        scores = zero_shot(model, tokenizer, image_embeds, args.labels, templates)[0]
    except UserError as error:
        sys.exit(f"error: {error}")
    print("probability  cosine  label")
    shares = probabilities(model, scores)
    for index in scores.argsort(descending=True).tolist():
        print(f"{shares[index]:11.4f} {scores[index]:7.3f}  {args.labels[index]}")


if __name__ == "__main__":
    main()
