"""A few scenes with captions, and a tiny model with random weights that tells their pictures apart."""

import json
import random
from pathlib import Path

from infer import load_trained_model
from scenes import NAMES, TEMPLATES, change, describe, draw_scene, split_scenes
from search import SearchIndex
from tiny import build_tiny_model

SCENES = split_scenes(0)[0]


def draw_gallery(folder: Path, count: int = 12) -> list[str]:
    """Draws scenes into `folder`/images, with a table; returns their captions, all different."""
    (folder / "images").mkdir(parents=True)
    captions, rng = [], random.Random(0)
    with open(folder / "gallery.jsonl", "w", encoding="utf-8") as table:
        for number, scene in enumerate(SCENES[:count]):
            draw_scene(scene, rng).save(folder / f"images/{number:03}.png")
            captions.append(describe(scene, TEMPLATES[number % len(TEMPLATES)]))
            row = {"image": f"images/{number:03}.png", "text": captions[-1], "kind": NAMES[1]}
            row["choices"] = [describe(other, TEMPLATES[0]) for other in change(scene, NAMES[1])]
            table.write(json.dumps(row, ensure_ascii=False) + "\n")
    return captions


def build_model(folder: Path):
    """The parity tests' small ViT beside a small BERT, as `load_trained_model` gives it."""
    build_tiny_model([describe(scene, template) for scene in SCENES for template in TEMPLATES], str(folder), "vit")
    return load_trained_model(str(folder))


def open_index(path: Path, loaded, **settings) -> SearchIndex:
    return SearchIndex(str(path), *loaded, "tiny", **settings)
