"""Checked rows -> token ids with labels on the assistant's words only -> training and validation rows.

rows.read_rows -> encode_conversation (the tokenizer's own chat template, turn by turn)
               -> load_splits (cached by content, validation rows kept out of the training rows)
"""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import bisect
import hashlib
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from filelock import FileLock

from files import identify_file, list_files, list_unread_files
from rows import UserError, read_rows
from template import IGNORE_INDEX, encode_conversation, read_tokenizer

CACHE_DIR = Path(__file__).parent / "cache_data"
TEXT_FEATURES = {name: Value("string") for name in ("source", "error", "raw", "unused_keys")}
ROW_FEATURES = Features(TEXT_FEATURES | {name: Value("string") for name in ("messages", "tools")})
ENCODED_FEATURES = Features(
    TEXT_FEATURES
    | {name: List(Value("int32")) for name in ("input_ids", "labels")}
    | {name: Value("int64") for name in ("row", "exchanges_dropped", "length", "supervised")}
    | {"key": Value("string")}
)


def encode_newest(
    messages: list[dict], tokenizer, model_max_length: int, tools: list[dict] | None = None
) -> list[dict]:
    """The examples of a conversation, of at most `model_max_length` tokens each.

    Too long a one loses its oldest exchanges, never the system message or the newest exchange.

    Returns:
        Examples of `encode_conversation`, and for each its `exchanges_dropped`.

    Raises:
        UserError: as `encode_conversation`, or the newest exchange alone is too long.
    """
    fitting = []
    for example in encode_conversation(messages, tokenizer, tools):
        turns, dropped = example["turns"], 0
        if len(example["input_ids"]) > model_max_length:
            until = [
                message | ({} if i in turns else {"weight": 0}) for i, message in enumerate(messages[: turns[-1] + 1])
            ]
            dropped, example = drop_oldest(until, tokenizer, model_max_length, tools)
        fitting.append(example | {"exchanges_dropped": dropped})
    return fitting


def drop_oldest(messages: list[dict], tokenizer, model_max_length: int, tools) -> tuple[int, dict]:
    """How many of the oldest exchanges have to go for a conversation to fit, and what is then left of it."""
    roles = [message["role"] for message in messages]
    starts = [i for i, role in enumerate(roles) if role == "user" and roles[i - 1 : i] != ["user"]]

    def encode_without(exchanges: int) -> dict:
        return encode_conversation(messages[: starts[0]] + messages[starts[exchanges] :], tokenizer, tools)[-1]

    newest = len(starts) - 1
    dropped = bisect.bisect_left(
        range(newest), True, lo=min(1, newest), key=lambda n: len(encode_without(n)["input_ids"]) <= model_max_length
    )
    example = encode_without(dropped)
    if (length := len(example["input_ids"])) > model_max_length:
        raise UserError(f"{length} tokens in its newest exchange, model_max_length is {model_max_length}")
    return dropped, example


def encode_row(row: dict, tokenizer, model_max_length: int) -> list[dict]:
    """The examples of a row of `read_rows`, with their `input_ids` and `labels`; one without any, and why, if bad."""
    messages, tools = row.pop("messages"), row.pop("tools")
    examples = []
    if not row["error"]:
        try:
            examples = encode_newest(json.loads(messages), tokenizer, model_max_length, json.loads(tools))
        except UserError as reason:
            row |= {"error": str(reason), "raw": messages}
    return [
        row
        | {name: example[name] for name in ("input_ids", "labels", "exchanges_dropped")}
        | {"length": len(example["input_ids"])}
        | {"supervised": sum(label != IGNORE_INDEX for label in example["labels"])}
        | {"key": hashlib.sha256(f"{messages}{tools}".encode()).hexdigest()}
        for example in examples or [{"input_ids": [], "labels": [], "exchanges_dropped": 0}]
    ]


def encode_rows(rows: dict[str, list], numbers: list[int], tokenizer, model_max_length: int) -> dict[str, list]:
    """The same for a batch of rows and their numbers, by column."""
    encoded = {name: [] for name in ENCODED_FEATURES}
    for number, values in zip(numbers, zip(*rows.values(), strict=True), strict=True):
        for example in encode_row(dict(zip(rows, values, strict=True)), tokenizer, model_max_length):
            for name, value in example.items():
                encoded[name].append(value)
            encoded["row"].append(number)
    return encoded


def check_saved_tokenizer(rows: Dataset, tokenizer, model_max_length: int, folder: str) -> None:
    """Raises UserError where the tokenizer, once saved in `folder` and read again, encodes these rows otherwise."""
    tokenizer.save_pretrained(folder)
    saved = read_tokenizer(folder, trust_remote_code=True)
    saved.name_or_path = tokenizer.name_or_path  # whose generation_config names the stop tokens
    for row in rows:
        found, expected = (encode_row(dict(row), each, model_max_length) for each in (saved, tokenizer))
        if found != expected:
            raise UserError(
                f"{row['source']}: the tokenizer, saved and read again, encodes this row otherwise, so the model "
                "would be served with another one. Save it once by the version of Transformers that wrote it."
            )


def load_encoded(data_path: str, tokenizer, model_max_length: int) -> tuple[Dataset, str]:
    """All examples of a path, bad rows among them: the first process to come tokenises, the others read its cache.

    Rows live in memory-mapped Arrow files. The cache's name is a hash of all that decides what is in it.

    Returns:
        The examples of `encode_rows`, and a hash of what they are made of (files, tokenizer, template, length).
    """
    paths = list_files(data_path)
    encodings, digests = zip(*map(identify_file, paths), strict=True)
    special_tokens = str(tokenizer.special_tokens_map)
    content = [digests, tokenizer.backend_tokenizer.to_str(), special_tokens, tokenizer.chat_template, model_max_length]
    content_hash = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    code = [
        Path(__file__).with_name(name).read_text("utf-8") for name in ("files.py", "rows.py", "template.py", "data.py")
    ]
    code_hash = hashlib.sha256(json.dumps([paths, code]).encode()).hexdigest()[:16]
    folder = CACHE_DIR / f"{content_hash}-{code_hash}"
    CACHE_DIR.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"), tempfile.TemporaryDirectory(dir=CACHE_DIR) as scratch:
        if not folder.exists():
            try:
                rows = Dataset.from_generator(
                    read_rows,
                    features=ROW_FEATURES,
                    gen_kwargs={"paths": paths, "encodings": list(encodings)},
                    cache_dir=scratch,
                    fingerprint=folder.name,
                )
            except DatasetGenerationError as error:
                raise error.__cause__ from None
            good = rows.select(np.flatnonzero(np.array(rows["error"]) == "")[:100])
            check_saved_tokenizer(good, tokenizer, model_max_length, f"{scratch}/tokenizer")
            encoded = rows.map(
                encode_rows,
                batched=True,
                with_indices=True,
                fn_kwargs={"tokenizer": tokenizer, "model_max_length": model_max_length},
                remove_columns=["messages", "tools"],
                features=ENCODED_FEATURES,
                num_proc=min(os.cpu_count(), len(rows) // 2000) or None,
                new_fingerprint=folder.name,
                desc="tokenize",
            )
            encoded.save_to_disk(f"{scratch}/whole")
            os.rename(f"{scratch}/whole", folder)
    return Dataset.load_from_disk(folder), content_hash


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


def load_splits(data_args, tokenizer, seed: int, bad_rows_file: str | None) -> tuple[Dataset, Dataset | None, dict]:
    """Training rows, validation rows (None without any) and a summary of what was found in them.

    No conversation stands on both sides: its copies leave the training rows.

    Args:
        bad_rows_file: where skipped rows are written; None on all processes but the first.
    """
    rows, content_hash = load_encoded(data_args.data_path, tokenizer, data_args.model_max_length)
    if bad_rows_file:
        Path(bad_rows_file).unlink(missing_ok=True)
    rows, bad = take_out_bad_rows(rows, data_args.skip_bad_rows, bad_rows_file)
    keys = column(rows, "key")
    numbers = np.unique(column(rows, "row"), return_inverse=True)[1]
    is_copy, validation = np.zeros(len(rows), bool), None
    if data_args.eval_data_path:
        validation, eval_hash = load_encoded(data_args.eval_data_path, tokenizer, data_args.model_max_length)
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
    unused_keys = Counter(key for keys in rows["unused_keys"] for key in json.loads(keys))
    training_row_count = count_rows(training_rows)
    summary = {
        "content_hash": content_hash,
        "rows": len(training_rows),
        "validation_rows": len(validation) if validation else 0,
        "bad_rows": bad,
        "copies_of_validation_rows_removed": copies,
        "duplicates_kept": training_row_count - len(np.unique(column(training_rows, "key"))),
        "rows_split_by_turn": int((np.bincount(column(training_rows, "row")) > 1).sum()),
        "rows_that_lost_early_turns": int((column(training_rows, "exchanges_dropped") > 0).sum()),
        "unused_keys": dict(unused_keys),
        "files_not_read": list_unread_files(data_args.data_path),
        "tokens": int(column(training_rows, "length").sum()),
        "supervised_tokens": int(column(training_rows, "supervised").sum()),
    }
    return training_rows, validation, summary
