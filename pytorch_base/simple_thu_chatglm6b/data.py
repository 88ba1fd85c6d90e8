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
from jinja2 import TemplateError

from rows import UserError, detect_encoding, list_files, read_rows

IGNORE_INDEX = -100
CACHE_DIR = Path(__file__).parent / "cache_data"
TEXT_FEATURES = {name: Value("string") for name in ("source", "error", "raw", "unused_keys")}
ROW_FEATURES = Features(TEXT_FEATURES | {"messages": Value("string")})
ENCODED_FEATURES = Features(
    TEXT_FEATURES
    | {name: List(Value("int32")) for name in ("input_ids", "labels")}
    | {name: Value("int64") for name in ("exchanges_dropped", "length", "supervised")}
    | {"key": Value("string")}
)


def control_tokens(tokenizer) -> list[str]:
    """The tokens that a template sets its marks with: all that are special, named (EOS, ...) or only added as such."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens))


def find_turns(text: str, messages: list[dict], tokenizer, control: list[str]) -> list[tuple[int, int]]:
    """Where in the rendered conversation the assistant speaks: (start, end) characters, end-of-turn included.

    A turn starts where the template would let the model begin to reply: training sees what serving will send. It ends
    with the control token that follows the answer, or else with the answer.

    Raises:
        UserError: the template renders earlier turns otherwise once later ones follow, or changes an answer.
    """
    answers, starts = {}, []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        history = tokenizer.apply_chat_template(messages[:index], tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        start = len(os.path.commonprefix([text, prompt]))
        if start < len(history):
            raise UserError("the chat template rewrites earlier turns, so the prompt of a turn can't be found")
        starts.append(start)
        answers[start] = message["content"].rpartition("</think>")[2].strip()  # templates drop old thoughts
    spans = []
    for start, limit in zip(starts, [*starts[1:], len(text)], strict=True):
        turn = text[start:limit]
        ends = [(start + turn.index(token), token) for token in control if token in turn]
        end, token = min(ends, default=(limit, ""))
        if token and text[start:end].strip().endswith(answers[start]):
            end += len(token)
        elif (place := text.find(answers[start], start, limit)) >= 0:
            end = place + len(answers[start])
        else:
            raise UserError("the chat template changes an answer, so it can't be found in the rendered text")
        spans.append((start, end))
    return spans


def encode_conversation(messages: list[dict], tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and its labels: the id where the assistant speaks, -100 elsewhere.

    Raises:
        UserError: a message holds a control token, the chat template refuses the conversation, or nothing is left
            to learn from.
    """
    control = control_tokens(tokenizer)
    for number, message in enumerate(messages, start=1):
        for token in control:
            if token in message["content"]:
                raise UserError(f"message {number}: the text holds the control token {token}")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        spans = find_turns(text, messages, tokenizer, control)
    except TemplateError as error:
        raise UserError(f"the chat template refuses it: {error}") from None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids, labels, span = encoded["input_ids"], [IGNORE_INDEX] * len(encoded["input_ids"]), 0
    for position, (start, end) in enumerate(encoded["offset_mapping"]):
        while span < len(spans) and start >= spans[span][1]:
            span += 1
        if span < len(spans) and start >= spans[span][0] and end > start:
            labels[position] = input_ids[position]
    supervised = [label for label in labels if label != IGNORE_INDEX]
    if not supervised:
        raise UserError("no token of the assistant is left to learn from")
    if tokenizer.convert_ids_to_tokens(supervised[-1]) not in control:
        # A template without an end-of-turn token would train a model that never stops.
        input_ids, labels = input_ids + [tokenizer.eos_token_id], labels + [tokenizer.eos_token_id]
    return input_ids, labels


def encode_newest(messages: list[dict], tokenizer, model_max_length: int) -> dict:
    """A conversation of at most `model_max_length` tokens.

    Too long a one loses its oldest exchanges, never the system message or the newest exchange.

    Returns:
        `input_ids` and `labels` of `encode_conversation`, and `exchanges_dropped`.

    Raises:
        UserError: as `encode_conversation`, or the newest exchange alone is too long.
    """
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")

    def encode_without(exchanges: int):
        return encode_conversation(messages[:first] + messages[first + 2 * exchanges :], tokenizer)

    def fits(exchanges: int) -> bool:
        return len(encode_without(exchanges)[0]) <= model_max_length

    dropped, (input_ids, labels) = 0, encode_without(0)
    if len(input_ids) > model_max_length:
        newest = (len(messages) - first) // 2 - 1
        dropped = bisect.bisect_left(range(newest), True, lo=min(1, newest), key=fits)
        input_ids, labels = encode_without(dropped)
    if len(input_ids) > model_max_length:
        raise UserError(f"{len(input_ids)} tokens in its newest exchange, model_max_length is {model_max_length}")
    return {"input_ids": input_ids, "labels": labels, "exchanges_dropped": dropped}


def encode_row(row: dict, tokenizer, model_max_length: int) -> dict:
    """A row of `read_rows` with its `input_ids` and `labels`, or with the reason why it has none."""
    encoded, error = {"input_ids": [], "labels": [], "exchanges_dropped": 0}, row["error"]
    if not error:
        try:
            encoded = encode_newest(json.loads(row["messages"]), tokenizer, model_max_length)
        except UserError as reason:
            error = str(reason)
    return {
        **encoded,
        "error": error,
        "raw": row["raw"] or (row["messages"] if error else ""),
        "length": len(encoded["input_ids"]),
        "supervised": sum(label != IGNORE_INDEX for label in encoded["labels"]),
        "key": hashlib.sha256(row["messages"].encode()).hexdigest(),
    }


def load_encoded(data_path: str, tokenizer, model_max_length: int) -> tuple[Dataset, str]:
    """All rows of a path, good and bad, tokenised once: the first process to come does it, the others read its cache.

    Rows live in memory-mapped Arrow files. The cache's name is a hash of all that decides what is in it.

    Returns:
        The rows of `encode_row`, and a hash of the data as the model will see it (files, tokenizer, template, length).
    """
    paths = list_files(data_path)
    encodings, digests = zip(*map(detect_encoding, paths), strict=True)
    special_tokens = str(tokenizer.special_tokens_map)
    content = [digests, tokenizer.backend_tokenizer.to_str(), special_tokens, tokenizer.chat_template, model_max_length]
    content_hash = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    code = [Path(__file__).with_name(name).read_text("utf-8") for name in ("rows.py", "data.py")]
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
            encoded = rows.map(
                encode_row,
                fn_kwargs={"tokenizer": tokenizer, "model_max_length": model_max_length},
                remove_columns=["messages"],
                features=ENCODED_FEATURES,
                num_proc=min(os.cpu_count(), len(rows) // 2000) or None,
                new_fingerprint=folder.name,
                desc="tokenize",
            )
            encoded.save_to_disk(f"{scratch}/whole")
            os.rename(f"{scratch}/whole", folder)
    return Dataset.load_from_disk(folder), content_hash


def column(rows: Dataset, name: str) -> np.ndarray:
    """One column of a dataset as an array of shape (rows,)."""
    return rows.with_format("numpy")[name][:]


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
            f"{len(bad_rows)} of {len(rows)} rows can't be trained on; the first of them:\n{listed}\n"
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
    validation = None
    if data_args.eval_data_path:
        validation, eval_hash = load_encoded(data_args.eval_data_path, tokenizer, data_args.model_max_length)
        validation, bad_validation = take_out_bad_rows(validation, data_args.skip_bad_rows, bad_rows_file)
        bad, content_hash = bad + bad_validation, f"{content_hash}-{eval_hash}"
        is_copy = np.isin(keys, column(validation, "key"))
        training_rows = rows.select(np.flatnonzero(~is_copy))
    elif data_args.validation_split:
        count = max(1, round(len(rows) * data_args.validation_split))
        chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:count])
        validation = rows.select(chosen)
        is_copy = np.isin(keys, keys[chosen])
        is_copy[chosen] = False
        training_rows = rows.select(np.setdiff1d(np.flatnonzero(~is_copy), chosen))
    else:
        is_copy, training_rows = np.zeros(len(rows), bool), rows
    if not len(training_rows):
        raise UserError(
            f"no row is left to train on: {len(rows)} good rows, {is_copy.sum()} of them validation rows as well."
        )
    unused_keys = Counter(key for keys in rows["unused_keys"] for key in json.loads(keys))
    summary = {
        "content_hash": content_hash,
        "rows": len(training_rows),
        "validation_rows": len(validation) if validation else 0,
        "bad_rows": bad,
        "copies_of_validation_rows_removed": int(is_copy.sum()),
        "duplicates_kept": len(training_rows) - len(np.unique(column(training_rows, "key"))),
        "rows_that_lost_early_turns": int((column(training_rows, "exchanges_dropped") > 0).sum()),
        "unused_keys": dict(unused_keys),
        "tokens": int(column(training_rows, "length").sum()),
        "supervised_tokens": int(column(training_rows, "supervised").sum()),
    }
    return training_rows, validation, summary
