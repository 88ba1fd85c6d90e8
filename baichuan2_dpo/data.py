"""Checked pairs -> token ids of prompt, chosen and rejected reply, cached -> training and validation pairs.

pairs.read_pairs -> encode_pair (the tokenizer's own chat template; both replies behind the same prompt)
                 -> load_splits (cached by content, no prompt on both sides)
"""

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
from pairs import read_pairs
from rows import UserError
from template import IGNORE_INDEX, encode_conversation, read_tokenizer

CACHE_DIR = Path(__file__).parent / "cache_data"
TEXT_FEATURES = {name: Value("string") for name in ("source", "error", "raw", "unused_keys")}
PAIR_FEATURES = Features(TEXT_FEATURES | {name: Value("string") for name in ("prompt", "chosen", "rejected", "tools")})
COUNTS = ("prompt_length", "chosen_length", "length", "supervised", "exchanges_dropped", "tokens_cut")
ENCODED_FEATURES = Features(
    TEXT_FEATURES
    | {name: List(Value("int32")) for name in ("input_ids", "labels")}
    | {name: Value("int64") for name in (*COUNTS, "row", "pair")}
    | {"key": Value("string")}
)


def encode_reply(messages: list[dict], reply: dict, tokenizer, tools) -> tuple[list[int], list[int]]:
    """Token ids of the prompt as it is served and of one reply up to its stop token."""
    earlier = [message | {"weight": 0} if message["role"] == "assistant" else message for message in messages]
    example = encode_conversation([*earlier, reply], tokenizer, tools)[-1]
    start = next(i for i, label in enumerate(example["labels"]) if label != IGNORE_INDEX)
    return example["input_ids"][:start], example["input_ids"][start:]


def encode_pair(
    messages: list[dict], replies: list[dict], tokenizer, max_length: int, max_prompt_length: int, tools=None
) -> dict:
    """Token ids of a prompt and its two replies.

    A prompt of more than `max_prompt_length` tokens loses its oldest exchanges, the same ones for both replies; a
    reply is cut at the end where prompt and reply have more than `max_length`, and keeps a token at least.

    Args:
        replies: the chosen and the rejected message.

    Returns:
        `input_ids` (prompt, chosen, rejected, one after the other), `labels` (-100 on the prompt), `prompt_length`,
        `chosen_length`, `exchanges_dropped`, `tokens_cut`.

    Raises:
        UserError: as `encode_conversation`; the newest exchange alone is too long; or the template writes another
            prompt before the one reply than before the other.
    """
    roles = [message["role"] for message in messages]
    starts = [i for i, role in enumerate(roles) if role == "user" and roles[i - 1 : i] != ["user"]]

    def encode_without(exchanges: int) -> tuple[list[int], list[list[int]]]:
        kept = messages[: starts[0]] + messages[starts[exchanges] :] if exchanges else messages
        prompts, encoded = zip(*(encode_reply(kept, reply, tokenizer, tools) for reply in replies), strict=True)
        if prompts[0] != prompts[1]:
            raise UserError("the chat template writes another prompt before the one reply than before the other")
        return prompts[0], list(encoded)

    limit, newest = min(max_prompt_length, max_length - 1), len(starts) - 1
    prompt, encoded = encode_without(0)
    dropped = 0
    if len(prompt) > limit and newest > 0:
        dropped = bisect.bisect_left(range(newest), True, lo=1, key=lambda n: len(encode_without(n)[0]) <= limit)
        prompt, encoded = encode_without(dropped)
    if len(prompt) > limit:
        raise UserError(f"{len(prompt)} tokens in its newest question, of {limit} that a prompt may have")
    chosen, rejected = (reply[: max_length - len(prompt)] for reply in encoded)
    if chosen == rejected:
        raise UserError(f"both replies are the same up to {max_length} tokens")
    return {
        "input_ids": [*prompt, *chosen, *rejected],
        "labels": [IGNORE_INDEX] * len(prompt) + chosen + rejected,
        "prompt_length": len(prompt),
        "chosen_length": len(chosen),
        "exchanges_dropped": dropped,
        "tokens_cut": sum(map(len, encoded)) - len(chosen) - len(rejected),
    }


def digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def encode_row(row: dict, tokenizer, max_length: int, max_prompt_length: int) -> dict:
    """A row of `read_pairs` with the ids of `encode_pair`; without any, and why, if bad.

    Its `key` is the prompt's hash, its `pair` that of its ids, under which its reference log-probabilities are kept.
    """
    prompt, tools = row.pop("prompt"), row.pop("tools")
    replies = [row.pop("chosen"), row.pop("rejected")]
    encoded = {"input_ids": [], "labels": [], **dict.fromkeys(COUNTS, 0)}
    if not row["error"]:
        try:
            messages, replies, functions = json.loads(prompt), list(map(json.loads, replies)), json.loads(tools)
            encoded |= encode_pair(messages, replies, tokenizer, max_length, max_prompt_length, functions)
        except UserError as reason:
            row |= {"error": str(reason), "raw": json.dumps([prompt, *replies], ensure_ascii=False)}
    counts = {"length": len(encoded["input_ids"]), "supervised": sum(map(IGNORE_INDEX.__ne__, encoded["labels"]))}
    pair = int(digest(encoded["input_ids"], encoded["prompt_length"], encoded["chosen_length"])[:15], 16)
    return row | encoded | counts | {"key": digest(prompt, tools), "pair": pair}


def encode_rows(rows: dict[str, list], numbers: list[int], tokenizer, max_length, max_prompt_length) -> dict[str, list]:
    """The same for a batch of rows and their numbers, by column."""
    encoded = []
    for number, values in zip(numbers, zip(*rows.values(), strict=True), strict=True):
        row = encode_row(dict(zip(rows, values, strict=True)), tokenizer, max_length, max_prompt_length)
        encoded.append(row | {"row": number})
    return {name: [row[name] for row in encoded] for name in ENCODED_FEATURES}


def check_saved_tokenizer(rows: Dataset, tokenizer, lengths: tuple[int, int], folder: str) -> None:
    """Raises UserError where the tokenizer, once saved in `folder` and read again, encodes these rows otherwise."""
    tokenizer.save_pretrained(folder)
    saved = read_tokenizer(folder, trust_remote_code=True)
    saved.name_or_path = tokenizer.name_or_path  # whose generation_config names the stop tokens
    for row in rows:
        found, expected = (encode_row(dict(row), each, *lengths) for each in (saved, tokenizer))
        if found != expected:
            raise UserError(
                f"{row['source']}: the tokenizer, saved and read again, encodes this row otherwise, so the model "
                "would be served with another one. Save it once by the version of Transformers that wrote it."
            )


def load_encoded(data_path: str, tokenizer, lengths: tuple[int, int]) -> tuple[Dataset, str]:
    """All pairs of a path, bad rows among them: the first process to come tokenises, the others read its cache.

    Args:
        lengths: `max_length` and `max_prompt_length` of `encode_pair`.

    Returns:
        The pairs of `encode_rows`, and a hash of what they are made of (files, tokenizer, template, lengths).
    """
    paths = list_files(data_path)
    encodings, digests = zip(*map(identify_file, paths), strict=True)
    content = [digests, tokenizer.backend_tokenizer.to_str(), str(tokenizer.special_tokens_map)]
    content_hash = digest(*content, tokenizer.chat_template, lengths)[:16]
    modules = ("files.py", "rows.py", "pairs.py", "template.py", "data.py")
    code_hash = digest(paths, [Path(__file__).with_name(name).read_text("utf-8") for name in modules])[:16]
    folder = CACHE_DIR / f"{content_hash}-{code_hash}"
    CACHE_DIR.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"), tempfile.TemporaryDirectory(dir=CACHE_DIR) as scratch:
        if not folder.exists():
            try:
                rows = Dataset.from_generator(
                    read_pairs,
                    features=PAIR_FEATURES,
                    gen_kwargs={"paths": paths, "encodings": list(encodings)},
                    cache_dir=scratch,
                    fingerprint=folder.name,
                )
            except DatasetGenerationError as error:
                raise error.__cause__ from None
            good = rows.select(np.flatnonzero(np.array(rows["error"]) == "")[:100])
            check_saved_tokenizer(good, tokenizer, lengths, f"{scratch}/tokenizer")
            encoded = rows.map(
                encode_rows,
                batched=True,
                with_indices=True,
                fn_kwargs={"tokenizer": tokenizer, "max_length": lengths[0], "max_prompt_length": lengths[1]},
                remove_columns=rows.column_names,
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
    """Training pairs, validation pairs (None without any) and a summary of what was found in them.

    No prompt stands on both sides: other pairs of a validation pair's prompt leave the training pairs.

    Args:
        bad_rows_file: where skipped rows are written; None on all processes but the first.
    """
    lengths = (data_args.model_max_length, data_args.max_prompt_length or data_args.model_max_length)
    rows, content_hash = load_encoded(data_args.data_path, tokenizer, lengths)
    if bad_rows_file:
        Path(bad_rows_file).unlink(missing_ok=True)
    rows, bad = take_out_bad_rows(rows, data_args.skip_bad_rows, bad_rows_file)
    keys, validation = column(rows, "key"), None
    held_out = np.zeros(len(rows), bool)
    if data_args.eval_data_path:
        validation, eval_hash = load_encoded(data_args.eval_data_path, tokenizer, lengths)
        validation, bad_validation = take_out_bad_rows(validation, data_args.skip_bad_rows, bad_rows_file)
        bad, content_hash = bad + bad_validation, f"{content_hash}-{eval_hash}"
        held_out = np.isin(keys, column(validation, "key"))
    elif data_args.validation_split:
        prompts = np.unique(keys)
        count = max(1, round(len(prompts) * data_args.validation_split))
        held_out = np.isin(keys, np.random.default_rng(seed).permutation(prompts)[:count])
        validation = rows.select(np.flatnonzero(held_out))
    training_rows = rows.select(np.flatnonzero(~held_out))
    copies = int(held_out.sum()) if data_args.eval_data_path else 0
    if not len(training_rows):
        raise UserError(
            f"no pair is left to train on: {len(rows)} good ones, whose prompts are all validation pairs' too. "
            "Give more rows, or --validation_split 0 to validate on none."
        )
    summary = {
        "content_hash": content_hash,
        "rows": len(training_rows),
        "validation_rows": len(validation) if validation else 0,
        "bad_rows": bad,
        "copies_of_validation_rows_removed": copies,
        "duplicates_kept": len(training_rows) - len(np.unique(column(training_rows, "pair"))),
        "rows_split_by_turn": 0,
        "rows_that_lost_early_turns": int((column(training_rows, "exchanges_dropped") > 0).sum()),
        "rows_with_a_reply_cut": int((column(training_rows, "tokens_cut") > 0).sum()),
        "unused_keys": dict(Counter(key for keys in training_rows["unused_keys"] for key in json.loads(keys))),
        "files_not_read": list_unread_files(data_args.data_path),
        "tokens": int(column(training_rows, "length").sum()),
        "supervised_tokens": int(column(training_rows, "supervised").sum()),
    }
    return training_rows, validation, summary
