"""Prepared token shards -> windows to train on: which tokens row n holds is decided by (seed, n) and by nothing else.

A prepared folder's `train` and `validation` hold for each source the shards `news-00000.bin` (token ids, little-endian;
each document's tokens and one EOS after them, one EOS before the first), `news-00000.documents` (int64: where in the
shard each document begins) and one `manifest.json`. The shards of a source end to end are its stream:

    EOS document EOS document EOS ... document EOS

Window k of `length` tokens begins at token k * (length - 1) of the stream. Neighbours share a token, the target of one
and the context of the other, so that every token but the very first is a target once an epoch. The order is a keyed
permutation that is computed, not stored, and a window is read by os.pread: no index, no shuffle buffer and no mapped
file grow in memory, and a run goes on at any row without reading those before it.
"""

import bisect
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import numpy as np

from rows import UserError

IGNORE_INDEX = -100
CACHE_DIR = Path(__file__).parent / "cache_data"
MANIFEST = "manifest.json"
SLOTS = 1000  # rows of one cycle of a mixture
TOKENS_READ_AT_ONCE = 1 << 20


def column(rows, name: str) -> np.ndarray:
    """One column of a dataset as an array of shape (rows,)."""
    return rows.with_format("numpy")[name][:]


def hash_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_aside(path: Path, text: str) -> None:
    """Writes a file such that it is there as a whole or not at all."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.aside")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


class ShardWriter:
    """Appends documents to the shards of one source; memory does not grow with them.

    Args:
        shard_tokens: a shard is closed before it would hold more, unless a single call brings more.
    """

    def __init__(self, folder: Path, source: str, dtype: str, eos_token_id: int, shard_tokens: int):
        self.folder, self.source, self.dtype, self.shard_tokens = Path(folder), source, np.dtype(dtype), shard_tokens
        self.eos = np.array([eos_token_id], self.dtype)
        self.counts = {"documents": 0, "tokens": 0, "characters": 0, "bytes": 0}
        self.shards, self.digest = [], hashlib.sha256()

    def add(self, tokens: np.ndarray, lengths: np.ndarray, characters: int, size: int) -> None:
        """Documents end to end, the EOS after each included.

        Args:
            tokens: ids of shape (tokens,).
            lengths: tokens of each document with its EOS, shape (documents,).
            characters, size: of the documents' texts, in characters and in UTF-8 bytes.
        """
        if not self.shards or self.shards[-1]["tokens"] + len(tokens) > self.shard_tokens:
            self.close()
            self.digest = hashlib.sha256()
            self.shards.append({"file": f"{self.source}-{len(self.shards):05d}.bin", "tokens": 0, "documents": 0})
            if len(self.shards) == 1:
                self.write(self.eos)
        shard = self.shards[-1]
        starts = shard["tokens"] + np.cumsum(lengths, dtype=np.int64) - lengths
        with open((self.folder / shard["file"]).with_suffix(".documents"), "ab") as file:
            file.write(starts.astype("<i8").tobytes())
        self.write(tokens)
        shard["documents"] += len(lengths)
        for name, count in zip(self.counts, (len(lengths), len(tokens), characters, size), strict=True):
            self.counts[name] += count

    def write(self, tokens: np.ndarray) -> None:
        raw = tokens.astype(self.dtype.newbyteorder("<")).tobytes()
        with open(self.folder / self.shards[-1]["file"], "ab") as file:
            file.write(raw)
        self.digest.update(raw)
        self.shards[-1]["tokens"] += len(tokens)

    def close(self) -> None:
        """The last shard is complete."""
        if self.shards:
            self.shards[-1]["sha256"] = self.digest.hexdigest()


def write_manifest(
    folder: Path, writers: list[ShardWriter], dtype: str, eos_token_id: int, vocab_size: int, tokenizer_hash: str
) -> dict:
    """Closes the shards of all sources, of none where nothing was held out, and writes `manifest.json`.

    The manifest's `tokens` of a source are those of its stream, the EOS before the first document among them.
    """
    sources = {}
    for writer in writers:
        writer.close()
        tokens = sum(shard["tokens"] for shard in writer.shards)
        if writer.shards:
            sources[writer.source] = writer.counts | {"tokens": tokens, "shards": writer.shards}
    manifest = {"tokenizer_hash": tokenizer_hash, "vocab_size": vocab_size, "eos_token_id": eos_token_id}
    manifest |= {"dtype": dtype, "sources": sources}
    write_aside(Path(folder) / MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=1))
    return manifest


def read_manifest(folder: str | Path) -> dict:
    """Raises UserError where the folder is no split (train or validation) of a prepared one."""
    path = Path(folder) / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder}: holds no {MANIFEST}, so it was not prepared to the end; python prepare.py --help says how."
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: broken ({error}); prepare the corpus again.") from None


def verify(folder: str | Path) -> None:
    """Checks every shard of a split against its manifest: the size always, the SHA-256 once for a size and mtime.

    Raises:
        UserError: names the shard that is missing or that changed after it was prepared.
    """
    folder, manifest = Path(folder), read_manifest(folder)
    record, known = folder / "verified.json", {}
    with suppress(OSError, ValueError):
        known = json.loads(record.read_text(encoding="utf-8"))
    seen, itemsize = dict(known), np.dtype(manifest["dtype"]).itemsize
    for shard in (shard for source in manifest["sources"].values() for shard in source["shards"]):
        path = folder / shard["file"]
        if not path.is_file():
            raise UserError(f"{path}: the shard is missing; prepare the corpus again.")
        stat = path.stat()
        if stat.st_size != shard["tokens"] * itemsize:
            raise UserError(
                f"{path}: has {stat.st_size} bytes, it was prepared with {shard['tokens'] * itemsize}: it changed "
                "since. Prepare the corpus again."
            )
        state = [stat.st_size, stat.st_mtime_ns, shard["sha256"]]
        if known.get(shard["file"]) != state:
            if hash_file(path) != shard["sha256"]:
                raise UserError(f"{path}: changed since it was prepared (its SHA-256). Prepare the corpus again.")
            seen[shard["file"]] = state
    if seen != known:
        with suppress(OSError):  # a folder that may only be read is checked anew each time
            write_aside(record, json.dumps(seen))


def read_tokens(folder: str | Path, source: str) -> Iterator[np.ndarray]:
    """A source's stream in order, in pieces of at most a million tokens, each an array of shape (tokens,)."""
    manifest = read_manifest(folder)
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    for shard in manifest["sources"][source]["shards"]:
        with open(Path(folder) / shard["file"], "rb") as file:
            while raw := file.read(TOKENS_READ_AT_ONCE * dtype.itemsize):
                yield np.frombuffer(raw, dtype)


class WindowsInOrder:
    """The windows of a split, source after source in the manifest's order: a map-style dataset.

    Args:
        folder: `train` or `validation` of a prepared folder.
        length: tokens of a window, one of which it shares with the window before; the last of a source may be shorter.
        source: only this one's windows; of all sources if None.

    Raises:
        UserError: not a prepared folder, or there is no such source.
    """

    def __init__(self, folder: str | Path, length: int, source: str | None = None):
        self.folder, self.length, self.manifest = Path(folder), length, read_manifest(folder)
        self.dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        sources = self.manifest["sources"]
        if source is not None and source not in sources:
            raise UserError(f"{folder}: no source {source} in it, there are {', '.join(sources)}.")
        self.sources = [source] if source is not None else list(sources)
        shards = {name: sources[name]["shards"] for name in self.sources}
        self.paths = {name: [self.folder / shard["file"] for shard in shards[name]] for name in self.sources}
        # Where each shard begins in the stream, and where the stream ends.
        self.starts = {
            name: list(accumulate((shard["tokens"] for shard in shards[name]), initial=0)) for name in self.sources
        }
        self.counts = [-(-(self.starts[name][-1] - 1) // (length - 1)) for name in self.sources]
        self.ends = list(accumulate(self.counts))
        self.files = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"files": {}}

    def __len__(self) -> int:
        """Windows of one epoch."""
        return self.ends[-1]

    def __getitem__(self, number: int) -> dict:
        """`input_ids`, the `starts` (places of the EOS that a document begins or ends with) and its `source`."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        place = bisect.bisect_right(self.ends, number)
        return self.window(self.sources[place], number - self.ends[place] + self.counts[place])

    def window(self, source: str, number: int) -> dict:
        begin = number * (self.length - 1)
        ids = self.read(source, begin, min(begin + self.length, self.starts[source][-1]))
        starts = np.flatnonzero(ids == self.manifest["eos_token_id"])
        return {"input_ids": ids.tolist(), "starts": starts.tolist(), "source": source}

    def read(self, source: str, begin: int, end: int) -> np.ndarray:
        """Tokens [begin, end) of a source's stream, from as many shards as they stand in."""
        pieces, starts = [], self.starts[source]
        shard = bisect.bisect_right(starts, begin) - 1
        while begin < end:
            count = min(end, starts[shard + 1]) - begin
            path = self.paths[source][shard]
            if path not in self.files:  # pread has no position, so processes may share what they inherit
                self.files[path] = os.open(path, os.O_RDONLY)
            size = self.dtype.itemsize
            raw = os.pread(self.files[path], count * size, (begin - starts[shard]) * size)
            if len(raw) != count * size:
                raise UserError(f"{path}: is shorter than when it was prepared. Prepare the corpus again.")
            pieces.append(np.frombuffer(raw, self.dtype))
            begin, shard = begin + count, shard + 1
        return np.concatenate(pieces)


class Windows(WindowsInOrder):
    """Row n of training for every n from 0 on, epoch after epoch: a pure function of (seed, n).

    Without a mixture, the rows of an epoch are a permutation of the windows of all sources. With one, each cycle of
    1,000 rows takes from each source its share of them, and each source has epochs of its own: its i-th row is a
    window of its epoch i // (its windows).

    Args:
        mixture: shares of the rows by source, which sum to 1; a source that is not in it is not read.

    Raises:
        UserError: an unknown source, or shares that can't be kept.
    """

    def __init__(self, folder: str | Path, length: int, seed: int, mixture: dict[str, float] | None = None):
        super().__init__(folder, length)
        self.seed = seed
        self.slots = share_slots(mixture, self.sources) if mixture else None
        self.slot_ends = list(accumulate(self.slots)) if mixture else None

    def __getitem__(self, number: int) -> dict:
        if self.slots is None:
            epoch, place = divmod(number, len(self))
            return super().__getitem__(permute(place, len(self), f"{self.seed} epoch {epoch}"))
        cycle, place = divmod(number, SLOTS)
        slot = permute(place, SLOTS, f"{self.seed} cycle {cycle}")
        at = bisect.bisect_right(self.slot_ends, slot)
        own = cycle * self.slots[at] + slot - self.slot_ends[at] + self.slots[at]  # each number once, as slots are
        epoch, place = divmod(own, self.counts[at])
        source = self.sources[at]
        return self.window(source, permute(place, self.counts[at], f"{self.seed} epoch {epoch} of {source}"))


def permute(number: int, count: int, key: str) -> int:
    """Where a keyed permutation of range(count) takes a number; needs no memory, whatever the count.

    A Feistel network of six rounds over the next even number of bits, walked until it is within range. Source: Black
    and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002).
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    raw = hashlib.blake2b(key.encode(), digest_size=48).digest()
    rounds = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, 48, 8)]
    while True:
        left, right = number >> half, number & mask
        for round_key in rounds:
            mixed = (right + round_key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 40 & mask)
        number = left << half | right
        if number < count:
            return number


def share_slots(mixture: dict[str, float], sources: list[str]) -> list[int]:
    """Rows that each source has in a cycle of 1,000, by largest remainder.

    Raises:
        UserError: an unknown source, shares that do not sum to 1, or one too small to have a row.
    """
    if unknown := sorted(set(mixture) - set(sources)):
        raise UserError(f"--mixture names {', '.join(unknown)}; the prepared sources are {', '.join(sources)}.")
    if min(mixture.values()) < 0 or not abs(sum(mixture.values()) - 1) <= 1e-6:
        raise UserError(f"--mixture: the shares are 0 or more and sum to 1, these to {sum(mixture.values()):g}.")
    shares = [mixture.get(source, 0) * SLOTS for source in sources]
    slots = [int(share + 1e-9) for share in shares]
    by_remainder = sorted(range(len(sources)), key=lambda place: slots[place] - shares[place])
    for place in by_remainder[: SLOTS - sum(slots)]:
        slots[place] += 1
    for source, share, count in zip(sources, shares, slots, strict=True):
        if share and not count:
            raise UserError(f"--mixture: {source} has a share below {1 / SLOTS}; give it more, or 0.")
    return slots


def parse_mixture(text: str) -> dict[str, float]:
    """`news=0.8,idioms=0.2` as a dictionary; raises UserError where it is none."""
    try:
        pairs = [part.rpartition("=") for part in text.split(",")]
        return {name.strip(): float(share) for name, _, share in pairs}
    except ValueError:
        raise UserError(f"--mixture {text}: write it as in news=0.8,idioms=0.2.") from None
