"""Tables of texts and labels -> checked rows: one encoding a file, whatever Excel exports, no text on two sides.

files -> read_cells -> read_table (rows checked) -> split_in_blocks (one table) -> clean_splits (no copies, no leaks)
"""

import codecs
import csv
import hashlib
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd

MAX_CHARACTERS = 100_000  # in one cell; more is a quote that was never closed, not a text to classify
COLUMNS = ["text", "label", "source", "reason"]


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
    """The `.csv` / `.tsv` files of a file or folder, by name; raises UserError where there is none."""
    path = Path(data_path)
    if path.is_file() and path.suffix.lower() not in (".csv", ".tsv"):
        raise UserError(f"{data_path}: neither .csv nor .tsv; in Excel: save as 'CSV UTF-8'.")
    if path.is_file():
        return [str(path)]
    if not path.is_dir():
        raise UserError(f"{data_path}: there is no such file or folder; check --data_path / DATA.")
    files = sorted(
        str(file)
        for file in path.rglob("*")
        if file.suffix.lower() in (".csv", ".tsv")
        and not any(part.startswith(".") for part in file.relative_to(path).parts)  # Jupyter's and the system's copies
    )
    if not files:
        raise UserError(f"{data_path}: the folder holds no .csv or .tsv file.")
    return files


def check_one_encoding(path: str) -> None:
    """Raises UserError for a file of GB18030 that has lines of UTF-8 in it.

    Read as GB18030 such a line becomes other characters, mostly without an error. The other way round, no more than a
    character or two of GB18030 pass for Chinese in UTF-8.
    """
    kinds = {}  # is UTF-8 -> first such line; a few characters alone don't tell
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.isascii():
                continue
            try:
                if len(re.findall("[\u4e00-\u9fff]", line.decode("utf-8"))) > 2:
                    kinds.setdefault(True, number)
            except UnicodeDecodeError:
                kinds.setdefault(False, number)
    if len(kinds) == 2:
        raise UserError(
            f"{path}: two encodings in one file, GB18030 in line {kinds[False]} and UTF-8 in line {kinds[True]}. "
            "Save each part as UTF-8 and join them again."
        )


def read_cells(path: str, columns: tuple[str, ...]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header of a table, and (first line, cells) of each row that is not blank.

    Raises:
        UserError: no such column (names those there are), quotes that don't close, or an encoding that can't be read.
    """
    try:
        encoding, _ = detect_encoding(path)
    except UserError:
        check_one_encoding(path)
        raise
    if encoding == "gb18030":
        check_one_encoding(path)
    csv.field_size_limit(sys.maxsize)
    rows = []
    start = 1
    with open(path, encoding=encoding, newline="") as file:
        delimiter = find_delimiter(file.readline(), columns[0])
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            for column in columns:
                if header.count(column) != 1:
                    raise UserError(
                        f"{path}: no column {column!r}, or more than one; there are {', '.join(header) or 'none'}. "
                        "Name yours by --text_column and --label_column."
                    )
            start = reader.line_num + 1
            for cells in reader:
                if cells:
                    rows.append((start, cells))
                start = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}:{start}: the row that begins here has broken quotes ({error}).") from None
    return header, rows


def read_table(path: str, text_column: str, label_column: str) -> pd.DataFrame:
    """Every row of a table, good or bad: text, label, source ("file:line") and, for a bad one, the reason.

    A reason is its kind, and after a colon what there is to say about the one row.

    Raises:
        UserError: see `read_cells`.
    """
    header, rows = read_cells(path, (text_column, label_column))
    places = (header.index(text_column), header.index(label_column))
    table = []
    for line, cells in rows:
        text, label, reason = check_cells(cells, len(header), *places)
        table.append((text, label, f"{path}:{line}", reason))
    return pd.DataFrame(table, columns=COLUMNS)


def find_delimiter(header: str, text_column: str) -> str:
    """Comma, tab or semicolon: the one between which the text column's name stands, else the comma."""
    for delimiter in ",\t;":
        if text_column in [name.strip().strip('"') for name in header.split(delimiter)] and delimiter in header:
            return delimiter
    return ","


def clean_label(label: str) -> str:
    """Without space around it; Excel's 1.0 is the label 1."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", label.strip())


def check_cells(cells: list[str], width: int, text_place: int, label_place: int) -> tuple[str, str, str]:
    """Text, label and what is wrong with a row, if anything."""
    if len(cells) != width:
        return "", "", f"wrong number of cells: {len(cells)}, the header has {width}; a comma in a text needs quotes"
    text, label = cells[text_place].strip(), clean_label(cells[label_place])
    if not text:
        return text, label, "empty text"
    if not label:
        return text, label, "empty label"
    if len(text) > MAX_CHARACTERS:
        return text[:100], label, f"too long a cell: {len(text)} characters; is a quote missing?"
    return text, label, ""


def sort_labels(labels) -> list[str]:
    """Classes in the order of their ids: numbers by value, words by the alphabet."""
    labels = sorted(set(labels))
    return sorted(labels, key=int) if all(re.fullmatch(r"-?\d+", label) for label in labels) else labels


def normalize(text: str) -> str:
    """What two texts share that a reader would call the same: no case, width, space or punctuation counts."""
    text = unicodedata.normalize("NFKC", text).lower()
    return re.sub(r"[\W_]+", "", text) or text.strip()


def split_in_blocks(table: pd.DataFrame, shares: dict[str, float], seed: int, num_blocks: int = 100):
    """The table in parts, each class cut into contiguous blocks, each of which is assigned as a whole.

    Neighbours in a file are often about the same thing; assigned one by one they would stand on both sides.

    Args:
        shares: part -> its share of the rows; what is left is "train".

    Returns:
        {"train": rows, ...}, the rows in the order of the table.
    """
    rng = np.random.default_rng(seed)
    part = pd.Series("train", index=table.index)
    for _, rows in table.groupby("label", sort=True):
        blocks = np.array_split(rows.index.to_numpy(), min(num_blocks, len(rows)))
        order = rng.permutation(len(blocks))
        start = 0
        for name, share in shares.items():
            left_for_training = len(blocks) - start - 1
            count = min(max(1, round(share * len(blocks))), left_for_training) if share else 0
            for block in order[start : start + count]:
                part[blocks[block]] = name
            start += count
    return {name: table[part == name] for name in ("train", *shares) if name == "train" or shares[name]}


def clean_splits(splits: dict[str, pd.DataFrame]) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """The splits without bad rows, texts of two classes, copies, and texts that stand on two sides.

    A copy leaves the training rows for the validation and test rows' sake, and the validation rows for the test rows'.

    Args:
        splits: in the order train, validation, test, of which the last two may be missing.

    Returns:
        The good rows of each split, and all that were removed, with `split` and `reason`.
    """
    cleaned, removed, elsewhere = {}, [], {}
    for name in reversed(splits):
        rows = splits[name].copy()
        rows["key"] = [normalize(text) for text in rows.text]
        usable = rows[rows.reason == ""]
        num_classes = usable.groupby("key").label.nunique()
        in_several = usable[usable.key.isin(num_classes.index[num_classes > 1])]
        classes = in_several.groupby("key").label.unique().map(" and ".join).to_dict()
        first, reasons = {}, {}
        for index, key, source in zip(usable.index, usable.key, usable.source, strict=True):
            if key in elsewhere:
                reasons[index] = f"in another split as well: {elsewhere[key]}"
            elif key in classes:
                reasons[index] = f"in several classes: {classes[key]}"
            elif first.setdefault(key, source) != source:
                reasons[index] = f"a copy: of {first[key]}"
        rows["reason"] = [reasons.get(index, reason) for index, reason in rows.reason.items()]
        removed.append(rows[rows.reason != ""].assign(split=name))
        cleaned[name] = rows[rows.reason == ""].drop(columns="reason")
        elsewhere |= dict(zip(cleaned[name].key, cleaned[name].source, strict=True))
    return {name: cleaned[name] for name in splits}, pd.concat(removed[::-1])
