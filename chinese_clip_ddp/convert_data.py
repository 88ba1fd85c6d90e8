"""Converts pairs between the forms that this recipe reads; pictures keep their bytes, equal ones are written once.

    python convert_data.py my_pairs my_tars --to tar                    00000.tar, 00001.tar, ...: pictures beside .json
    python convert_data.py my_tars my_folder --to jsonl                 data.jsonl and images/
    python convert_data.py my_folder my_tables --to chinese-clip        data_imgs.tsv and data_texts.jsonl
    python convert_data.py my_parquet my_folder --to jsonl              also Parquet of a hub, with pictures inside

What is bad is named by `file:line` and stops it, or is left out by --skip_bad_rows. Output appears when it is whole.
"""

import argparse
import base64
import io
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
from PIL import Image

from files import UserError, list_files
from images import FORMATS, Reference, check_images, read_image_bytes
from rows import IMAGE_KEYS, find_files, identify_files, read_rows

ENDINGS = {"JPEG": "jpg", "TIFF": "tif"}  # else the format's name in small letters
EXTRAS = ("group", "kind", "choices")
PAIRS_OF_A_TAR = 10_000


def unpack_parquet(path: str, folder: str) -> None:
    """Writes the pictures that stand in Parquet, as hubs have them ({"bytes", "path"}), as files beside a table."""
    os.makedirs(f"{folder}/images")
    number = 0
    with open(f"{folder}/data.jsonl", "w", encoding="utf-8") as table:
        for file in list_files(path):
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=100):
                for record in batch.to_pylist():
                    key = next((name for name in IMAGE_KEYS if isinstance(record.get(name), dict)), None)
                    if key is None or not record[key].get("bytes"):
                        raise UserError(f"{file}: no picture inside under {', '.join(IMAGE_KEYS)}")
                    name = f"images/{number:09}.{find_ending(record[key]['bytes'])}"
                    Path(folder, name).write_bytes(record[key]["bytes"])
                    print(json.dumps(record | {key: name}, ensure_ascii=False, default=str), file=table)
                    number += 1


def has_pictures_inside(path: str) -> bool:
    """Whether the path is of Parquet files with a column of pictures."""
    files = list_files(path) if find_files(path).tables else []
    parquet = [file for file in files if file.lower().endswith(".parquet")]
    schema = pyarrow.parquet.ParquetFile(parquet[0]).schema_arrow if parquet else []
    return any(field.name in IMAGE_KEYS and pyarrow.types.is_struct(field.type) for field in schema)


def find_ending(data: bytes) -> str:
    """The ending of a picture's file by its content, whatever it was called; "bin" where it is none."""
    try:
        kind = Image.open(io.BytesIO(data), formats=FORMATS).format
    except Exception:  # as in `load_image`; `check_images` will say why
        return "bin"
    return ENDINGS.get(kind, kind.lower()).replace("mpo", "jpg")


def read_pairs(path: str, language: str, skip_bad_rows: bool) -> tuple[list[dict], list[str]]:
    """The good rows of `read_rows`, with their picture's `sha256`, and `file:line: reason` of the bad ones.

    Raises:
        UserError: there are bad rows, and they were not to be skipped; or no good one.
    """
    files = find_files(path)
    rows = list(read_rows(files, identify_files(files)[0], language))
    references = list(dict.fromkeys(place_of(row) for row in rows if not row["error"]))
    verdicts = dict(zip(references, check_images(references), strict=True))
    good, bad = [], []
    for row in rows:
        verdict = None if row["error"] else verdicts[place_of(row)]
        reason = row["error"] or (f"image {row['image']}: {verdict.reason}" if verdict.reason else "")
        if reason:
            bad.append(f"{row['source']}: {reason}")
        else:
            good.append(row | {"sha256": verdict.sha256})
    if bad and not (skip_bad_rows and good):
        listed = "\n".join(f"  {line}" for line in bad[:10])
        raise UserError(f"{len(bad)} of {len(rows)} rows are bad; mend them, or go on by --skip_bad_rows:\n{listed}")
    return good, bad


def place_of(row: dict) -> Reference:
    return Reference(*(row[name] for name in Reference._fields))


def extras_of(row: dict) -> dict:
    return {name: row[name] for name in EXTRAS if row[name]}


def collect(rows: list[dict], *keys: str) -> Iterator[list[dict]]:
    """The rows that agree in these keys and in their extras, in the order of their first ones."""
    found = {}
    for row in rows:
        found.setdefault(json.dumps([*(row[key] for key in keys), extras_of(row)]), []).append(row)
    yield from found.values()


def write_jsonl(rows: list[dict], folder: Path) -> None:
    (folder / "images").mkdir()
    names = {}
    with (folder / "data.jsonl").open("w", encoding="utf-8") as table:
        for row in rows:
            if row["sha256"] not in names:
                data = read_image_bytes(*place_of(row))
                names[row["sha256"]] = f"images/{len(names):09}.{find_ending(data)}"
                (folder / names[row["sha256"]]).write_bytes(data)
            record = {"image": names[row["sha256"]], "text": row["text"]} | extras_of(row)
            print(json.dumps(record, ensure_ascii=False), file=table)


def write_chinese_clip(rows: list[dict], folder: Path) -> None:
    numbers = {}
    with (folder / "data_imgs.tsv").open("wb") as images:
        for row in rows:
            if row["sha256"] not in numbers:
                numbers[row["sha256"]] = len(numbers)
                images.write(b"%d\t%s\n" % (len(numbers) - 1, base64.b64encode(read_image_bytes(*place_of(row)))))
    with (folder / "data_texts.jsonl").open("w", encoding="utf-8") as texts:
        for number, equal in enumerate(collect(rows, "text")):
            image_ids = [numbers[row["sha256"]] for row in equal]
            record = {"text_id": number, "text": equal[0]["text"], "image_ids": image_ids} | extras_of(equal[0])
            print(json.dumps(record, ensure_ascii=False), file=texts)


def write_tars(rows: list[dict], folder: Path) -> None:
    samples = list(collect(rows, "sha256"))
    for start in range(0, len(samples), PAIRS_OF_A_TAR):
        with tarfile.open(folder / f"{start // PAIRS_OF_A_TAR:05}.tar", "w") as tar:
            for number, equal in enumerate(samples[start : start + PAIRS_OF_A_TAR], start):
                data = read_image_bytes(*place_of(equal[0]))
                record = {"text": [row["text"] for row in equal]} | extras_of(equal[0])
                text = json.dumps(record, ensure_ascii=False).encode()
                for name, content in ((f"{number:09}.{find_ending(data)}", data), (f"{number:09}.json", text)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


WRITERS = {"jsonl": write_jsonl, "chinese-clip": write_chinese_clip, "tar": write_tars}


def convert(path: str, output: str, form: str, language: str = "zh", skip_bad_rows: bool = False) -> str:
    """Writes the pairs of a path to the folder `output`, which must not be there yet; returns what was done.

    Raises:
        UserError: see `read_pairs`.
    """
    if os.path.exists(output):
        raise UserError(f"{output} is there already; name another folder.")
    parent = Path(output).resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as scratch:
        if has_pictures_inside(path):
            unpack_parquet(path, f"{scratch}/unpacked")
            path = f"{scratch}/unpacked"
        rows, bad = read_pairs(path, language, skip_bad_rows)
        whole = Path(scratch, "whole")
        whole.mkdir()
        WRITERS[form](rows, whole)
        os.rename(whole, output)
    images = len({row["sha256"] for row in rows})
    left_out = "".join(f"\n  {line}" for line in bad[:10])
    unused = sorted({key for row in rows for key in json.loads(row["unused_keys"])})
    keys = f"; keys that are not carried over: {', '.join(unused)}" if unused else ""
    counts = f"{len(rows):,} pairs of {images:,} different images{keys}; {len(bad):,} bad rows left out"
    return f"{output}: {counts}{left_out}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="a table, a tar, or a folder")
    parser.add_argument("output", help="the folder to write")
    parser.add_argument("--to", choices=WRITERS, required=True)
    parser.add_argument(
        "--language", choices=("zh", "en"), default="zh", help="zh_prompt or prompt, where both are there"
    )
    parser.add_argument("--skip_bad_rows", action="store_true")
    flags = parser.parse_args()
    try:
        print(convert(flags.input, flags.output, flags.to, flags.language, flags.skip_bad_rows))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
