"""A tiny model and a handful of pairs."""

import json
import random
import sys
from pathlib import Path

import pytest
from ranks import RECIPE  # which sets the number of threads before torch is imported

sys.path.insert(0, str(RECIPE))

WORDS = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳"


def make_pairs(count: int, seed: int = 0) -> list[dict]:
    """Pairs of short texts; every third has an exchange before it, the replies of every fourth begin alike."""
    rng = random.Random(seed)

    def say():
        return "".join(rng.choices(WORDS, k=rng.randint(5, 40)))

    rows = []
    for index in range(count):
        history = (
            [{"role": "user", "content": say()}, {"role": "assistant", "content": say()}] if index % 3 == 0 else []
        )
        beginning = say() if index % 4 == 0 else ""
        prompt = [*history, {"role": "user", "content": say()}]
        rows.append({"prompt": prompt, "chosen": beginning + say(), "rejected": beginning + say()})
    return rows


def write_rows(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> str:
    """A saved tiny Llama in Baichuan2's layout."""
    from tiny import build_tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_model([row["chosen"] for row in make_pairs(50)], str(folder), vocab_size=320, hidden_size=64)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(tiny_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> str:
    """21 training pairs: with 8 pairs a step the last step has too few for every batch of two ranks."""
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", make_pairs(21))
