"""Generated pictures of coloured forms, and what is said of them: the part of the default data whose truth is known.

A scene is a tuple of five words, (colour, form, size, count, place): 8 x 5 x 2 x 4 x 5 = 1,600 of them. A tenth is
held out, pictures and captions alike, so that what is measured on them is whether the five were learnt one by one.
Whether an attribute was learnt is asked by minimal pairs (Winoground, https://arxiv.org/abs/2204.03162): the true
caption against captions with that one attribute changed. Recall among random scenes doesn't tell, since a model that
sees no form at all still finds 9 of 10.
"""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import itertools
import math
import random

from PIL import Image, ImageDraw

ATTRIBUTES = {
    "colour": {
        "红": (220, 40, 40),
        "橙": (250, 140, 30),
        "黄": (240, 210, 40),
        "绿": (40, 170, 60),
        "蓝": (50, 80, 220),
        "紫": (150, 60, 190),
        "粉": (250, 150, 190),
        "黑": (30, 30, 30),
    },
    "form": {"圆形": "circle", "方块": "square", "三角形": "triangle", "十字": "cross", "五角星": "star"},
    "size": {"大": 0.14, "小": 0.092},  # radius as a share of the picture's side
    "count": {"一": 1, "两": 2, "三": 3, "四": 4},
    "place": {"左边": (0.29, 0.5), "右边": (0.71, 0.5), "上面": (0.5, 0.29), "下面": (0.5, 0.71), "中间": (0.5, 0.5)},
}
NAMES = list(ATTRIBUTES)
TEMPLATES = (
    "{place}有{count}个{size}的{colour}色{form}",
    "图的{place}是{count}个{colour}色的{size}{form}",
    "{count}个{size}{colour}色{form}在{place}",
    "{place}画着{count}个{size}{colour}{form}",
)
# Where the forms of a cluster stand, in units of 1.12 radii.
CLUSTERS = {
    1: [(0, 0)],
    2: [(-1, 0), (1, 0)],
    3: [(-1, 0.9), (1, 0.9), (0, -0.9)],
    4: [(-1, -1), (1, -1), (-1, 1), (1, 1)],
}
Scene = tuple[str, str, str, str, str]


def split_scenes(seed: int, fold: int = 0) -> tuple[list[Scene], list[Scene]]:
    """All scenes in two lists: to train on, and the held-out tenth; each `fold` (0 to 9) holds out another tenth."""
    scenes = list(itertools.product(*ATTRIBUTES.values()))
    random.Random(seed).shuffle(scenes)
    size = len(scenes) // 10
    start = fold * size
    return scenes[:start] + scenes[start + size :], scenes[start : start + size]


def change(scene: Scene, name: str) -> list[Scene]:
    """The scene with each other value of one attribute."""
    place = NAMES.index(name)
    return [scene[:place] + (value,) + scene[place + 1 :] for value in ATTRIBUTES[name] if value != scene[place]]


def describe(scene: Scene, template: str) -> str:
    return template.format(**dict(zip(NAMES, scene, strict=True)))


def draw_family(scenes: list[Scene], weights: dict[str, int], rng: random.Random) -> tuple[str, list[Scene]]:
    """An attribute, drawn by its weight, and up to four of `scenes` that differ in it alone."""
    first, allowed = rng.choice(scenes), set(scenes)
    name = rng.choices(NAMES, [weights[name] for name in NAMES])[0]
    others = [scene for scene in change(first, name) if scene in allowed]
    return name, [first, *rng.sample(others, min(3, len(others)))]


def draw_form(draw: ImageDraw.ImageDraw, form: str, x: float, y: float, radius: float, colour: tuple) -> None:
    if form == "circle":
        draw.circle((x, y), radius, fill=colour)
    elif form == "square":
        draw.rectangle([x - radius * 0.9, y - radius * 0.9, x + radius * 0.9, y + radius * 0.9], fill=colour)
    elif form == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius * 0.85), (x + radius, y + radius * 0.85)], fill=colour)
    elif form == "cross":
        half = radius * 0.32
        draw.rectangle([x - radius, y - half, x + radius, y + half], fill=colour)
        draw.rectangle([x - half, y - radius, x + half, y + radius], fill=colour)
    else:  # a star: ten corners, outer and inner ones by turns
        reach = [radius * (0.45 if corner % 2 else 1.15) for corner in range(10)]
        angles = [math.pi * (corner / 5 - 0.5) for corner in range(10)]
        draw.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(reach, angles, strict=True)], colour)


def draw_scene(scene: Scene, rng: random.Random, side: int = 64) -> Image.Image:
    """A picture of side x side pixels; background, shade, radius and positions vary, none as far as another value."""
    colour, form, size, count, place = (ATTRIBUTES[name][value] for name, value in zip(NAMES, scene, strict=True))
    width = 2 * side  # drawn at twice the size, since PIL draws hard edges
    image = Image.new("RGB", (width, width), tuple(rng.randint(225, 255) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    shade = tuple(min(255, max(0, value + rng.randint(-15, 15))) for value in colour)
    radius = width * size * rng.uniform(0.93, 1.07)
    upright = count in (2, 3) and rng.random() < 0.5
    offsets = [offset[::-1] if upright else offset for offset in CLUSTERS[count]]
    margins = [radius * (1.12 * max(map(abs, along)) + 1.25) for along in zip(*offsets, strict=True)]
    centre = [width * (value + rng.uniform(-0.03, 0.03)) for value in place]
    centre = [min(max(c, margin), width - margin) for c, margin in zip(centre, margins, strict=True)]  # nothing is cut
    for offset in offsets:
        x, y = (c + radius * (1.12 * o + rng.uniform(-0.08, 0.08)) for c, o in zip(centre, offset, strict=True))
        draw_form(draw, form, x, y, radius, shade)
    return image.resize((side, side), Image.Resampling.BILINEAR)
