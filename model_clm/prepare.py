"""A corpus of any size -> token shards to train on, a held-out part, and a report of what was found.

    python prepare.py my_corpus my_prepared --tokenizer my_tokenizer --data_proc_num 2 --validation_split 0.005
    python prepare.py my_corpus my_prepared --tokenizer my_tokenizer --validation_path my_heldout

Reads .txt, .jsonl, .json (each also .gz, .zst) and .parquet. Each sub-folder, or file, of the corpus is a source. A
document is a record, or in .txt what --document_separator says; one of more than 4 million characters is cut behind a
line, a line of so many refused.

Every text is read once, by one process (about 200 MB a CPU second); --data_proc_num others clean and tokenise it
in bounded pieces. What grows with the corpus are the keys that copies are found by, 0.3 GB a million documents
(`clean.Seen`; 0.02 GB with --near_duplicates 0). The same corpus and flags give the same files, with any number of
processes.

A held-out text is not touched: no filter, no normal form. The filters for duplicates drop training texts that
copy a held-out one; with both of them off, nothing does.
"""

import argparse
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from filelock import FileLock, Timeout

from clean import Filters, Judge, Signed
from corpus_report import SHOWN_CHARACTERS, Report, plot, summarize
from data import ShardWriter, hash_file, write_aside, write_manifest
from pool import Decision, Encoded, Piece, Workers, run
from rows import UserError, list_files, list_unread_files, read_documents

PIECE = 300_000  # characters that a worker gets at once, or one document if that is longer
PIECE_DOCUMENTS = 5_000
DONE = "report.json"  # written last
CODE = ("rows.py", "clean.py", "data.py", "pool.py", "prepare.py")


def parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def read_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; raises UserError for values that can't be meant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("corpus", help="a folder, or one file")
    add("output", help="the folder to write")
    add("--tokenizer", required=True, help="a folder (train_tokenizer.py writes one), or a name on the hub")
    add("--validation_path", help="a folder or file of held-out text, used as it is")
    add("--validation_split", type=float, help="share of documents to hold out (0.005 without --validation_path)")
    add(
        "--document_separator",
        default="blank_line",
        help="of .txt: blank_line, file, or a text between two (\\n)",
    )
    add("--text_key", help="of a record's text (text, or content with title)")
    add("--data_num_limit", type=int, help="at most so many files of the corpus, by name")
    add("--data_proc_num", type=int, default=min(8, os.cpu_count()), help="worker processes")
    add("--shard_tokens", type=int, default=1 << 28, help="tokens of a shard")
    add("--seed", type=int, default=42, help="of the split")
    add("--skip_bad_rows", type=parse_bool, default=False, help="go on without records that can't be read")
    add("--overwrite", type=parse_bool, default=False, help="replace a folder that was prepared otherwise")
    for field in fields(Filters):
        kind = parse_bool if isinstance(field.default, bool) else type(field.default)
        off = {bool: "false", int: 0, float: 1 if field.name == "max_repeated" else 0}[type(field.default)]
        add(f"--{field.name}", type=kind, default=field.default, help=f"a filter ({off}: off); see clean.Filters")
    flags = parser.parse_args(argv)
    if flags.validation_path and flags.validation_split:
        raise UserError("--validation_path and --validation_split: one of them; the former holds out nothing else.")
    if flags.validation_split is None:
        flags.validation_split = 0.0 if flags.validation_path else 0.005
    if not 0 <= flags.validation_split < 1:
        raise UserError(f"--validation_split {flags.validation_split}: it is a share, 0 or more and below 1.")
    if flags.data_proc_num < 1 or flags.shard_tokens < 1 or (flags.data_num_limit or 1) < 1:
        raise UserError("--data_proc_num, --shard_tokens and --data_num_limit: 1 or more.")
    if not flags.document_separator:
        raise UserError("--document_separator is empty; it is blank_line, file, or the text between two documents.")
    flags.document_separator = flags.document_separator.replace("\\n", "\n").replace("\\t", "\t")
    return flags


def save_tokenizer(name: str, folder: Path):
    """Reads a tokenizer and saves it as a fast one; raises UserError where it can't be, or has no EOS token."""
    from transformers import AutoTokenizer  # the workers import this file too, and need none of it

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {name}: {' '.join(str(error).split())[:300]}") from None
    if not tokenizer.is_fast:
        raise UserError(f"--tokenizer {name}: has no fast form (tokenizer.json); save it as one.")
    if tokenizer.eos_token_id is None:
        raise UserError(f"--tokenizer {name}: has no EOS token, which ends each document.")
    tokenizer.save_pretrained(folder)
    return tokenizer


def list_inputs(flags: argparse.Namespace) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Source and path of the files to hold out, and of those to train on.

    Raises:
        UserError: there are none, or the output would be among them.
    """
    held_out = list_files(flags.validation_path) if flags.validation_path else []
    apart = {Path(path).resolve() for _, path in held_out}
    training = [pair for pair in list_files(flags.corpus) if Path(pair[1]).resolve() not in apart]
    if not training:
        raise UserError(f"{flags.corpus}: nothing is left to train on beside --validation_path.")
    for folder in filter(None, (flags.corpus, flags.validation_path)):
        if Path(folder).resolve() in (Path(flags.output).resolve(), *Path(flags.output).resolve().parents):
            raise UserError(f"{flags.output}: lies within {folder}, and would be read with it. Write it elsewhere.")
    return held_out, training[: flags.data_num_limit]


def identify(flags: argparse.Namespace, inputs: list[tuple[str, str]], tokenizer_hash: str) -> dict:
    """All that decides what is written: the files (by name, size and time), the flags, the tokenizer and this code."""
    stats = [(source, Path(path).name, os.stat(path)) for source, path in inputs]
    free = ("corpus", "output", "tokenizer", "validation_path", "data_proc_num", "overwrite")
    code = [Path(__file__).with_name(name).read_text("utf-8") for name in CODE]
    return {
        "files": [[source, name, stat.st_size, stat.st_mtime_ns] for source, name, stat in stats],
        "flags": {name: value for name, value in vars(flags).items() if name not in free}
        | {"held_out": bool(flags.validation_path)},
        "tokenizer": tokenizer_hash,
        "code": hashlib.sha256(json.dumps(code).encode()).hexdigest(),
    }


def find_finished(output: Path, identity: dict, overwrite: bool) -> dict | None:
    """The report of a folder that was prepared of the same; None where there is none, or one to be overwritten.

    Raises:
        UserError: there is another folder; says in what it differs.
    """
    if not output.exists():
        return None
    try:
        report = json.loads((output / DONE).read_text(encoding="utf-8"))
        differs = [name for name, value in identity.items() if report["identity"][name] != value]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{output}: is there already, and prepare.py did not write it. Name another folder.") from None
    if differs and not overwrite:
        raise UserError(
            f"{output}: was prepared otherwise (other {', '.join(differs)}). Name another folder, or replace it by "
            "--overwrite true."
        )
    return None if differs else report


def read_pieces(
    files: list[tuple[str, str]], validation: bool, flags: argparse.Namespace, report: Report
) -> Iterator[Piece]:
    """The documents of all files in order, those of one source gathered into pieces.

    Raises:
        UserError: as `read_documents`; or a bad record that is not to be skipped.
    """
    piece = None
    for source, path in files:
        for place, text in read_documents(path, flags.document_separator, flags.text_key):
            if isinstance(text, UserError):
                if not flags.skip_bad_rows:
                    raise UserError(f"{place}: {text}. Mend it, or go on without such by --skip_bad_rows true.")
                report.add_bad_row(place, text)
                continue
            if piece and (
                piece.source != source or piece.characters + len(text) > PIECE or len(piece.texts) == PIECE_DOCUMENTS
            ):
                yield piece
                piece = None
            piece = piece or Piece(source, validation)
            piece.places.append(place)
            piece.beginnings.append(text[:SHOWN_CHARACTERS])
            piece.texts.append(text)
            piece.characters += len(text)
    if piece:
        yield piece


class Splits:
    """The shards of both sides, of as many sources as come."""

    def __init__(self, folder: Path, vocab_size: int, eos_token_id: int, shard_tokens: int):
        self.folder, self.vocab_size = folder, vocab_size
        self.settings = ("uint16" if vocab_size <= 1 << 16 else "uint32", eos_token_id, shard_tokens)
        self.writers = {"train": {}, "validation": {}}
        for side in self.writers:
            (folder / side).mkdir()

    def write(self, side: str, source: str, encoded: Encoded) -> None:
        if source not in self.writers[side]:
            self.writers[side][source] = ShardWriter(self.folder / side, source, *self.settings)
        self.writers[side][source].add(encoded.tokens, encoded.lengths, encoded.characters, encoded.bytes)

    def close(self, tokenizer_hash: str) -> dict[str, dict]:
        """Writes the manifests and returns them by side; that of a side without a document has no sources."""
        dtype, eos_token_id, _ = self.settings
        settings = (dtype, eos_token_id, self.vocab_size, tokenizer_hash)
        return {
            side: write_manifest(self.folder / side, list(writers.values()), *settings)
            for side, writers in self.writers.items()
        }


def prepare(flags: argparse.Namespace) -> dict:
    """Writes the prepared folder and returns its report, or that of a folder which is there already.

    It is written as OUTPUT.unfinished and renamed in the end, so that what is there is complete.

    Raises:
        UserError: what is wrong with the corpus, the tokenizer or the flags.
    """
    output = Path(flags.output)
    aside = output.with_name(f"{output.name}.unfinished")
    held_out, training = list_inputs(flags)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output.with_name(f".{output.name}.lock"), timeout=0), new_folder(aside):
            tokenizer = save_tokenizer(flags.tokenizer, aside / "tokenizer")
            tokenizer_hash = hash_file(aside / "tokenizer" / "tokenizer.json")
            identity = identify(flags, [*held_out, *training], tokenizer_hash)
            if report := find_finished(output, identity, flags.overwrite):
                print(f"{output}: is there already, prepared from the same files by the same flags; used as it is")
                return report
            report = write_prepared(aside, flags, held_out, training, tokenizer, identity)
            shutil.rmtree(output, ignore_errors=True)
            os.rename(aside, output)
            return report
    except Timeout:
        raise UserError(f"{output}: another prepare.py is writing it.") from None
    except OSError as error:
        raise UserError(f"{error.filename or output}: {error.strerror or error}.") from None


@contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """An empty folder, whatever an interrupted run has left there; it is gone in the end, unless it was renamed."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)


def write_prepared(aside: Path, flags, held_out, training, tokenizer, identity: dict) -> dict:
    """Reads, cleans, tokenises and writes everything into the folder `aside`; returns the report."""
    filters = Filters(**{field.name: getattr(flags, field.name) for field in fields(Filters)})
    judge, report = Judge(filters, flags.validation_split, flags.seed), Report()
    vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    splits = Splits(aside, vocab_size, tokenizer.eos_token_id, flags.shard_tokens)
    start, told = time.time(), time.time()

    def decide(piece: Piece, signed: Signed) -> Decision:
        fates, lines, copies = judge.decide(signed, piece.validation)
        report.add_decided(piece, signed, fates, lines, copies)
        return Decision(fates, lines)

    def write(piece: Piece, sides: dict[str, Encoded], fates: list[str]) -> None:
        nonlocal told
        for side, encoded in sides.items():
            splits.write(side, piece.source, encoded)
        report.add_written(piece, sides, fates)
        if time.time() - told > 10:
            told = time.time()
            print(f"{report.progress(told - start)}, now at {piece.places[-1]}", flush=True)

    pieces = itertools.chain(read_pieces(held_out, True, flags, report), read_pieces(training, False, flags, report))
    workers = Workers(flags.data_proc_num, str(aside / "tokenizer" / "tokenizer.json"), tokenizer.eos_token_id, filters)
    try:
        run(workers, pieces, decide, write)
    finally:
        workers.stop()
    if not report.kept("train"):
        raise UserError(f"{flags.corpus}: no document is left to train on. {report.explain()}")
    manifests = splits.close(identity["tokenizer"])
    found = report.finish(manifests, list_unread_files(flags.corpus), time.time() - start) | {"identity": identity}
    plot(found, filters).savefig(aside / "report.png", dpi=110)
    write_aside(aside / DONE, json.dumps(found, ensure_ascii=False, indent=1))
    return found


def main() -> None:
    try:
        flags = read_flags()
        report = prepare(flags)
        print(summarize(report))
        print(f"written: {flags.output}")
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted: nothing was written to {flags.output}")


if __name__ == "__main__":
    main()
