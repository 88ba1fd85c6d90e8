"""Files -> records: .json, .jsonl (also .gz), .csv, .tsv and .parquet, each record with its line."""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import codecs
import csv
import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path

import pyarrow.parquet

ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".tsv", ".parquet")


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


def identify_file(path: str) -> tuple[str, str]:
    """A file's encoding ("" for Parquet) and the SHA-256 of what is in it; see `detect_encoding`.

    Raises:
        UserError: the encoding can't be told, or a compressed file is broken.
    """
    if path.lower().endswith(".parquet"):
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return "", digest.hexdigest()
    try:
        return detect_encoding(path, opener(path))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: the compressed file is broken ({error}). Copy it again.") from None


def opener(path: str):
    return gzip.open if path.lower().endswith(".gz") else open


def list_files(data_path: str) -> list[str]:
    """The files of a folder that can be read, by name, or the one file; raises UserError where there is none."""
    path = Path(data_path)
    if path.is_file() and path.name.lower().endswith(ENDINGS):
        return [str(path)]
    if path.is_file():
        raise UserError(f"{data_path}: can't be read; give one of {', '.join(ENDINGS)}.")
    if not path.is_dir():
        raise UserError(f"{data_path}: there is no such file or folder; check --data_path / DATA.")
    files = [name for name in walk(path) if name.lower().endswith(ENDINGS)]
    if not files:
        raise UserError(f"{data_path}: the folder holds none of {', '.join(ENDINGS)}.")
    return files


def list_unread_files(data_path: str) -> list[str]:
    """The files of a folder that `list_files` leaves out, by name."""
    return [name for name in walk(Path(data_path)) if not name.lower().endswith(ENDINGS)]


def walk(folder: Path) -> list[str]:
    """All files below a folder but hidden ones, such as Jupyter's and the system's copies."""
    return sorted(
        str(file)
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def read_records(path: str, encoding: str) -> Iterator[tuple[int, object, str]]:
    """Yields (line or row number, record or UserError, its text) of a file.

    Raises:
        UserError: the file is broken, with its line (what follows cannot be told apart any more).
    """
    name = path.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        yield from read_parquet(path)
    elif name.endswith((".csv", ".tsv")):
        yield from read_csv(path, encoding)
    else:
        yield from read_json(path, encoding)


def describe(value: object) -> str:
    """What JSON has no form for, in words: a date; of bytes, which may be a picture, their number."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)


def read_parquet(path: str) -> Iterator[tuple[int, object, str]]:
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for record in batch.to_pylist():
                number += 1
                yield number, record, json.dumps(record, ensure_ascii=False, default=describe)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: no Parquet file, or a broken one: {str(error).splitlines()[0]}") from None


def read_csv(path: str, encoding: str) -> Iterator[tuple[int, object, str]]:
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding=encoding, newline="") as file:
        header = file.readline()
        file.seek(0)
        reader = csv.reader(file, delimiter=max(",\t;", key=header.count), strict=True)
        names, line = [name.strip() for name in next(reader, [])], reader.line_num + 1
        try:
            for cells in reader:
                text = json.dumps(cells, ensure_ascii=False)
                if len(cells) > len(names):
                    yield line, UserError(f"{len(cells)} cells, the header has {len(names)}"), text
                elif any(cells):  # Excel writes an empty line as ",,,"
                    yield line, {name: cell for name, cell in zip(names, cells, strict=False) if cell}, text
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}:{line}: the row that begins here has broken quotes ({error}).") from None


def read_json(path: str, encoding: str) -> Iterator[tuple[int, object, str]]:
    """One JSON object a line, an array of them, one object over several lines, or `{"data": [...]}`."""
    with opener(path)(path, "rt", encoding=encoding) as file:
        first = next((line for line in file if line.strip()), "")
        file.seek(0)
        if not first.lstrip().startswith("[") and not goes_on(first):
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, parse(line), line
            return
        text = file.read()
    start = skip_space(text, 0)
    try:
        end = yield from (read_array if text[start] == "[" else read_object)(text, start)
        if (rest := skip_space(text, end)) < len(text):
            raise json.JSONDecodeError("there is more after its end", text, rest)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: no JSON: {error.msg}") from None


def goes_on(line: str) -> bool:
    """Whether a line is the beginning of JSON that goes over several."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return bool(line.strip()) and not line[error.pos :].strip()
    except (ValueError, RecursionError):
        return False
    return False


def parse(text: str) -> object:
    """The value of a JSON text; a UserError (not raised) where it is none, or one that Python can't hold."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return UserError(f"no JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        return UserError(f"JSON that can't be read: {error}")


def decode(text: str, position: int) -> tuple[object, int]:
    """The JSON value at `position`, and where it ends; raises json.JSONDecodeError."""
    try:
        return json.JSONDecoder().raw_decode(text, position)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise json.JSONDecodeError(f"can't be read: {error}", text, position) from None


def read_array(text: str, position: int) -> Generator[tuple[int, object, str], None, int]:
    """Yields (line number, value, its text) of the JSON array that starts at `position`; returns where it ends.

    Raises:
        json.JSONDecodeError: where the text is no such array.
    """
    number, counted = 1, 0
    position = skip_space(text, position + 1)
    while text[position : position + 1] != "]":
        number, counted = number + text.count("\n", counted, position), position
        value, end = decode(text, position)
        yield number, value, text[position:end]
        position = skip_space(text, end)
        if text[position : position + 1] == ",":
            position = skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise json.JSONDecodeError("a comma or ] is missing", text, position)
    return position + 1


def read_object(text: str, position: int) -> Generator[tuple[int, object, str], None, int]:
    """Yields the object itself, or the rows of its `data`, as `read_array` does."""
    value, end = decode(text, position)
    if not isinstance(value, dict) or not isinstance(value.get("data"), list):
        yield text.count("\n", 0, position) + 1, value, text[position:end]
        return end
    while text[position : position + 1] in "{,":  # to the place of the array, for the lines of its rows
        name, position = decode(text, skip_space(text, position + 1))
        position = skip_space(text, skip_space(text, position) + 1)
        if name == "data":
            yield from read_array(text, position)
        position = skip_space(text, decode(text, position)[1])
    return end


def skip_space(text: str, position: int) -> int:
    """The first position at or after the given one that is not JSON's white space."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
