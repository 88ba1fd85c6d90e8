"""Tiny encoders and small tables of reviews."""

import csv
import os
import random
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parent.parent
sys.path.insert(0, str(RECIPE))
os.environ.setdefault("OMP_NUM_THREADS", "1")

WORDS = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳"
TELLING = {"好评": "美妙欢喜", "差评": "丑陋愤怒", "中评": "平凡普通"}


def make_reviews(count: int, seed: int = 0, labels: tuple[str, ...] = ("好评", "差评")) -> list[tuple[str, str]]:
    """(text, label): 5 to 60 characters, two of which tell the label."""
    rng, rows = random.Random(seed), []
    for index in range(count):
        label = labels[index % len(labels)]
        text = rng.choices(WORDS, k=rng.randint(3, 58)) + rng.choices(TELLING[label], k=2)
        rng.shuffle(text)
        rows.append(("".join(text), label))
    return rows


def write_table(path: Path, rows: list[tuple[str, str]], header: tuple[str, ...] = ("text", "label")) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def save_model(config, tokenizer, folder: Path, has_head: bool) -> str:
    """A model as a hub has it, with random weights: an encoder that was pre-trained only, or a classifier."""
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification

    torch.manual_seed(0)
    (AutoModelForSequenceClassification if has_head else AutoModel).from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session", name="tokenizer")
def review_tokenizer():
    from tiny import train_tokenizer

    return train_tokenizer([text for text, _ in make_reviews(200, labels=tuple(TELLING))], vocab_size=100)


@pytest.fixture(scope="session")
def bert_config(tokenizer):
    """A Bert of two layers, without dropout, for good and bad reviews."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=64,
        id2label={0: "好评", 1: "差评"},
        label2id={"好评": 0, "差评": 1},
    )


@pytest.fixture(scope="session")
def encoder_folder(bert_config, tokenizer, tmp_path_factory) -> str:
    return save_model(bert_config, tokenizer, tmp_path_factory.mktemp("encoder"), has_head=False)


@pytest.fixture(scope="session")
def classifier_folder(bert_config, tokenizer, tmp_path_factory) -> str:
    return save_model(bert_config, tokenizer, tmp_path_factory.mktemp("classifier"), has_head=True)


@pytest.fixture(scope="session")
def telling_folder(bert_config, tokenizer, tmp_path_factory) -> str:
    """A Bert that was trained on 320 reviews until it knew good ones from bad ones."""
    import torch
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    model, folder = BertForSequenceClassification(bert_config), tmp_path_factory.mktemp("telling")
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    rows = make_reviews(320, seed=8)
    for start in [*range(0, 320, 32)] * 4:
        texts, labels = zip(*rows[start : start + 32], strict=True)
        numbers = torch.tensor([bert_config.label2id[label] for label in labels])
        model(**tokenizer(list(texts), padding=True, return_tensors="pt"), labels=numbers).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> str:
    """The embedded default, built from 200 reviews but not trained."""
    from tiny import build_tiny_model

    folder = str(tmp_path_factory.mktemp("tiny"))
    build_tiny_model([text for text, _ in make_reviews(200)], {0: "差评", 1: "好评"}, folder)
    return folder


@pytest.fixture(scope="session", name="data_file")
def review_table(tmp_path_factory) -> str:
    """25 training rows: with 8 rows a step the last ones have few, so that a rank may have none."""
    return write_table(tmp_path_factory.mktemp("data") / "train.csv", make_reviews(25))


@pytest.fixture(scope="session", name="eval_file")
def validation_table(tmp_path_factory) -> str:
    """A single validation row, so that a second rank has none."""
    return write_table(tmp_path_factory.mktemp("data") / "eval.csv", make_reviews(1, seed=1))
