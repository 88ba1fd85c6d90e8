"""A tiny model and a handful of conversations."""

import json
import random
import sys
from pathlib import Path

import pytest
from ranks import RECIPE  # which sets the number of threads before torch is imported

sys.path.insert(0, str(RECIPE))

WORDS = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳"


def make_conversations(count: int, seed: int = 0) -> list[dict]:
    """Conversations of 1 to 3 exchanges and 5 to 60 characters a message; every third has a system message."""
    rng = random.Random(seed)

    def say():
        return "".join(rng.choices(WORDS, k=rng.randint(5, 60)))

    rows = []
    for index in range(count):
        messages = [{"role": "system", "content": say()}] if index % 3 == 0 else []
        for _ in range(rng.randint(1, 3)):
            messages += [{"role": "user", "content": say()}, {"role": "assistant", "content": say()}]
        rows.append({"messages": messages})
    return rows


def write_rows(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> str:
    """A saved tiny BLOOM with its tokenizer."""
    from tiny import build_tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_model(
        [message["content"] for row in make_conversations(50) for message in row["messages"]],
        str(folder),
        hidden_size=64,
    )
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(tiny_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> str:
    """25 training rows: with 8 rows a step the last step has a single one, so that a second rank has none."""
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", make_conversations(25))


@pytest.fixture(scope="session")
def eval_file(tmp_path_factory) -> str:
    """A single validation row, so that a second rank has none."""
    return write_rows(tmp_path_factory.mktemp("data") / "eval.jsonl", make_conversations(1, seed=1))
