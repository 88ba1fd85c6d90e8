"""Asks a trained LLaVA about scenes that it never saw, and counts the answers that are right word for word.

    python evaluate_scenes.py output_zero2
    python evaluate_scenes.py output_zero2 --data_path my_eval --output my_results.json

Each question is a conversation of its own, answered greedily. Beside it the blind baseline: the same questions about
an even grey, which is what can be had by guessing well. A description is right if it names all five attributes rightly.
The emojis are those of the training: what is asked there is how many names were kept.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from PIL import Image
from transformers.utils.logging import disable_progress_bar

from data01_scenes import DESCRIBE, EMOJI_QUESTIONS, QUESTIONS, answer
from files import UserError
from infer import load_trained_model, reply_batch
from pretrain_tower import read_scenes
from prompt import ask_about, open_picture
from scenes import NAMES, TEMPLATES, describe
from tiny import SAMPLE_EVAL, SIDE

GREY = (240, 240, 240)


def ask(model, processor, pictures: list[Image.Image], questions: list[str], batch_size: int) -> list[str]:
    """The greedy reply to each question about its picture."""
    conversations = [[ask_about([picture], text)] for picture, text in zip(pictures, questions, strict=True)]
    replies = []
    for start in range(0, len(conversations), batch_size):
        part = conversations[start : start + batch_size]
        replies += reply_batch(model, processor, part, max_new_tokens=32, temperature=0)
    return replies


def share(replies: list[str], right: list) -> float:
    """How many replies are right, each by the one answer, or by one of several."""
    pairs = zip(replies, right, strict=True)
    return sum(reply == of if isinstance(of, str) else reply in of for reply, of in pairs) / len(replies)


def evaluate_scenes(model, processor, folder: str, batch_size: int = 64, seed: int = 0) -> dict[str, dict]:
    """{"seen": shares by attribute, "blind": the same of a grey picture}, both with their mean, and "description",
    "emoji" among what is seen.

    Args:
        folder: with scenes.txt, emojis.txt and images/, as data01_scenes.py writes it.
        seed: draws the wording of each question.
    """
    rng, results = random.Random(seed), {"seen": {}, "blind": {}}
    names, scenes = read_scenes(f"{folder}/scenes.txt")
    pictures = [open_picture(Path(folder, "images", name)) for name in names]
    for name in NAMES:
        questions = [rng.choice(QUESTIONS[name]) for _ in scenes]
        right = [answer(scene, name) for scene in scenes]
        results["seen"][name] = share(ask(model, processor, pictures, questions, batch_size), right)
        wordings = QUESTIONS[name]  # a grey picture is always the same: each wording is asked once
        grey = [Image.new("RGB", (SIDE, SIDE), GREY)] * len(wordings)
        said = dict(zip(wordings, ask(model, processor, grey, list(wordings), batch_size), strict=True))
        results["blind"][name] = share([said[question] for question in questions], right)
    for shares in results.values():
        shares["mean"] = sum(shares.values()) / len(NAMES)
    questions = [rng.choice(DESCRIBE) for _ in scenes]
    right = [{describe(scene, template) for template in TEMPLATES} for scene in scenes]
    results["seen"]["description"] = share(ask(model, processor, pictures, questions, batch_size), right)
    lines = Path(folder, "emojis.txt").read_text("utf-8").splitlines()
    names, right = zip(*(line.split("\t") for line in lines), strict=True)
    pictures = [open_picture(Path(folder, "images", name)) for name in names]
    questions = [rng.choice(EMOJI_QUESTIONS) for _ in names]
    results["seen"]["emoji"] = share(ask(model, processor, pictures, questions, batch_size), list(right))
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a trained model")
    parser.add_argument("--data_path", default=SAMPLE_EVAL, help="folder that data01_scenes.py has written")
    parser.add_argument("--batch_size", type=int, default=64, help="questions answered at a time")
    parser.add_argument("--output", metavar="FILE.json", help="write the shares there")
    flags = parser.parse_args(argv)
    disable_progress_bar()
    try:
        if not Path(flags.data_path, "scenes.txt").is_file():
            raise UserError(f"{flags.data_path}: holds no scenes.txt; python data01_scenes.py writes such a folder.")
        model, processor = load_trained_model(flags.model)
        results = evaluate_scenes(model, processor, flags.data_path, flags.batch_size)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{'right, word for word':24}{'seen':>8}{'blind':>8}")
    for name, value in results["seen"].items():
        blind = f"{results['blind'][name]:8.3f}" if name in results["blind"] else ""
        print(f"{name:24}{value:8.3f}{blind}")
    if flags.output:
        Path(flags.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
