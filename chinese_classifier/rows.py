"""Tables of texts and labels -> checked rows: one encoding a file, whatever Excel exports, no text on two sides.

files -> read_cells -> read_table (rows checked) -> clean_splits (no copies, no leaks) -> split_in_blocks (one table)
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
LINE_END = re.compile(r"\r\n|\r|\n")
MARKS = "[,.!?;:、。~\"'“”‘’()《》〈〉【】「」『』…—·]"  # between the parts of a sentence; in 36.5 and 3:1 they count
INVISIBLE = "[\\s\u200b\u2060\ufeff]"


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
    if not path.exists():
        raise UserError(f"{data_path}: there is no such file or folder; check --data_path / DATA.")
    files = [
        str(file)
        for file in ([path] if path.is_file() else path.rglob("*"))
        if file.suffix.lower() in (".csv", ".tsv")
        and not any(part.startswith(".") for part in file.relative_to(path).parts)  # Jupyter's and the system's copies
    ]
    if not files:
        where = "" if path.is_file() else " is in the folder"
        raise UserError(f"{data_path}: neither .csv nor .tsv{where}; in Excel: save as 'CSV UTF-8'.")
    return sorted(files)


def check_encoding(path: str) -> str:
    """A file's encoding: UTF-8 or GB18030.

    Raises:
        UserError: neither; lines of both, which GB18030 mostly reads without an error (a character or two prove
            nothing); Big5, which shows in characters that no text has.
    """
    data, first = Path(path).read_bytes(), {}  # encoding -> its first line
    for number, line in enumerate(data.decode("utf-8", "surrogateescape").split("\n"), start=1):
        if re.search("[\udc80-\udcff]", line):
            first.setdefault("GB18030", number)
        elif len(re.findall("[\u4e00-\u9fff]", line)) > 2:
            first.setdefault("UTF-8", number)
    if len(first) == 2:
        lines = " and ".join(f"{encoding} in line {first[encoding]}" for encoding in sorted(first))
        raise UserError(f"{path}: two encodings in one file, {lines}. Save each part as UTF-8 and join them again.")
    encoding, _ = detect_encoding(path)
    text = "" if encoding == "utf-8-sig" else data.decode(encoding)
    if private := re.search("[\ue000-\uf8ff]", text):
        line = text.count("\n", 0, private.start()) + 1
        raise UserError(f"{path}:{line}: not UTF-8, nor Chinese as GB18030: probably Big5. Save the file as UTF-8.")
    return encoding


def read_cells(path: str, columns: tuple[str, ...]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header of a table, and (first line, cells) of each row that is not blank.

    A `.tsv` is taken literally, as ChnSentiCorp and CLUE write it: a line is a row, a quote a character.

    Args:
        columns: that there must be; the first is the texts'.

    Raises:
        UserError: no such column (names those there are), quotes that don't close, or an encoding that can't be read.
    """
    csv.field_size_limit(sys.maxsize)
    encoding, literal = check_encoding(path), path.lower().endswith(".tsv")
    table, start = [], 1
    with open(path, encoding=encoding, newline="\n" if literal else "") as file:
        if literal:
            lines = enumerate((line.rstrip("\r\n") for line in file), start=1)
            table = [(number, line.split("\t")) for number, line in lines if line]
        else:
            names = file.readline()
            marks = [mark for mark in ",\t;" if columns[0] in [name.strip(' "\r\n') for name in names.split(mark)]]
            delimiter = next((mark for mark in marks if mark in names), ",")
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            try:
                for cells in reader:
                    table += [(start, cells)] if cells else []
                    start = reader.line_num + 1
            except csv.Error as error:
                raise UserError(f"{path}:{start}: the row that begins here has broken quotes ({error}).") from None
    header = [name.strip() for name in table[0][1]] if table else []
    for column in columns:
        parts = {part.strip() for part in re.split("[,，;|]", column)}
        if header.count(column) > 1 or (column not in header and len(parts) > 1 and parts <= set(header)):
            raise UserError(
                f"{path}: several columns for {column!r}: multi-label is not supported, a text has one label."
            )
        if column not in header:
            raise UserError(
                f"{path}: no column {column!r}; there are {', '.join(header) or 'none'}. "
                "Name yours by --text_column and --label_column."
            )
    if not literal:
        check_quotes(path, table[1:], header.index(columns[0]), delimiter)
    return header, table[1:]


def check_quotes(path: str, rows: list[tuple[int, list[str]]], text_place: int, delimiter: str) -> None:
    """Raises UserError for a cell that goes over several lines, two of which could be rows: its quote begins too early.

    A line could be one where every cell but the text has a form that its column has elsewhere, digits being alike.
    """

    def forms(cells: list[str]) -> set[tuple[int, int, str]]:
        shapes = enumerate(re.sub(r"\d+", "0", cell.strip()) for cell in cells)
        return {(len(cells), place, shape) for place, shape in shapes if place != text_place}

    spread = [(number, cells) for number, cells in rows if LINE_END.search("".join(cells))]
    known = set().union(*(forms(cells) for _, cells in rows if spread and not LINE_END.search("".join(cells))))
    for number, cells in spread:
        lines = [line.split(delimiter) for line in LINE_END.split(delimiter.join(cells))]
        count = sum(len(line) == len(cells) > 1 and forms(line) <= known for line in lines)
        if count > 1:
            raise UserError(
                f"{path}:{number}: a cell that begins here holds {count} lines that look like rows; a quote "
                'stands where none belongs. Write it twice ("") within quotes, or save the table as .tsv.'
            )


def write_csv(table: pd.DataFrame, path) -> None:
    """For Excel and `read_cells`: with this line end Python's csv also quotes a cell with a lone carriage return."""
    table.to_csv(path, index=False, encoding="utf-8-sig", lineterminator="\r\n")


def read_table(path: str, text_column: str, label_column: str) -> pd.DataFrame:
    """Every row of a table, good or bad: text, label, source ("file:line") and, for a bad one, the reason.

    A reason is its kind, and after a colon what there is to say about the one row.

    Raises:
        UserError: see `read_cells`.
    """
    header, rows = read_cells(path, (text_column, label_column))
    text_place, label_place, width = header.index(text_column), header.index(label_column), len(header)
    table = []
    for line, cells in rows:
        text, label = (cells[text_place].strip(), clean_label(cells[label_place])) if len(cells) == width else ("", "")
        reason = "" if text and label else "empty label" if text else "empty text"
        if len(cells) != width:
            reason = f"wrong number of cells: {len(cells)}, the header has {width}; a comma in a text needs quotes"
        elif len(text) > MAX_CHARACTERS:
            text, reason = text[:100], f"too long a cell: {len(text)} characters; is a quote missing?"
        table.append((text, label, f"{path}:{line}", reason))
    return pd.DataFrame(table, columns=COLUMNS)


def clean_label(label: str) -> str:
    """Without space around it; Excel's 1.0 is the label 1."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", label.strip())


def sort_labels(labels) -> list[str]:
    """Classes in the order of their ids: numbers by value, words by the alphabet."""
    labels = sorted(set(labels))
    return sorted(labels, key=int) if all(re.fullmatch(r"-?\d+", label) for label in labels) else labels


def doubt_labels(labels) -> list[str]:
    """What looks like a slip in the labels, though each is taken for a class of its own, as it is written."""
    notes, alike, labels = [], {}, sort_labels(labels)
    for label in labels:
        key = "".join(c for c in conflict_form(label).casefold() if unicodedata.category(c) != "Cf")
        alike.setdefault(key, []).append(repr(label))
    if groups := [" / ".join(group) for group in alike.values() if len(group) > 1]:
        notes.append(f"labels that look alike are different classes: {'; '.join(groups)}")
    if joined := [repr(label) for label in labels if len(re.findall(r"[^|,，;；、]+", label)) > 1]:
        some = ", ".join(joined[:5]) + (", ..." if len(joined) > 5 else "")
        notes.append(f"labels that join several are classes of their own, multi-label is not supported: {some}")
    return notes


def conflict_form(text: str) -> str:
    """Texts of one such form and two labels contradict each other: they differ in width and space alone."""
    return re.sub(INVISIBLE, "", unicodedata.normalize("NFKC", text))


def copy_form(text: str) -> str:
    """Texts of one such form say the same: they differ in case, width, space and sentence marks alone."""
    text = conflict_form(text).casefold()
    return re.sub(rf"(?<!\d){MARKS}|{MARKS}(?!\d)", "", text) or text


def split_in_blocks(table: pd.DataFrame, shares: dict[str, float], seed: int, num_blocks: int = 100):
    """The table in parts, each class cut into contiguous blocks, each of which is assigned as a whole.

    Neighbours in a file are often about the same thing; assigned one by one they would stand on both sides.

    Args:
        shares: part -> its share of the rows; what is left is "train". The rows of each stay in their order.
    """
    rng = np.random.default_rng(seed)
    part = pd.Series("train", index=table.index)
    for _, rows in table.groupby("label", sort=True):
        blocks = np.array_split(rows.index.to_numpy(), min(num_blocks, len(rows)))
        free = rng.permutation(len(blocks))
        for name, share in shares.items():
            count = min(max(1, round(share * len(blocks))), len(free) - 1) if share else 0
            for block in free[:count]:
                part[blocks[block]] = name
            free = free[count:]
    return {name: table[part == name] for name in ("train", *shares) if name == "train" or shares[name]}


def clean_splits(splits: dict[str, pd.DataFrame]) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """The splits without bad rows, texts of two classes, copies, and texts that stand on two sides.

    A copy leaves the training rows for the validation and test rows' sake, and the validation rows for the test rows'.

    Returns:
        The good rows of each split, in the order train, validation, test, and all that were removed, with the reason.
    """
    cleaned, removed, elsewhere = {}, [], {}
    for name in reversed(splits):
        rows = splits[name].assign(split=name)
        usable = rows[rows.reason == ""]
        form, key = usable.text.map(conflict_form), usable.text.map(copy_form)
        classes = usable.label.groupby(form).unique()
        classes = classes[classes.map(len) > 1].map(" and ".join).map("in several classes: {}".format)
        reason = key.map(elsewhere).combine_first(form.map(classes))
        left = usable[reason.isna()]
        first = left.source.groupby([key, left.label]).transform("first")
        copies = first[first != left.source].map("a copy: of {}".format)
        rows.loc[usable.index, "reason"] = reason.combine_first(copies).fillna("")
        removed.append(rows[rows.reason != ""])
        cleaned[name] = good = rows[rows.reason == ""]
        elsewhere |= good.source.map("in another split as well: {}".format).set_axis(key[good.index]).to_dict()
    return {name: cleaned[name] for name in splits}, pd.concat(removed[::-1])
