"""Files of conversations -> checked rows: one encoding a file, three formats, every row good or bad with its reason."""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import codecs
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


# >>> encoding
class UserError(ValueError):
    """What is wrong with what the user gave, where, and what to do about it; printed without a traceback."""


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


# <<< encoding


# >>> json
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


# <<< json


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
        question, addition, history = row["instruction"], row.get("input") or "", row.get("history") or []
        if not isinstance(question, str) or not isinstance(addition, str):
            raise UserError("instruction and input are strings")
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise UserError("history is a list of [question, answer] pairs")
        pairs = [*history, (f"{question}\n{addition}" if addition else question, row["output"])]
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
        role = ROLES.get(message["role"]) if isinstance(message["role"], str) else None
        if role is None:
            raise UserError(f"message {number}: unknown role {message['role']!r}, known are {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise UserError(f"message {number} ({role}): the text is {type(message['content']).__name__}, not a string")
        if not message["content"].strip():
            raise UserError(f"message {number} ({role}): the text is empty")
        if any("\ud800" <= character <= "\udfff" for character in message["content"]):
            raise UserError(f"message {number} ({role}): a lone surrogate (a \\ud... without its other half)")
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
