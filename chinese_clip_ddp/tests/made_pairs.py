"""Generated pictures with captions, a tokenizer of a few characters, and what `load_splits` reads of the flags."""

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

CHARACTERS = "一二三四五六七八九十张图红绿蓝的箭头好0123456789"


def make_pictures(folder: Path, count: int, size: tuple[int, int] = (20, 16)) -> list[dict]:
    """`count` different pictures in a folder, and a row for each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png", compress_level=0)
    return [{"image": f"{number}.png", "text": f"图{number}"} for number in range(count)]


def write_table(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_tokenizer(folder: Path, model_max_length: int = 16):
    from transformers import BertTokenizerFast

    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS]))
    return BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=model_max_length)


def data_settings(data_path, **changed) -> SimpleNamespace:
    settings = {"data_path": str(data_path), "eval_data_path": None, "validation_split": 0.0, "max_seq_length": None}
    settings |= {"language": "zh", "skip_bad_rows": False, "data_size": None, "image_cache_gb": 1.0}
    return SimpleNamespace(**settings | changed)


def write_tar(path, members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return path.read_bytes()
