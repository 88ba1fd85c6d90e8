"""A tiny model and a handful of pairs."""

import random
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw
from ranks import RECIPE  # which sets the number of threads before torch is imported

sys.path.insert(0, str(RECIPE))

from made_pairs import write_table  # noqa: E402

COLOURS = {"红": "red", "绿": "green", "蓝": "blue", "黄": "gold", "黑": "black"}


def draw_pairs(folder, count: int, seed: int = 0) -> list[dict]:
    """`count` pictures of a coloured bar, of which the caption says colour and place; a caption may come twice."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        colour, place = rng.choice(list(COLOURS)), rng.randrange(4)
        noise = np.random.default_rng([seed, number]).integers(200, 256, (64, 64, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        ImageDraw.Draw(image).rectangle([16 * place, 10, 16 * place + 9, 50], fill=COLOURS[colour])
        image.save(folder / f"{number}.png")
        rows.append(
            {"image": f"{folder.name}/{number}.png", "text": f"第{place}条是{colour}色" + "的" * rng.randrange(2)}
        )
    return rows


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> str:
    """25 pairs: with 8 pairs a step the last step has a single one, so that one of two ranks has none."""
    folder = tmp_path_factory.mktemp("pairs")
    return write_table(folder / "train.jsonl", draw_pairs(folder / "images", 25))


@pytest.fixture(scope="session")
def eval_file(tmp_path_factory) -> str:
    """A gallery "held_out" of 12 pairs, three of them with wrong captions to choose from."""
    folder = tmp_path_factory.mktemp("gallery")
    rows = draw_pairs(folder / "images", 12, seed=1)
    rows = [row | {"choices": ["第9条是红色"], "kind": "place"} if n < 3 else row for n, row in enumerate(rows)]
    return write_table(folder / "held_out.jsonl", rows)


def build_folder(folder, tower: str) -> str:
    from tiny import build_tiny_model

    build_tiny_model(["".join(COLOURS) + "第条是色的0123456789"], str(folder), tower)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> str:
    """A saved dual encoder whose vision tower is a ViT: without batch norms, a batch gives what its parts give."""
    return build_folder(tmp_path_factory.mktemp("tiny"), "vit")


@pytest.fixture(scope="session")
def levit_folder(tmp_path_factory) -> str:
    """The default's own kind, with batch norms."""
    return build_folder(tmp_path_factory.mktemp("levit"), "levit")


@pytest.fixture(scope="session")
def paths(tiny_folder, data_file, eval_file):
    """The flags of a run on these, into a folder."""

    def flags(output, model=tiny_folder) -> list[str]:
        model_and_data = ["--model_name_or_path", model, "--data_path", data_file, "--eval_data_path", eval_file]
        return [*model_and_data, "--output_dir", str(output), "--learning_rate", "1e-3", "--logging_steps", "1"]

    return flags
