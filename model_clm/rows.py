"""Raw files -> documents, one at a time: .txt, .jsonl, .json (each also .gz, .zst) and .parquet of any size.

What a document is: in a .txt what stands between blank lines, or the whole file, or what stands between a separator of
yours; elsewhere a record. Texts are as in the file, but for the line ends around a document.
"""

import codecs
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow
import pyarrow.parquet

TEXT_ENDINGS = tuple(kind + packed for kind in (".txt", ".jsonl", ".json") for packed in ("", ".gz", ".zst"))
ENDINGS = (*TEXT_ENDINGS, ".parquet")
CODECS = {".gz": "gzip", ".zst": "zstd"}
TEXT_KEYS = ("text", "content")
HEAD = 1 << 22  # bytes that an encoding is told by
CHUNK = 1 << 20  # bytes read at once
PACKED_CHUNK = 1 << 16  # of a packed file, which tells where it ends early to within so many
LONGEST = 1 << 22  # characters of a document that is held in memory whole
SPACE = re.compile(r"[ \t\r\n]*")
BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


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


def walk(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones, such as Jupyter's and the system's copies, by name."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def list_files(corpus: str) -> list[tuple[str, str]]:
    """The source and the path of each file of a folder that can be read, or of the one file.

    A source is a sub-folder, or a file without its endings and numbers: `part-00001.jsonl.gz` belongs to `part`.

    Raises:
        UserError: there is nothing that can be read.
    """
    path = Path(corpus)
    if not path.exists():
        raise UserError(f"{corpus}: there is no such file or folder.")
    base, files = (path, walk(path)) if path.is_dir() else (path.parent, [path])
    found = []
    for file in files:
        if file.name.lower().endswith(ENDINGS):
            first, *rest = file.relative_to(base).parts
            stem = re.sub(r"(\.(txt|jsonl|json|parquet|gz|zst))+$", "", first, flags=re.IGNORECASE)
            found.append((first if rest else re.sub(r"([-_.]\d+|-of)+$", "", stem) or stem, str(file)))
    if not found:
        raise UserError(f"{corpus}: none of {', '.join(ENDINGS)} in it.")
    return found


def list_unread_files(corpus: str) -> list[str]:
    """The files of a folder that `list_files` leaves out."""
    return [str(file) for file in walk(Path(corpus)) if not file.name.lower().endswith(ENDINGS)]


def open_stream(path: str):
    """A file's bytes, unpacked. pyarrow unpacks, since zstandard ends a truncated file without an error."""
    codec = CODECS.get(Path(path).suffix.lower())
    return pyarrow.CompressedInputStream(pyarrow.OSFile(path), codec) if codec else open(path, "rb")


def read_chunks(path: str) -> Iterator[bytes]:
    """A file's bytes, unpacked, in bounded pieces.

    Raises:
        UserError: a NUL, or a packed file that is broken or ends early, with the offset.
    """
    packed, offset = Path(path).suffix.lower() in CODECS, 0
    size, unpacked = (min(CHUNK, PACKED_CHUNK), " of what it unpacks to") if packed else (CHUNK, "")
    with open_stream(path) as file:
        while True:
            try:
                chunk = file.read(size)
            except OSError as error:
                where = f"behind byte {offset}{unpacked}"
                raise UserError(f"{path}: broken, or ends early, {where} ({error}). Copy it again.") from None
            if not chunk:
                return
            if b"\0" in chunk:
                place = offset + chunk.index(b"\0")
                raise UserError(f"{path}: NUL at byte {place}{unpacked}: UTF-16 or binary? Save the file as UTF-8.")
            offset += len(chunk)
            yield chunk


def refuse_lines_of_utf8(path: str, raw: bytes) -> None:
    """Raises UserError where a line of what was taken for GB18030 is UTF-8: one bad byte in a file of UTF-8.

    Most Chinese of UTF-8 can be read as GB18030, as other characters; the other way round no line has two Chinese ones.
    """
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line.isascii() and len(re.findall("[\u4e00-\u9fff]", line.decode(errors="ignore"))) > 1:
            with suppress(UnicodeDecodeError):
                line.decode()
                raise UserError(f"{path}:{number}: is UTF-8, but not all lines are. Save the file as UTF-8.")


def read_text(path: str) -> Iterator[tuple[str, int]]:
    """A file's text in pieces, each with the offset of the byte behind it; UTF-8, else GB18030, strictly.

    The first four megabytes tell which, and the rest has to keep to it.

    Raises:
        UserError: as `read_chunks`, or a byte that is of neither encoding, or not of the one that the file began in.
    """
    chunks, head = read_chunks(path), b""
    for chunk in chunks:
        head += chunk
        if len(head) >= HEAD:
            break
    whole_lines = head[: head.rfind(b"\n") + 1] if len(head) >= HEAD else head
    encoding, _ = detect_encoding(path, lambda *_: io.BytesIO(whole_lines))
    if encoding == "gb18030":
        refuse_lines_of_utf8(path, whole_lines)
    decoder, offset = codecs.getincrementaldecoder(encoding)(), 0
    for chunk in itertools.chain([head], chunks, [b""]):  # at the empty one a decoder refuses half a character
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            place, name = offset - pending + error.start, encoding.removesuffix("-sig").upper()
            raise UserError(
                f"{path}: byte {place} is not {name}, as what stands before it is. Save the file as UTF-8."
            ) from None
        offset += len(chunk)
        yield text, offset


def read_blocks(path: str, border: re.Pattern) -> Iterator[str]:
    """A file's text in blocks that end behind a border, at the file's end, or else behind a line of LONGEST characters.

    Raises:
        UserError: as `read_text`, or a line of more than LONGEST characters.
    """
    rest = ""
    for text, offset in read_text(path):
        searched = max(0, len(rest) - 64 - len(border.pattern))
        rest += text
        end = max((match.end() for match in border.finditer(rest, searched)), default=0)
        while not end and len(rest) > LONGEST:
            cut = rest.rfind("\n", 0, LONGEST) + 1
            if not cut:
                raise UserError(
                    f"{path}: a line of more than {LONGEST:,} characters; it goes on at byte {offset}, and there is no "
                    "document, no record and no line to end it. Break it up."
                )
            yield rest[:cut]
            rest = rest[cut:]
        if end:
            yield rest[:end]
            rest = rest[end:]
    yield rest


def split_text(path: str, separator: str) -> Iterator[tuple[str, str]]:
    """Yields (`file:line`, document) of a text file; a longer document than LONGEST is cut behind a line.

    Args:
        separator: `blank_line`, `file`, or the text that stands between two documents.

    Raises:
        UserError: as `read_blocks`.
    """
    patterns = {"blank_line": BLANK_LINES, "file": re.compile("(?!)")}  # the latter matches nowhere
    border, line = patterns.get(separator) or re.compile(re.escape(separator)), 1
    for block in read_blocks(path, border):
        position = 0
        for match in [*border.finditer(block), None]:
            start, end = match.span() if match else (len(block), len(block))
            text = block[position:start].lstrip("\r\n")
            if text and not text.isspace():
                yield f"{path}:{line + block.count(chr(10), position, start - len(text))}", text.rstrip("\r\n")
            line += block.count("\n", position, end)
            position = end


def read_lines(path: str) -> Iterator[tuple[str, object]]:
    """Yields (`file:line`, the line's JSON value, or a UserError where it is none)."""
    line = 0
    for block in read_blocks(path, re.compile("\n")):
        for text in block.split("\n")[: -1 if block.endswith("\n") else None]:
            line += 1
            if text and not text.isspace():
                try:
                    yield f"{path}:{line}", json.loads(text)
                except (ValueError, RecursionError) as error:
                    yield f"{path}:{line}", UserError(f"no JSON: {error}")


def read_values(path: str) -> Iterator[tuple[str, object]]:
    """Yields (`file record n`, value) of one JSON array, or of JSON values one after another; one is held at a time.

    Raises:
        UserError: as `read_text`, or it is no JSON, or a value is longer than LONGEST.
    """
    decoder, rest, position, number, state = json.JSONDecoder(), "", 0, 0, "begin"
    for text, offset in read_text(path):
        rest, position = rest[position:] + text, 0
        while True:
            position = SPACE.match(rest, position).end()
            sign = rest[position : position + 1]
            if not sign:
                break
            if state == "begin" and sign == "[":
                state, position = "first", position + 1
            elif state in ("first", "behind") and sign == "]":
                state, position = "end", position + 1
            elif state == "behind" and sign == ",":
                state, position = "next", position + 1
            else:
                problem = {"behind": "a comma or ] is missing", "end": "there is more after its end"}.get(state)
                try:
                    value, end = (None, 0) if problem else decoder.raw_decode(rest, position)
                except (ValueError, RecursionError) as error:
                    if text and len(rest) - position <= LONGEST:
                        break  # it may go on in the next piece
                    problem = str(error)
                if problem:
                    raise UserError(
                        f"{path}: no JSON behind record {number}, before byte {offset}: {problem} (or the record is "
                        f"longer than {LONGEST:,} characters). What follows can't be told apart."
                    )
                number, position = number + 1, end
                state = "begin" if state == "begin" else "behind"
                yield f"{path} record {number}", value
    if state not in ("begin", "end"):
        raise UserError(f"{path}: the array isn't closed behind record {number}: the file ends early. Copy it again.")


def read_parquet(path: str, text_key: str | None) -> Iterator[tuple[str, object]]:
    """Yields (`file row n`, the row's text and title) of a Parquet file, a batch at a time.

    Raises:
        UserError: it is broken or ends early.
    """
    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = [name for name in (text_key, *TEXT_KEYS, "title") if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=256, columns=names or None, use_threads=False):
            for record in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: no Parquet file, or one that is broken or ends early: behind row {number} of a file of "
            f"{Path(path).stat().st_size} bytes ({str(error).splitlines()[0]}). Copy it again."
        ) from None


def take_text(record: object, text_key: str | None) -> str:
    """A record's text: its `text_key`, or `text`, or `content` with its `title` on a line above.

    Raises:
        UserError: what is wrong with it, in words.
    """
    if isinstance(record, UserError):
        raise record
    if not isinstance(record, str | dict):
        raise UserError(f"a record is an object or a text, this is a {type(record).__name__}")
    text = record
    if isinstance(record, dict):
        key = text_key or next((key for key in TEXT_KEYS if key in record), None)
        if key not in record:
            wanted = text_key or " or ".join(TEXT_KEYS)
            raise UserError(f"no key {wanted} among {', '.join(sorted(record))}; name the text's by --text_key")
        text, title = record[key], record.get("title")
        if text is None:
            return ""
        if not isinstance(text, str):
            raise UserError(f"{key} holds a {type(text).__name__}, not a text")
        if key == "content" and text_key is None and isinstance(title, str) and title.strip():
            text = f"{title.strip()}\n{text}"
    if len(text) > LONGEST:
        raise UserError(f"a text of {len(text):,} characters, more than {LONGEST:,}; break it up")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("a lone surrogate (a \\ud... without its other half)") from None
    return text.strip("\r\n")


def read_documents(path: str, separator: str, text_key: str | None) -> Iterator[tuple[str, str | UserError]]:
    """Yields (place, document) of a file of any kind, or the place of a bad record and what is wrong with it.

    Raises:
        UserError: what follows can't be told apart any more, or can't be read at all.
    """
    name = re.sub(r"\.(gz|zst)$", "", path.lower())
    if name.endswith(".txt"):
        yield from split_text(path, separator)
        return
    if name.endswith(".parquet"):
        records = read_parquet(path, text_key)
    else:
        records = read_lines(path) if name.endswith(".jsonl") else read_values(path)
    for place, record in records:
        try:
            text = take_text(record, text_key)
        except UserError as error:
            yield place, error
            continue
        if text and not text.isspace():
            yield place, text
