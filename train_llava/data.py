"""Checked rows -> token ids with labels on the assistant's words only -> training and validation rows.

rows.read_rows -> images.check_images -> encode_conversation (the tokenizer's own chat template, one mark a picture)
               -> expand (the image's tokens in place of each mark) -> load_splits (cached by content, ids only)
"""

import bisect
import hashlib
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from filelock import FileLock

from images import CACHE_DIR, Reference, check_images, read_stats
from pixels import count_image_tokens, number_of
from rows import IMAGE_MARK, UserError, find_again, find_files, identify_files, list_unread_files, read_rows
from template import IGNORE_INDEX, encode_conversation, read_tokenizer
from web_dataset import download_rows, is_address

TEXT_FEATURES = {name: Value("string") for name in ("source", "error", "raw", "unused_keys", "notes", "unread")}
ROW_FEATURES = Features(
    TEXT_FEATURES | {name: Value("string") for name in ("messages", "images", "image_names", "missing")}
)
ENCODED_FEATURES = Features(
    TEXT_FEATURES
    | {name: List(Value("int32")) for name in ("input_ids", "labels")}
    | {"images": List({name: Value("string" if name in ("path", "coding") else "int64") for name in Reference._fields})}
    | {"image_ids": List(Value("int64"))}
    | {name: Value("int64") for name in ("row", "exchanges_dropped", "length", "supervised", "animated")}
    | {"key": Value("string")}
)
# What makes rows and ids of the files; where it changes, they are made anew.
CODE = ("files.py", "tars.py", "images.py", "picture_files.py", "rows.py", "template.py", "data.py")


class ImageToken(NamedTuple):
    """What stands for a picture: a text that is one token, its id, and how many of them a picture is."""

    text: str
    id: int
    count: int


def hash_of(*content) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def expand(example: dict, image: ImageToken, pictures: list[int]) -> dict:
    """The example with `image.count` tokens in place of the one of each of its pictures (their numbers in the row).

    Raises:
        UserError: there aren't as many marks as pictures.
    """
    ids, labels = np.array(example["input_ids"]), np.array(example["labels"])
    is_image = ids == image.id
    if is_image.sum() != len(pictures):
        raise UserError(
            f"the chat template makes {is_image.sum()} of {len(pictures)} {IMAGE_MARK} marks, or a text holds the "
            f"token {image.text}"
        )
    times = np.where(is_image, image.count, 1)
    input_ids, labels = (np.repeat(each, times).tolist() for each in (ids, np.where(is_image, IGNORE_INDEX, labels)))
    return example | {"input_ids": input_ids, "labels": labels, "pictures": pictures}


def encode_newest(messages: list[dict], tokenizer, image: ImageToken, model_max_length: int) -> list[dict]:
    """The examples of a conversation, of at most `model_max_length` tokens each.

    Too long a one loses its oldest exchanges with their pictures, never the system message or the newest exchange.

    Returns:
        Examples of `encode_conversation` with all image tokens, and for each its `exchanges_dropped` and `pictures`,
        the numbers of its pictures in the conversation.

    Raises:
        UserError: as `encode_conversation`, or the newest exchange alone is too long.
    """
    counts = [message["content"].count(IMAGE_MARK) for message in messages]
    ends = np.cumsum([0, *counts]).tolist()
    marked = [message | {"content": message["content"].replace(IMAGE_MARK, image.text)} for message in messages]
    roles = [message["role"] for message in messages]
    starts = [i for i, role in enumerate(roles) if role == "user" and roles[i - 1 : i] != ["user"]]

    def shorten(turns: list[int], exchanges: int) -> dict:
        """The example of these turns without the oldest exchanges."""
        kept = [*range(starts[0]), *range(starts[exchanges], turns[-1] + 1)]
        until = [marked[i] | ({} if i in turns else {"weight": 0}) for i in kept]
        example = encode_conversation(until, tokenizer)[-1]
        return expand(example, image, [picture for i in kept for picture in range(ends[i], ends[i + 1])])

    fitting = []
    for example in encode_conversation(marked, tokenizer):
        turns, dropped = example["turns"], 0
        example = expand(example, image, list(range(ends[turns[-1] + 1])))
        if len(example["input_ids"]) > model_max_length:
            newest = sum(start <= turns[-1] for start in starts) - 1
            dropped = bisect.bisect_left(
                range(newest),
                True,
                lo=min(1, newest),
                key=lambda n: len(shorten(turns, n)["input_ids"]) <= model_max_length,  # noqa: B023
            )
            example = shorten(turns, dropped)
        if (length := len(example["input_ids"])) > model_max_length:
            of_images = f" ({len(example['pictures'])} images of {image.count})" if example["pictures"] else ""
            limit = f"model_max_length is {model_max_length}"
            raise UserError(f"{length} tokens in its newest exchange{of_images}, {limit}")
        fitting.append(example | {"exchanges_dropped": dropped})
    return fitting


def encode_row(row: dict, tokenizer, image: ImageToken, model_max_length: int, verdicts: dict) -> list[dict]:
    """The examples of a row of `read_rows`, with their `input_ids` and `labels`; one without any, and why, if bad.

    Args:
        verdicts: `Reference` -> `Verdict` of `check_images`, of all pictures.
    """
    messages, examples = row.pop("messages"), []
    references = [Reference(*each) for each in json.loads(row.pop("images"))]
    names, row = json.loads(row.pop("image_names")), {name: value for name, value in row.items() if name != "missing"}
    found = [verdicts[reference] for reference in references]
    if not row["error"]:
        try:
            for number, (name, verdict) in enumerate(zip(names, found, strict=True), start=1):
                if verdict.reason:
                    raise UserError(f"image {number}, {name}: {verdict.reason}")
            examples = encode_newest(json.loads(messages), tokenizer, image, model_max_length)
        except UserError as reason:
            whole = {"messages": json.loads(messages), "images": names}
            row |= {"error": str(reason), "raw": json.dumps(whole, ensure_ascii=False)}
    return [
        row
        | {name: example[name] for name in ("input_ids", "labels", "exchanges_dropped")}
        | {"images": [references[i]._asdict() for i in example["pictures"]]}
        | {"image_ids": [number_of(found[i].sha256) for i in example["pictures"]]}
        | {"animated": sum(found[i].animated for i in example["pictures"])}
        | {"length": len(example["input_ids"])}
        | {"supervised": sum(label != IGNORE_INDEX for label in example["labels"])}
        | {"key": hash_of(messages, [verdict.sha256 for verdict in found])}
        for example in examples or [{"input_ids": [], "labels": [], "exchanges_dropped": 0, "pictures": []}]
    ]


def encode_rows(rows: dict[str, list], numbers: list[int], **settings) -> dict[str, list]:
    """The same for a batch of rows and their numbers, by column."""
    encoded = {name: [] for name in ENCODED_FEATURES}
    for number, values in zip(numbers, zip(*rows.values(), strict=True), strict=True):
        for example in encode_row(dict(zip(rows, values, strict=True)), **settings):
            for name, value in example.items():
                encoded[name].append(value)
            encoded["row"].append(number)
    return encoded


def check_saved_tokenizer(rows: Dataset, folder: str, tokenizer, **settings) -> None:
    """Raises UserError where the tokenizer, once saved in `folder` and read again, encodes these rows otherwise."""
    tokenizer.save_pretrained(folder)
    saved = read_tokenizer(folder, trust_remote_code=True)
    saved.name_or_path = tokenizer.name_or_path  # whose generation_config names the stop tokens
    for row in rows:
        found, expected = (encode_row(dict(row), each, **settings) for each in (saved, tokenizer))
        if found != expected:
            raise UserError(
                f"{row['source']}: the tokenizer, saved and read again, encodes this row otherwise, so the model "
                "would be served with another one. Save it once by the version of Transformers that wrote it."
            )


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


def load_rows(data_path: str) -> tuple[Dataset, list[Reference], str]:
    """All rows of a path, their pictures, and the name of the cache; missing pictures are looked for each time."""
    files = find_files(data_path)
    encodings, content = identify_files(files)
    name = hash_of(content, [Path(__file__).with_name(file).read_text("utf-8") for file in CODE])
    while True:
        rows = cached(f"rows-{name[:16]}", lambda scratch: generate(scratch, files=files, encodings=encodings))
        references = list(dict.fromkeys(Reference(*each) for row in rows["images"][:] for each in json.loads(row)))
        pairs = zip(rows["missing"][:], rows["source"][:], strict=True)
        found = find_again([pair for pair in pairs if pair[0]], files.root)
        gone = sorted(path for path in {one.path for one in references} if not os.path.isfile(path))
        if not found and not gone:
            return rows, references, name
        name = hash_of(name, found, gone)


def describe_tokens(processor, model_max_length: int) -> dict[str, str]:
    """What decides a conversation's ids beside the conversation: a hash of each, by name."""
    tokenizer = processor.tokenizer
    return {
        "tokenizer": hash_of(tokenizer.backend_tokenizer.to_str(), str(tokenizer.special_tokens_map)),
        "chat template": hash_of(tokenizer.chat_template),
        "image token": hash_of(read_image_token(processor)),
        "model_max_length": str(model_max_length),
    }


def read_image_token(processor) -> ImageToken:
    return ImageToken(processor.image_token, processor.image_token_id, count_image_tokens(processor))


def load_encoded(data_path: str, processor, model_max_length: int) -> tuple[Dataset, str]:
    """All examples of a path, bad rows among them, their pictures checked; or those of a server (`web_dataset`).

    Returns:
        The examples of `encode_rows`, and a hash of what they are made of: conversations, pictures, tokenizer,
        template, tokens of a picture, length.
    """
    made_of = describe_tokens(processor, model_max_length)
    if is_address(data_path):
        return download_rows(data_path, made_of, processor.image_processor, ENCODED_FEATURES, cached)
    rows, references, name = load_rows(data_path)
    tokenizer = processor.tokenizer
    settings = {"image": read_image_token(processor), "model_max_length": model_max_length}

    def build(scratch: str) -> Dataset:
        settings["verdicts"] = dict(zip(references, check_images(references), strict=True))
        good = rows.select(np.flatnonzero(np.array(rows["error"][:]) == "")[:100])
        check_saved_tokenizer(good, f"{scratch}/tokenizer", tokenizer, **settings)
        return rows.map(
            encode_rows,
            batched=True,
            with_indices=True,
            fn_kwargs={"tokenizer": tokenizer} | settings,
            remove_columns=list(ROW_FEATURES),
            features=ENCODED_FEATURES,
            num_proc=min(os.cpu_count(), len(rows) // 2000) or None,
            new_fingerprint=Path(scratch).name,
            cache_file_name=f"{scratch}/encoded.arrow",
            desc="tokenize",
        )

    stats = sorted(read_stats(references).items())
    encoded = cached(f"encoded-{hash_of(name, stats, made_of)[:16]}", build)
    return encoded, hash_of(encoded["key"][:], made_of)[:16]


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


def load_splits(data_args, processor, seed: int, bad_rows_file: str | None) -> tuple[Dataset, Dataset | None, dict]:
    """Training rows, validation rows (None without any) and a summary of what was found in them.

    No conversation, by its text and its pictures' content, stands on both sides: its copies leave the training rows.

    Args:
        bad_rows_file: where skipped rows are written; None on all processes but the first.
    """
    rows, content_hash = load_encoded(data_args.data_path, processor, data_args.model_max_length)
    if bad_rows_file:
        Path(bad_rows_file).unlink(missing_ok=True)
    unread = json.loads(rows[0]["unread"])
    rows, bad = take_out_bad_rows(rows, data_args.skip_bad_rows, bad_rows_file)
    keys = column(rows, "key")
    numbers = np.unique(column(rows, "row"), return_inverse=True)[1]
    is_copy, validation = np.zeros(len(rows), bool), None
    if data_args.eval_data_path:
        validation, eval_hash = load_encoded(data_args.eval_data_path, processor, data_args.model_max_length)
        validation, bad_validation = take_out_bad_rows(validation, data_args.skip_bad_rows, bad_rows_file)
        bad, content_hash = bad + bad_validation, f"{content_hash}-{eval_hash}"
        is_copy = np.isin(keys, column(validation, "key"))
        training_rows = rows.select(np.flatnonzero(~is_copy))
    elif data_args.validation_split:
        count = max(1, round((numbers[-1] + 1) * data_args.validation_split))
        chosen = np.isin(numbers, np.random.default_rng(seed).permutation(numbers[-1] + 1)[:count])
        validation = rows.select(np.flatnonzero(chosen))
        is_copy = np.isin(keys, keys[chosen]) & ~chosen
        training_rows = rows.select(np.flatnonzero(~is_copy & ~chosen))
    else:
        training_rows = rows
    copies = count_rows(rows.select(np.flatnonzero(is_copy)))
    if not len(training_rows):
        raise UserError(
            f"no row is left to train on: {count_rows(rows)} good rows, {copies} of them copies of validation rows. "
            "Give more rows, or --validation_split 0 to validate on none."
        )
    unread += [] if is_address(data_args.data_path) else list_unread_files(data_args.data_path)
    summary = {"content_hash": content_hash, "bad_rows": bad, "copies_of_validation_rows_removed": copies}
    summary["files_not_read"] = unread
    return training_rows, validation, summary | summarise(rows, training_rows, validation)


def list_image_ids(rows: Dataset) -> np.ndarray:
    """The ids of all pictures of some rows, as often as they stand there, shape (pictures,)."""
    ids = [image for images in rows["image_ids"][:] for image in images]
    return np.array(ids, np.int64)


def summarise(rows: Dataset, training_rows: Dataset, validation: Dataset | None) -> dict:
    """What was found in the data, for the first screen and the report."""
    unused_keys = Counter(key for keys in rows["unused_keys"][:] for key in json.loads(keys))
    pictures = list_image_ids(training_rows)
    evaluated = np.unique(list_image_ids(validation)) if validation else np.empty(0, np.int64)
    firsts = np.unique(column(training_rows, "row"), return_index=True)[1]  # a row that is split by turn counts once
    notes = Counter(note for notes in training_rows.select(firsts)["notes"][:] for note in json.loads(notes))
    return {
        "rows": len(training_rows),
        "validation_rows": len(validation) if validation else 0,
        "pictures": len(np.unique(pictures)),
        "text_only_rows": sum(not images for images in training_rows["image_ids"][:]),
        "marks_added": notes["mark added"],
        "animated_pictures": int(column(training_rows, "animated").sum()),
        "validation_pictures": len(evaluated),
        "validation_pictures_seen_in_training": int(np.isin(evaluated, pictures).sum()),
        "duplicates_kept": len(firsts) - len(np.unique(column(training_rows, "key"))),
        "rows_split_by_turn": int((np.bincount(column(training_rows, "row")) > 1).sum()),
        "rows_that_lost_early_turns": int((column(training_rows, "exchanges_dropped") > 0).sum()),
        "unused_keys": dict(unused_keys),
        "tokens": int(column(training_rows, "length").sum()),
        "supervised_tokens": int(column(training_rows, "supervised").sum()),
    }
