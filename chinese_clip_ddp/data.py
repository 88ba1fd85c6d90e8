"""Checked pairs -> token ids of the captions, and numbers that say which pictures and captions are equal.

rows.read_rows -> images.check_images -> encode_rows (cached) -> load_splits (no picture in training and in validation)
"""

import hashlib
import json
import os
import re
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from filelock import FileLock

from files import ENDINGS
from images import CACHE_DIR, Reference, Verdict, check_images, read_stats
from rows import UserError, find_again, find_files, has_captions, identify_files, list_unread_files, read_rows

ROW_FEATURES = Features(
    {name: Value("string") for name in ("path", "coding", "image", "text", "group", "kind")}
    | {name: Value("int64") for name in ("offset", "size")}
    | {"choices": List(Value("string"))}
    | {name: Value("string") for name in ("unused_keys", "source", "error", "raw")}
)
PAIR_FEATURES = Features(
    ROW_FEATURES
    | {name: Value("int64") for name in ("image_id", "caption_id", "length", "row")}
    | {name: Value("bool") for name in ("cut", "animated")}
    | {"input_ids": List(Value("int32")), "key": Value("string")}
)
HELD_OUT = re.compile(r"(valid|validation|val|dev|test|eval)[\W_\d]")
SEEN = "_seen"  # a gallery whose name ends so measures training pairs: they stay where they are


def hash_of(*content) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def number_of(content: str) -> int:
    """64 bits of a content's SHA-256, as the int64 that tensors hold."""
    return int.from_bytes(bytes.fromhex(content)[:8], "big", signed=True)


def caption_number(text: str) -> int:
    """The same for captions that differ in white space and width only."""
    plain = "".join(unicodedata.normalize("NFKC", text).split())
    return number_of(hashlib.sha256(plain.encode()).hexdigest())


def hash_tokenizer(tokenizer) -> str:
    """A hash of all that the tokenizer would save, whatever its class."""
    digest = hashlib.sha256()
    tokenizer("")  # a fast one would save the truncation of its last call, too
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            digest.update(file.name.encode() + file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()


def hash_code(*names: str) -> str:
    return hash_of([Path(__file__).with_name(name).read_text("utf-8") for name in names])


def cached(name: str, build) -> Dataset:
    """The rows of that name: the first process to come calls `build(scratch folder)`, the others read its cache.

    Rows live in memory-mapped Arrow files. The name is a hash of all that decides what is in them.
    """
    folder = CACHE_DIR / name
    CACHE_DIR.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"), tempfile.TemporaryDirectory(dir=CACHE_DIR) as scratch:
        if not folder.exists():
            build(scratch).save_to_disk(f"{scratch}/whole")
            os.rename(f"{scratch}/whole", folder)
    return Dataset.load_from_disk(folder)


def generate(scratch: str, **arguments) -> Dataset:
    """The rows of `read_rows`; its UserError as it is."""
    try:
        return Dataset.from_generator(
            read_rows, features=ROW_FEATURES, gen_kwargs=arguments, cache_dir=scratch, fingerprint=Path(scratch).name
        )
    except DatasetGenerationError as error:
        raise error.__cause__ from None


def encode_texts(texts: list[str], tokenizer, max_length: int) -> tuple[list[list[int]], list[bool]]:
    """Token ids with the model's special tokens, at most `max_length` of them, and whether anything was cut off."""
    ids = tokenizer(texts, verbose=False)["input_ids"]
    cut = [len(one) > max_length for one in ids]
    shorter = iter([])
    if any(cut):
        too_long = [text for text, is_cut in zip(texts, cut, strict=True) if is_cut]
        shorter = iter(tokenizer(too_long, truncation=True, max_length=max_length)["input_ids"])
    return [next(shorter) if is_cut else one for one, is_cut in zip(ids, cut, strict=True)], cut


def encode_rows(rows: dict[str, list], numbers: list[int], tokenizer, max_length: int, verdicts: dict) -> dict:
    """A batch of rows of `read_rows`, by column, and their numbers -> pairs (`PAIR_FEATURES`), bad ones without ids."""
    rows = {**rows, "row": numbers, "input_ids": [], "length": [], "image_id": [], "caption_id": [], "key": []}
    found = [
        Verdict("", "", False) if error else verdicts[Reference(*place)]
        for error, *place in zip(*(rows[name] for name in ("error", *Reference._fields)), strict=True)
    ]
    rows["error"] = [
        error or (f"image {image}: {verdict.reason}" if verdict.reason else "")
        for error, image, verdict in zip(rows["error"], rows["image"], found, strict=True)
    ]
    rows["animated"] = [verdict.animated for verdict in found]
    ids, rows["cut"] = encode_texts(rows["text"], tokenizer, max_length)
    extras = zip(*(rows[name] for name in ("text", "group", "kind", "choices")), strict=True)
    for one, error, verdict, extra in zip(ids, rows["error"], found, extras, strict=True):
        rows["input_ids"].append([] if error else one)
        rows["length"].append(0 if error else len(one))
        rows["image_id"].append(0 if error else number_of(verdict.sha256))
        rows["caption_id"].append(0 if error else caption_number(extra[0]))
        rows["key"].append("" if error else hash_of(verdict.sha256, *extra))
    return rows


def refuse_mixed_parts(data_path: str, files: list[str]) -> None:
    """Raises UserError where a folder to train on holds the parts that others are to validate and test on, too."""
    names = [os.path.relpath(file, data_path) for file in files]
    held_out = [name for name in names if HELD_OUT.match(name.lower())]
    rest = [name for name in names if name.lower().startswith("train")]
    if held_out and rest:
        raise UserError(
            f"{data_path} holds {rest[0]} and {held_out[0]}, and all of it would be trained on. Give "
            f"--data_path {data_path}/{rest[0]} --eval_data_path {data_path}/{held_out[0]}"
        )


def load_rows(data_path: str, language: str) -> tuple[Dataset, str]:
    """All rows of a path, and the name of its cache; pictures that are missing are looked for again each time."""
    files = find_files(data_path)
    refuse_mixed_parts(data_path, [*files.tables, *files.tars])
    encodings, content = identify_files(files)
    name = hash_of(content, language, hash_code("files.py", "tars.py", "images.py", "rows.py", "data.py"))[:16]
    arguments = {"files": files, "encodings": encodings, "language": language}
    while True:
        rows = cached(f"rows-{name}", lambda scratch: generate(scratch, **arguments))
        bad = rows.select([number for number, error in enumerate(rows["error"][:]) if error])
        missing = [(row["image"], row["source"]) for row in bad.select_columns(["image", "source"]) if row["image"]]
        found = find_again(missing, files.root)
        gone = sorted(path for path in set(rows["path"][:]) - {""} if not os.path.isfile(path))
        if not found and not gone:
            return rows, name
        name = hash_of(name, found, gone)[:16]


def load_encoded(
    data_path: str, tokenizer, max_length: int, language: str = "zh", data_size: int | None = None
) -> tuple[Dataset, str]:
    """All pairs of a path, bad ones among them, their pictures checked; of the first `data_size` rows only if given.

    Returns:
        The pairs (`PAIR_FEATURES`), and a hash of what they are made of: pictures, captions, tokenizer, length.
    """
    rows, name = load_rows(data_path, language)
    rows = rows.select(range(min(len(rows), data_size or len(rows))))
    good = rows.select([number for number, error in enumerate(rows["error"][:]) if not error])
    places = [good[name][:] for name in Reference._fields]
    references = list(dict.fromkeys(Reference(*place) for place in zip(*places, strict=True)))
    made_of = [hash_tokenizer(tokenizer), max_length]

    def build(scratch: str) -> Dataset:
        verdicts = dict(zip(references, check_images(references), strict=True))
        return rows.map(
            encode_rows,
            batched=True,
            with_indices=True,
            fn_kwargs={"tokenizer": tokenizer, "max_length": max_length, "verdicts": verdicts},
            features=PAIR_FEATURES,
            new_fingerprint=Path(scratch).name,
            cache_file_name=f"{scratch}/pairs.arrow",
            desc="tokenize",
        )

    stats = sorted(read_stats(references).items())
    pairs = cached(f"pairs-{hash_of(name, len(rows), stats, made_of)[:16]}", build)
    return pairs, hash_of(pairs["key"][:], made_of)[:16]


# >>> bad-rows
def column(rows: Dataset, name: str) -> np.ndarray:
    """One column of a dataset as an array of shape (rows,)."""
    return rows.with_format("numpy")[name][:]


def count_rows(examples: Dataset) -> int:
    return len(np.unique(column(examples, "row")))


def take_out_bad_rows(rows: Dataset, skip_bad_rows: bool, report_to: str | None) -> tuple[Dataset, int]:
    """The good rows and the number of bad ones, which go to the file `report_to` with their reasons.

    Raises:
        UserError: there are bad rows and they were not to be skipped (names the first ten); or no row is good.
    """
    good = column(rows, "length") > 0
    bad_rows = rows.select(np.flatnonzero(~good))
    if len(bad_rows) and not skip_bad_rows:
        listed = "\n".join(
            f"  {row['source']}: {row['error']}" for row in bad_rows.select(range(min(10, len(bad_rows))))
        )
        raise UserError(
            f"{len(bad_rows)} of {count_rows(rows)} rows can't be trained on; the first of them:\n{listed}\n"
            "Mend them, or go on without them by --skip_bad_rows true."
        )
    if len(bad_rows) == len(rows):
        raise UserError(f"all {len(rows)} rows are bad, the first: {rows[0]['source']}: {rows[0]['error']}")
    if report_to and len(bad_rows):
        with open(report_to, "a", encoding="utf-8") as file:
            for row in bad_rows:
                reason = {"source": row["source"], "reason": row["error"], "row": row["raw"]}
                file.write(json.dumps(reason, ensure_ascii=False) + "\n")
    return rows.select(np.flatnonzero(good)), len(bad_rows)


# <<< bad-rows


def list_galleries(eval_data_path: str) -> dict[str, str]:
    """Name -> path of each gallery: the tables and tars of a folder by their stems, a folder of pictures as a whole."""
    files = find_files(eval_data_path)
    if files.images:
        return {Path(eval_data_path).resolve().name: eval_data_path}
    galleries = {}
    for path in [*files.tables, *(tar for tar in files.tars if not files.tables or has_captions(tar))]:
        stem = os.path.relpath(path, files.root).replace(os.sep, "_")
        endings = ("_texts.jsonl", *sorted(ENDINGS, key=len)[::-1], ".tar")
        length = next(len(ending) for ending in endings if stem.lower().endswith(ending))
        name = stem[:-length]
        galleries[stem if name in galleries else name] = path  # val.csv beside val.jsonl
    return galleries


def read_max_length(data_args, tokenizer) -> int:
    """Tokens of a caption at most: as given, else as many as the tokenizer says; raises UserError where it doesn't."""
    if data_args.max_seq_length:
        return data_args.max_seq_length
    if tokenizer.model_max_length > 1_000_000:  # what Transformers gives where nobody set it
        raise UserError("the tokenizer doesn't say how many tokens the model can read; give --max_seq_length.")
    return tokenizer.model_max_length


def load_splits(data_args, tokenizer, seed: int, bad_rows_file: str | None) -> tuple[Dataset, dict[str, Dataset], dict]:
    """Training pairs, galleries to validate on by name (none without any), and a summary of what was found in them.

    No picture stands on both sides, by content: its copies leave the training pairs. Only a gallery whose name ends in
    `_seen` is one of training pairs.

    Args:
        bad_rows_file: where skipped rows are written; None on all processes but the first.
    """
    max_length = read_max_length(data_args, tokenizer)
    rows, content_hash = load_encoded(
        data_args.data_path, tokenizer, max_length, data_args.language, data_args.data_size
    )
    if bad_rows_file:
        Path(bad_rows_file).unlink(missing_ok=True)
    rows, bad = take_out_bad_rows(rows, data_args.skip_bad_rows, bad_rows_file)
    images, is_copy, galleries = column(rows, "image_id"), np.zeros(len(rows), bool), {}
    if data_args.eval_data_path:
        for name, path in list_galleries(data_args.eval_data_path).items():
            gallery, eval_hash = load_encoded(path, tokenizer, max_length, data_args.language)
            galleries[name], bad_of_it = take_out_bad_rows(gallery, data_args.skip_bad_rows, bad_rows_file)
            bad, content_hash = bad + bad_of_it, hash_of(content_hash, name, eval_hash)[:16]
            if not name.endswith(SEEN):
                is_copy |= np.isin(images, column(galleries[name], "image_id"))
        training_rows = rows.select(np.flatnonzero(~is_copy))
    elif data_args.validation_split:
        different = np.unique(images)
        count = max(1, round(len(different) * data_args.validation_split))
        chosen = np.isin(images, np.random.default_rng(seed).permutation(different)[:count])
        galleries["validation"] = rows.select(np.flatnonzero(chosen))
        training_rows = rows.select(np.flatnonzero(~chosen))
    else:
        training_rows = rows
    if not len(training_rows):
        raise UserError(
            f"no row is left to train on: {len(rows)} good rows of {len(np.unique(images))} images, "
            f"{is_copy.sum()} of them copies of validation rows. "
            "Give more rows, or --validation_split 0 to validate on none."
        )
    return (
        training_rows,
        galleries,
        summarise(data_args.data_path, training_rows, galleries, content_hash, bad, is_copy),
    )


def summarise(data_path, training_rows, galleries, content_hash: str, bad: int, is_copy: np.ndarray) -> dict:
    """What was found in the data, for the first screen and the report."""
    used = {path for rows in (training_rows, *galleries.values()) for path in rows["path"][:]}
    files_not_read, images_not_used = list_unread_files(data_path, used)
    unused_keys = Counter(key for keys in training_rows["unused_keys"][:] for key in json.loads(keys))
    groups = set(training_rows["group"][:]) - {""}
    return {
        "content_hash": content_hash,
        "rows": len(training_rows),
        "images": len(np.unique(column(training_rows, "image_id"))),
        "validation_rows": sum(map(len, galleries.values())),
        "bad_rows": bad,
        "copies_of_validation_rows_removed": int(is_copy.sum()),
        "captions_cut": int(column(training_rows, "cut").sum()),
        "duplicate_captions": len(training_rows) - len(np.unique(column(training_rows, "caption_id"))),
        "groups": len(groups),
        "animated_images": int(column(training_rows, "animated").sum()),
        "unused_keys": dict(unused_keys),
        "files_not_read": files_not_read,
        "images_not_used": images_not_used,
        "tokens": int(column(training_rows, "length").sum()),
    }
