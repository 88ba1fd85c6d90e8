"""Files of prompts -> checked rows: one encoding a file, every row good or bad with its reason."""

import codecs
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path


# >>> encoding
class UserError(ValueError):
    """What is wrong with what the user gave, where, and what to do about it; printed without a traceback."""


def detect_encoding(path: str, open_file=open) -> tuple[str, str]:
    """A file's encoding (UTF-8, else GB18030, strictly) and SHA-256; raises UserError with the bad byte's offset."""
    first_error = None
    for encoding in ("utf-8-sig", "gb18030"):
        decoder, digest, position = codecs.getincrementaldecoder(encoding)(), hashlib.sha256(), 0
        try:
            with open_file(path, "rb") as file:
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


# <<< encoding


def list_files(data_path: str) -> list[str]:
    """The `.json` / `.jsonl` files of a file or folder, by name; raises UserError where there is none."""
    path = Path(data_path)
    if path.is_file():
        return [str(path)]
    if not path.is_dir():
        raise UserError(f"{data_path}: there is no such file or folder; check --data_path / DATA.")
    files = sorted(
        str(file)
        for file in path.rglob("*")
        if file.suffix.lower() in (".json", ".jsonl")
        and not any(part.startswith(".") for part in file.relative_to(path).parts)  # Jupyter's and the system's copies
    )
    if not files:
        raise UserError(f"{data_path}: the folder holds no .json or .jsonl file.")
    return files


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
    try:
        yield from read_array(text, text.index("["))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: no JSON: {error.msg}") from None


def read_array(text: str, position: int) -> Iterator[tuple[int, object, str]]:
    """Yields (line number, value, its text) of the JSON array that starts at `position` and ends the text.

    Raises:
        json.JSONDecodeError: where the text is no such array.
    """
    decoder, number, counted = json.JSONDecoder(), 1, 0
    position = skip_space(text, position + 1)
    while text[position : position + 1] != "]":
        number, counted = number + text.count("\n", counted, position), position
        value, end = decoder.raw_decode(text, position)
        yield number, value, text[position:end]
        position = skip_space(text, end)
        if text[position : position + 1] == ",":
            position = skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise json.JSONDecodeError("a comma or ] is missing", text, position)
    if (rest := skip_space(text, position + 1)) < len(text):
        raise json.JSONDecodeError("there is more after the end of the array", text, rest)


def skip_space(text: str, position: int) -> int:
    """The first position at or after the given one that is not JSON's white space."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def check_prompt(row: object) -> tuple[list[dict], object, str]:
    """Messages, ground truth and data source of a row, in the recipe's own form or in that of verl's parquet files.

    `{"prompt": "..." or messages, "ground_truth": ..., "data_source": "..."}`, or `{"prompt": messages,
    "reward_model": {"ground_truth": ...}, "data_source": "..."}`.

    Raises:
        UserError: what the row lacks, in words.
    """
    if not isinstance(row, dict):
        raise UserError(f"a row is a JSON object, this is a {type(row).__name__}")
    prompt, reward_model = row.get("prompt"), row.get("reward_model")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError("prompt is a text, or a list of messages with role and content")
    for number, message in enumerate(messages, start=1):
        if message.get("role") not in ("system", "user", "assistant"):
            raise UserError(f"message {number}: unknown role {message.get('role')!r}: system, user or assistant")
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise UserError(f"message {number} ({message['role']}): the text is empty or no string")
    if not messages or messages[-1]["role"] != "user":
        raise UserError("the last message of the prompt must be the user's")
    ground_truth = reward_model.get("ground_truth") if isinstance(reward_model, dict) else row.get("ground_truth")
    if ground_truth is None:
        raise UserError("no ground_truth, so no completion can be scored")
    if not isinstance(row.get("data_source", ""), str) or not isinstance(row.get("extra_info") or {}, dict):
        raise UserError("data_source is a string and extra_info an object")
    return messages, ground_truth, row.get("data_source", "")
