"""A tiny tokenizer, a prepared folder of a handful of documents, and flags for a tiny model."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
from ranks import RECIPE  # which sets the number of threads before torch is imported

sys.path.insert(0, str(RECIPE))

WORDS = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳"

# Of train.py: a model that takes a few milliseconds a step, and a loss at each of them.
TINY = "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 4 --intermediate_size 64 --model_max_length 24"
STEPS = "--learning_rate 3e-3 --lr_scheduler_type constant --warmup_steps 0 --logging_steps 1 --save_strategy no"


def make_texts(count: int, seed: int) -> list[str]:
    """Texts of 5 to 60 characters, in which a character is often followed by the next one of WORDS."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        place, text = rng.randrange(len(WORDS)), ""
        for _ in range(rng.randint(5, 60)):
            place = (place + 1) % len(WORDS) if rng.random() < 0.7 else rng.randrange(len(WORDS))
            text += WORDS[place]
        texts.append(text)
    return texts


def build_tokenizer(folder: Path, characters: str = WORDS):
    """Saves a fast tokenizer with a token for each character, `</s>` at the end of a text, and no byte fallback."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "<s>", "</s>", *dict.fromkeys(characters)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(folder)
    return fast


def write_split(folder: Path, sources: dict[str, list[str]], tokenizer, tokenizer_hash: str) -> None:
    from data import ShardWriter, write_manifest

    folder.mkdir(parents=True)
    writers = []
    for source, texts in sources.items():
        writer = ShardWriter(folder, source, "uint16", tokenizer.eos_token_id, shard_tokens=400)
        for text in texts:
            ids = np.array([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
            writer.add(ids, np.array([len(ids)]), len(text), len(text.encode()))
        writers.append(writer)
    write_manifest(folder, writers, "uint16", tokenizer.eos_token_id, len(tokenizer), tokenizer_hash)


def prepare_texts(folder: Path, train: dict[str, list[str]], validation: dict[str, list[str]]) -> str:
    """A folder as prepare.py writes it."""
    from data import hash_file

    tokenizer = build_tokenizer(folder / "tokenizer")
    tokenizer_hash = hash_file(folder / "tokenizer" / "tokenizer.json")
    write_split(folder / "train", train, tokenizer, tokenizer_hash)
    write_split(folder / "validation", validation, tokenizer, tokenizer_hash)
    return str(folder)


TRAIN = {"news": make_texts(24, 0), "idioms": make_texts(12, 1)}
VALIDATION = {"news": make_texts(5, 2), "idioms": make_texts(3, 3)}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> str:
    """1,200 tokens: 53 rows of 24, so that with 8 rows a step the last step of an epoch leaves a second rank none."""
    return prepare_texts(tmp_path_factory.mktemp("corpus") / "my_prepared", TRAIN, VALIDATION)


@pytest.fixture(scope="session")
def tokenizer(prepared):
    from infer import read_tokenizer

    return read_tokenizer(f"{prepared}/tokenizer")


@pytest.fixture(scope="session")
def scratch_folder(prepared, tokenizer, tmp_path_factory) -> str:
    """A tiny Qwen3 with random weights, saved with its tokenizer: a checkpoint to go on with."""
    from types import SimpleNamespace

    from tiny import build_model

    folder = tmp_path_factory.mktemp("scratch")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model_args = {"config_name": "qwen3", "num_key_value_heads": 2, "tie_word_embeddings": False, "bigram_start": False}
    data_args = SimpleNamespace(data_path=prepared, mixture=None, model_max_length=64)
    build_model(SimpleNamespace(**sizes, **model_args), data_args, tokenizer, 0, folder)
    return str(folder)
