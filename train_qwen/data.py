"""Files of conversations -> checked rows -> token ids with labels on the assistant's words only.

files -> read_rows (one encoding per file, three formats, every row checked)
      -> encode_conversation (the tokenizer's own chat template, turn by turn)
      -> load_splits (cached by content, held-out rows kept out of the training rows)
"""

import codecs
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError
from filelock import FileLock

IGNORE_INDEX = -100
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
CACHE_DIR = Path(__file__).parent / "cache_data"
ROW_FEATURES = Features({name: Value("string") for name in ("messages", "source", "error", "raw", "unused_keys")})


class UserError(ValueError):
    """What is wrong with what the user gave, where, and what to do about it; printed without a traceback."""


def list_files(data_path: str) -> list[str]:
    """The `.json` / `.jsonl` files of a file or folder, by name; raises UserError where there is none."""
    path = Path(data_path)
    if path.is_file():
        return [str(path)]
    if not path.is_dir():
        raise UserError(f"{data_path}: there is no such file or folder; check --data_path / DATA.")
    files = sorted(str(file) for file in path.rglob("*") if file.suffix in (".json", ".jsonl"))
    if not files:
        raise UserError(f"{data_path}: the folder holds no .json or .jsonl file.")
    return files


def detect_encoding(path: str) -> tuple[str, str]:
    """A file's encoding (UTF-8, else GB18030, strictly) and SHA-256; raises UserError with the bad byte's offset."""
    first_error = None
    for encoding in ("utf-8-sig", "gb18030"):
        decoder, digest, position = codecs.getincrementaldecoder(encoding)(), hashlib.sha256(), 0
        try:
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    pending = len(decoder.getstate()[0])
                    if b"\0" in chunk:
                        offset = position + chunk.index(b"\0")
                        raise UserError(f"{path}: NUL at byte {offset}: UTF-16 or binary? Save the file as UTF-8.")
                    decoder.decode(chunk)
                    position += len(chunk)
                    digest.update(chunk)
                pending = len(decoder.getstate()[0])
                decoder.decode(b"", final=True)
            return encoding, digest.hexdigest()
        except UnicodeDecodeError as error:
            first_error = first_error or (position - pending + error.start)
    raise UserError(
        f"{path}: neither UTF-8 (first bad byte at offset {first_error}) nor GB18030. Save the file as UTF-8."
    )


def read_json(path: str, encoding: str) -> Iterator[tuple[int, object, str]]:
    """Yields (line number, value or UserError, text) of a JSON array or of a file with one JSON object a line.

    Raises:
        UserError: an array that is broken, with line and column (what follows cannot be told apart any more).
    """
    with open(path, encoding=encoding) as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        if start != "[":
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line), line
                    except json.JSONDecodeError as error:
                        yield number, UserError(f"no JSON: {error.msg} at column {error.colno}"), line
            return
        text = file.read()
    decoder, position, number, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        if text[position : position + 1] == "]":
            return
        number, counted = number + text.count("\n", counted, position), position
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}:{error.colno}: no JSON: {error.msg}") from None
        yield number, value, text[position:end]
        position = end


def to_messages(row: object) -> tuple[list[dict], list[str]]:
    """One row of any of the three formats as `[{"role", "content"}, ...]`, and the keys that were not used.

    Raises:
        UserError: what the row lacks, in words.
    """
    if not isinstance(row, dict):
        raise UserError(f"a row is a JSON object, this is a {type(row).__name__}")
    if "messages" in row or "conversations" in row:
        name, role_key, text_key = (
            ("messages", "role", "content") if "messages" in row else ("conversations", "from", "value")
        )
        turns, used = row[name], {name, "system"}
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise UserError(f"{name} is a list of objects with {role_key} and {text_key}")
        messages = [{"role": turn.get(role_key), "content": turn.get(text_key)} for turn in turns]
    elif "instruction" in row:
        used = {"instruction", "input", "output", "history", "system"}
        if "output" not in row:
            raise UserError("no output")
        question = row["instruction"]
        if row.get("input"):
            question = f"{question}\n{row['input']}"
        pairs = [*(row.get("history") or []), (question, row["output"])]
        messages = [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    else:
        raise UserError(f"none of messages, conversations, instruction among its keys {sorted(row)}")
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    return check_messages(messages), sorted(set(row) - used)


def check_messages(messages: list[dict]) -> list[dict]:
    """The messages with standard roles; raises UserError where one breaks the order, or is empty, or is no text."""
    checked = []
    for number, message in enumerate(messages, start=1):
        role = ROLES.get(message["role"])
        if role is None:
            raise UserError(f"message {number}: unknown role {message['role']!r}, known are {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise UserError(f"message {number} ({role}): the text is {type(message['content']).__name__}, not a string")
        if not message["content"].strip():
            raise UserError(f"message {number} ({role}): the text is empty")
        checked.append({"role": role, "content": message["content"]})
    if not any(message["role"] == "assistant" for message in checked):
        raise UserError("no assistant turn, so there is nothing to learn")
    first = int(checked[0]["role"] == "system")
    for number, message in enumerate(checked[first:], start=first + 1):
        expected = ("user", "assistant")[(number - first - 1) % 2]
        if message["role"] != expected:
            raise UserError(
                f"message {number}: roles in the wrong order, {message['role']} where {expected} was expected"
            )
    if checked[-1]["role"] != "assistant":
        raise UserError("the last message is the user's, so its answer is missing")
    return checked


def read_rows(paths: list[str], encodings: list[str]) -> Iterator[dict]:
    """Every row of every file, good or bad: its messages as JSON, its `file:line`, and what is wrong with it."""
    row = None
    for path, encoding in zip(paths, encodings, strict=True):
        for number, value, text in read_json(path, encoding):
            row = {"messages": "", "source": f"{path}:{number}", "error": "", "raw": "", "unused_keys": "[]"}
            try:
                if isinstance(value, UserError):
                    raise value
                messages, unused_keys = to_messages(value)
                row.update(messages=json.dumps(messages, ensure_ascii=False), unused_keys=json.dumps(unused_keys))
            except UserError as error:
                row.update(error=str(error), raw=text.strip())
            yield row
    if row is None:
        raise UserError(f"{', '.join(paths)}: no row in it.")


def control_tokens(tokenizer) -> list[str]:
    """The tokens that a template sets its marks with: all that are special, named (EOS, ...) or only added as such."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens))


def find_turns(text: str, messages: list[dict], tokenizer) -> list[tuple[int, int]]:
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
        ends = [(text.index(token, start), token) for token in control_tokens(tokenizer) if token in text[start:limit]]
        end, token = min(ends, default=(limit, ""))
        if token and text[start:end].strip().endswith(answers[start]):
            end += len(token)
        elif (place := text.find(answers[start], start, limit)) >= 0:
            end = place + len(answers[start])
        else:
            raise UserError("the chat template changes an answer, so it can't be found in the rendered text")
        spans.append((start, end))
    return spans


def encode_conversation(messages: list[dict], tokenizer, model_max_length: int) -> dict:
    """Token ids of a conversation and labels that leave out all but the assistant's words.

    Too long a conversation loses its oldest exchanges, never the system message or the newest exchange.

    Returns:
        `input_ids` and `labels` of equal length (labels: the id, or -100), and `exchanges_dropped`.

    Raises:
        UserError: a message holds a control token, or the newest exchange alone is too long.
    """
    for number, message in enumerate(messages, start=1):
        for token in control_tokens(tokenizer):
            if token in message["content"]:
                raise UserError(f"message {number}: the text holds the control token {token}")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = find_turns(text, messages, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids, labels, span = encoded["input_ids"], [IGNORE_INDEX] * len(encoded["input_ids"]), 0
    for position, (start, end) in enumerate(encoded["offset_mapping"]):
        while span < len(spans) and start >= spans[span][1]:
            span += 1
        if span < len(spans) and start >= spans[span][0] and end > start:
            labels[position] = input_ids[position]
    supervised = [label for label in labels if label != IGNORE_INDEX]
    if supervised and tokenizer.convert_ids_to_tokens(supervised[-1]) not in control_tokens(tokenizer):
        # A template without an end-of-turn token would train a model that never stops.
        input_ids, labels = input_ids + [tokenizer.eos_token_id], labels + [tokenizer.eos_token_id]

    if len(input_ids) > model_max_length:
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        if len(messages) - first <= 2:
            raise UserError(f"{len(input_ids)} tokens in its newest exchange, model_max_length is {model_max_length}")
        shorter = encode_conversation(messages[:first] + messages[first + 2 :], tokenizer, model_max_length)
        return {**shorter, "exchanges_dropped": shorter["exchanges_dropped"] + 1}
    if not supervised:
        raise UserError("no token of the assistant is left to learn from")
    return {"input_ids": input_ids, "labels": labels, "exchanges_dropped": 0}


def encode_row(row: dict, tokenizer, model_max_length: int) -> dict:
    """A row of `read_rows` with its `input_ids` and `labels`, or with the reason why it has none."""
    encoded, error = {"input_ids": [], "labels": [], "exchanges_dropped": 0}, row["error"]
    if not error:
        try:
            encoded = encode_conversation(json.loads(row["messages"]), tokenizer, model_max_length)
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
    content = [digests, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, model_max_length]
    content_hash = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    code_hash = hashlib.sha256(json.dumps([paths, Path(__file__).read_text("utf-8")]).encode()).hexdigest()[:16]
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
    """Training rows, held-out rows (None without any) and a summary of what was found in them.

    No conversation stands on both sides: its copies leave the training rows.

    Args:
        bad_rows_file: where skipped rows are written; None on all processes but the first.
    """
    rows, content_hash = load_encoded(data_args.data_path, tokenizer, data_args.model_max_length)
    if bad_rows_file:
        Path(bad_rows_file).unlink(missing_ok=True)
    rows, bad = take_out_bad_rows(rows, data_args.skip_bad_rows, bad_rows_file)
    keys = column(rows, "key")
    held_out = None
    if data_args.eval_data_path:
        held_out, eval_hash = load_encoded(data_args.eval_data_path, tokenizer, data_args.model_max_length)
        held_out, bad_held_out = take_out_bad_rows(held_out, data_args.skip_bad_rows, bad_rows_file)
        bad, content_hash = bad + bad_held_out, f"{content_hash}-{eval_hash}"
        is_copy = np.isin(keys, column(held_out, "key"))
        training_rows = rows.select(np.flatnonzero(~is_copy))
    elif data_args.validation_split:
        count = max(1, round(len(rows) * data_args.validation_split))
        chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:count])
        held_out = rows.select(chosen)
        is_copy = np.isin(keys, keys[chosen])
        is_copy[chosen] = False
        training_rows = rows.select(np.setdiff1d(np.flatnonzero(~is_copy), chosen))
    else:
        is_copy, training_rows = np.zeros(len(rows), bool), rows
    if not len(training_rows):
        raise UserError(f"no row is left to train on: {len(rows)} good rows, {is_copy.sum()} of them held out as well.")
    unused_keys = Counter(key for keys in rows["unused_keys"] for key in json.loads(keys))
    summary = {
        "content_hash": content_hash,
        "rows": len(training_rows),
        "held_out_rows": len(held_out) if held_out else 0,
        "bad_rows": bad,
        "copies_of_held_out_rows_removed": int(is_copy.sum()),
        "duplicates_kept": len(training_rows) - len(np.unique(column(training_rows, "key"))),
        "rows_that_lost_early_turns": int((column(training_rows, "exchanges_dropped") > 0).sum()),
        "unused_keys": dict(unused_keys),
        "tokens": int(column(training_rows, "length").sum()),
        "supervised_tokens": int(column(training_rows, "supervised").sum()),
    }
    return training_rows, held_out, summary
