"""Raw instruction data -> rows to train on: one file a language, checked, without duplicates, split in two.

    python prepare.py data_proj/opendata my_data --languages zh en --min_length 2 --max_length 4000 --validation 0.01
    DATA=my_data/train bash train_zero2.sh --eval_data_path my_data/validation

Reads what train.py reads and BELLE's dialogues, which stand as one text in `instruction`. Memory is that of one row,
however long a .jsonl, .csv or .parquet file is; a JSON array is held whole.
"""

import argparse
import hashlib
import json
import re
import shlex
import sqlite3
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pandas as pd

from files import UserError, identify_file, list_files, list_unread_files, read_records
from languages import LANGUAGES, detect_language
from rows import is_empty, read_text, to_messages

LEFT_OUT = ("other language", "too short", "too long", "duplicate")
TURN = re.compile(r"^[ \t\u3000]*(Human|Assistant)[ \t\u3000]*[:：]", re.MULTILINE)

# 12/4 and 12*4, C and C#, 1.5 and 15 are different questions, though these characters count as punctuation.
MEANING = "#%&*/\\@-_."


def normalize(question: str) -> str:
    """What two questions are compared by: NFKC, lower case, without white space and punctuation."""
    text = unicodedata.normalize("NFKC", question).lower()
    text = "".join(one for one in text if one in MEANING or unicodedata.category(one)[0] not in "PZC")
    return re.sub(r"\.(?!\d)", "", text) or question.strip()


def unfold_dialogue(row: object) -> object:
    """A row of BELLE's multi-turn sets as one of messages, any other row as it is.

    There, `instruction` is "Human:...\\nAssistant:...\\nHuman:...\\nAssistant:" and `output` the last answer. A text is
    a dialogue if it begins with a speaker or ends with "Assistant:"; a speaker amid a text makes none.

    Raises:
        UserError: the turns are in no order that can be learned.
    """
    text = row.get("instruction") if isinstance(row, dict) else None
    before, *parts = TURN.split(text.strip()) if isinstance(text, str) else [""]
    speakers, texts = parts[::2], [part.strip() for part in parts[1::2]]
    if not speakers or (before and (speakers[-1], texts[-1]) != ("Assistant", "")):
        return row
    if before or speakers[0] != "Human":
        raise UserError("a dialogue that doesn't begin with Human:")
    for number, speaker in enumerate(speakers):
        if speaker != ("Human", "Assistant")[number % 2]:
            raise UserError(f"a dialogue whose turns don't alternate: turn {number + 1} is {speaker}'s as well")
    if speakers[-1] != "Assistant" or texts[-1]:
        raise UserError("a dialogue that doesn't end with Assistant:, after which the output belongs")
    for key in ("input", "history"):
        if not is_empty(row.get(key)) and row[key]:
            raise UserError(f"a dialogue in instruction and {key} beside it; which comes first can't be told")
    texts[-1] = read_text(row.get("output")).strip()
    turns = [{"role": name.lower(), "content": text} for name, text in zip(speakers, texts, strict=True)]
    others = {key: row[key] for key in row if key not in ("instruction", "input", "output", "history")}
    return others | {"messages": turns}


def decide(messages: list[dict], seen: sqlite3.Connection, args: argparse.Namespace) -> tuple[str, str]:
    """A row's language, and where it goes: "train", "validation", or one of LEFT_OUT.

    Duplicate and side hang on the first question alone: it is never on both sides, and stays on its side when rows
    come in. The duplicates come last, so that a row that is left out anyway keeps no other one out.
    """
    question = next(message["content"] for message in messages if message["role"] == "user")
    language = detect_language(question, messages[-1]["content"])
    length = sum(len(message["content"]) for message in messages)
    if language not in args.languages:
        return language, "other language"
    if not args.min_length <= length <= args.max_length:
        return language, "too short" if length < args.min_length else "too long"
    digest = hashlib.blake2b(normalize(question).encode(), digest_size=16).digest()
    if not seen.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount:
        return language, "duplicate"
    return language, "validation" if int.from_bytes(digest[:8], "big") < args.validation * 2**64 else "train"


def read_files(files: list[str]) -> Iterator[tuple[str, object, str]]:
    """Yields (`file:line`, record or UserError, its text)."""
    encodings = [identify_file(file)[0] for file in files]  # of all, before the first row costs time
    for file, encoding in zip(files, encodings, strict=True):
        for number, record, text in read_records(file, encoding):
            yield f"{file}:{number}", record, text.strip()


def write_folder(folder: Path, files: list[str], seen: sqlite3.Connection, args: argparse.Namespace) -> tuple:
    """Streams all rows into train/, validation/ and bad_rows.jsonl of a folder.

    Returns:
        How many rows went where, by (language, what `decide` says); how many are bad, by the kind of reason.
    """
    counts, reasons, opened = Counter(), Counter(), {}
    with ExitStack() as stack:
        bad_rows = stack.enter_context(open(folder / "bad_rows.jsonl", "w", encoding="utf-8"))
        for number, (source, record, text) in enumerate(read_files(files), start=1):
            if number % 100_000 == 0:
                seen.commit()
                print(f"{number:,} rows, now at {source}", file=sys.stderr)
            try:
                if isinstance(record, UserError):
                    raise record
                messages, tools, _ = to_messages(unfold_dialogue(record))
            except UserError as error:
                if reasons.total() < 3:
                    print(f"bad row: {source}: {error}")
                reasons[re.sub(r"\d+", "N", str(error))] += 1
                bad = {"source": source, "reason": str(error), "raw": text}
                bad_rows.write(json.dumps(bad, ensure_ascii=False) + "\n")
                continue
            language, place = decide(messages, seen, args)
            counts[language, place] += 1
            if place not in LEFT_OUT:
                if (language, place) not in opened:
                    (path := folder / place / f"{language}.jsonl").parent.mkdir(exist_ok=True)
                    opened[language, place] = stack.enter_context(open(path, "w", encoding="utf-8"))
                row = {"messages": messages} | ({"tools": tools} if tools else {})
                opened[language, place].write(json.dumps(row, ensure_ascii=False) + "\n")
    return counts, reasons


def prepare(args: argparse.Namespace) -> tuple[Counter, Counter]:
    """Reads `data_path`, writes `output`, whole or not at all; returns the counts of `write_folder`.

    Raises:
        UserError: a flag that can't be meant, a file that is broken, no row left, or the output holds something.
    """
    if unknown := [tag for tag in args.languages if tag not in LANGUAGES]:
        raise UserError(f"--languages {' '.join(unknown)}: known are {' '.join(LANGUAGES)}.")
    if not 0 <= args.validation < 1:
        raise UserError(f"--validation {args.validation}: give a share of the questions, from 0 to less than 1.")
    files, output = list_files(args.data_path), Path(args.output).resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{args.output}: holds something already; give another folder, or empty it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, since a folder can be renamed within one disk only.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        (folder := Path(scratch, "rows")).mkdir()
        with closing(sqlite3.connect(Path(scratch, "seen.sqlite3"))) as seen:
            # Nobody reads it after a crash, so it keeps no journal and waits for no disk.
            seen.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;")
            seen.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
            counts, reasons = write_folder(folder, files, seen, args)
        if not any(place == "train" for _, place in counts):
            found = Counter({"bad": reasons.total()}) + Counter(place for _, place in counts.elements())
            places = ", ".join(f"{found[place]} {place}" for place in found) or "it is empty"
            raise UserError(f"{args.data_path}: no row to train on: {places}. Mend the rows, or loosen the flags.")
        folder.rename(output)
    return counts, reasons


def print_report(args: argparse.Namespace, counts: Counter, reasons: Counter) -> None:
    table = pd.Series(counts).unstack(fill_value=0).reindex(columns=["train", "validation", *LEFT_OUT], fill_value=0)
    kept, left_out = table[["train", "validation"]], table[list(LEFT_OUT)].sum()
    print(kept[kept.any(axis="columns")].to_string())
    print(f"\nleft out:\n{pd.Series({'bad': reasons.total()} | left_out.to_dict()).to_string()}")
    if reasons:
        print(f"\nbad, in {args.output}/bad_rows.jsonl:\n{pd.Series(dict(reasons.most_common(10))).to_string()}")
    if unread := list_unread_files(args.data_path):
        print(f"\nfiles not read: {', '.join(unread)}")
    output = shlex.quote(str(Path(args.output).resolve()))  # the script changes the folder
    evaluation = f" --eval_data_path {output}/validation" if kept["validation"].any() else ""
    print(f"\nto train on it:\nDATA={output}/train bash train_zero2.sh{evaluation}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_path", help="a file or folder of .json, .jsonl (also .gz), .csv, .tsv, .parquet")
    parser.add_argument("output", help="the folder that is written")
    parser.add_argument("--languages", nargs="+", default=list(LANGUAGES), help="keep these only")
    parser.add_argument("--min_length", type=int, default=2, help="characters of a whole conversation, at least")
    parser.add_argument("--max_length", type=int, default=4000, help="characters of a whole conversation, at most")
    parser.add_argument("--validation", type=float, default=0.01, help="the share of questions for validation")
    args = parser.parse_args()
    print_report(args, *prepare(args))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
