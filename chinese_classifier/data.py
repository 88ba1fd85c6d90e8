"""Rows of text -> token ids and the number of their class, tokenised once and cached by content."""

import copy
import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from filelock import FileLock

IGNORE_INDEX = -100
CACHE_DIR = Path(__file__).parent / "cache_data"


def hash_tokenizer(tokenizer) -> str:
    """A hash of all that the tokenizer would save, whatever its class."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            digest.update(file.name.encode() + file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()


def hash_table(table: pd.DataFrame) -> str:
    """A hash of the texts and labels in their order."""
    return hashlib.sha256(json.dumps([table.text.tolist(), table.label.tolist()]).encode()).hexdigest()


def tokenize(texts: list[str], tokenizer) -> tuple[dict, list[bool]]:
    """What the tokenizer makes of the texts, cut at the end at its `model_max_length`; and which were cut."""
    encoded, limit = tokenizer(texts, truncation=True), tokenizer.model_max_length
    cut = [
        len(ids) == limit and len(tokenizer(text, verbose=False)["input_ids"]) > limit
        for text, ids in zip(texts, encoded["input_ids"], strict=True)
    ]
    return encoded, cut


def encode_texts(batch: dict, tokenizer, label2id: dict[str, int]) -> dict:
    """`tokenize`, with `labels`, `length` in tokens and `cut`."""
    encoded, cut = tokenize(batch["text"], tokenizer)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    return {**encoded, "labels": [label2id[label] for label in batch["label"]], "length": lengths, "cut": cut}


def encode_table(table: pd.DataFrame, label2id: dict[str, int], tokenizer) -> Dataset:
    """The rows of `encode_texts` in the order of the table: the first process to come makes them, the others read them.

    Rows live in a memory-mapped Arrow file. Its name is a hash of all that decides what is in it.
    """
    content = [hash_table(table), hash_tokenizer(tokenizer), label2id, Path(__file__).read_text("utf-8")]
    name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    CACHE_DIR.mkdir(exist_ok=True)
    with FileLock(CACHE_DIR / f"{name}.lock"):
        return Dataset.from_pandas(table[["text", "label"]], preserve_index=False).map(
            encode_texts,
            batched=True,
            fn_kwargs={"tokenizer": copy.deepcopy(tokenizer), "label2id": label2id},  # cutting texts changes it
            remove_columns=["text", "label"],
            num_proc=min(os.cpu_count(), len(table) // 50_000) or None,
            cache_file_name=str(CACHE_DIR / f"{name}.arrow"),
            new_fingerprint=name,
            desc="tokenize",
        )


def column(rows: Dataset, name: str) -> np.ndarray:
    """One column of a dataset as an array of shape (rows,)."""
    return rows.with_format("numpy")[name][:]
