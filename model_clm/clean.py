"""Documents -> which of them are trained on: each filter on its own, in the open, and free to be switched off.

A worker signs documents (`sign`): what can be said of each by itself, and the keys that its copies would share. One
process then decides in the order of the corpus (`Judge`), so that the first of several copies stays, whatever the
number of workers. Nothing here is applied to a validation text; a training text that copies one is dropped.
"""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from rensa import RMinHash

# All that shows nothing: control characters but tab and newline, soft hyphen, zero-width space, direction marks, BOM.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff\ufffe\uffff]")
SHINGLE = 5  # characters
PERMUTATIONS, BANDS = 128, 16
COMPARED = 100_000  # characters of a document, without white space, that its share of Chinese and its copies hang on
LINE_LENGTHS = range(4, 101)  # characters of a line that can be boilerplate
REASONS = ("too little Chinese", "repeated lines", "boilerplate", "duplicate", "near duplicate", "copy of validation")


@dataclass(frozen=True)
class Filters:
    """What is applied to a training text; the value in brackets switches a filter off.

    Attributes:
        remove_control: takes out characters that show nothing, and a carriage return before a newline (False).
        min_chinese: share of Chinese characters among those that are no white space (0).
        max_repeated: share of a document's characters in lines that stood in it before (1). Source: Rae et al.,
            "Scaling Language Models" (2021), table A1.
        boilerplate_documents: a line of 4 to 100 characters that stood in so many documents before is taken out (0).
        exact_duplicates: drops a document that differs from an earlier one in nothing but white space (False).
        near_duplicates: drops one whose estimated Jaccard similarity to an earlier one, over shingles of 5 characters,
            is at least this (0).
    """

    remove_control: bool = True
    min_chinese: float = 0.3
    max_repeated: float = 0.3
    boilerplate_documents: int = 20
    exact_duplicates: bool = True
    near_duplicates: float = 0.8


NO_FILTERS = Filters(False, 0, 1, 0, False, 0)


@dataclass
class Signed:
    """What is known of the documents of a piece, each attribute a row or an entry a document.

    Attributes:
        reasons: of REASONS, why a document is dropped for what it is by itself, or "".
        chinese: share of Chinese characters.
        keys: uint64 of shape (documents, 1 + BANDS); see `document_keys`.
        lines: hashes of the lines that could be boilerplate.
        characters: of the text as it is in the file.
        control: how many characters `remove_control` took out.
    """

    reasons: list[str]
    chinese: np.ndarray
    keys: np.ndarray
    lines: list[list[int]]
    characters: np.ndarray
    control: list[int]


def remove_control(text: str) -> str:
    return CONTROL.sub("", text)


def hash_line(line: str) -> int:
    return int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "little")


def look_at_lines(text: str) -> tuple[float, list[int]]:
    """The share of a text's characters in lines that stood in it before, and the hashes of those that can recur."""
    lines = Counter(line.strip() for line in text.split("\n"))
    if len(lines) < 2:
        return 0.0, []
    total = sum(len(line) * count for line, count in lines.items())
    repeated = 1 - sum(map(len, lines)) / total if total else 0.0
    return repeated, [hash_line(line) for line in lines if len(line) in LINE_LENGTHS]


def remove_lines(text: str, hashes: set[int]) -> str:
    """The text without the lines that have one of these hashes."""
    lines = text.split("\n")
    return "\n".join(line for line in lines if hash_line(line.strip()) not in hashes).strip("\n")


def is_chinese(codes: np.ndarray) -> np.ndarray:
    """Whether code points are those of Chinese characters, the rare ones of the extensions among them."""
    common = (codes >= 0x3400) & (codes <= 0x9FFF) & ~((codes >= 0x4DC0) & (codes <= 0x4DFF))
    return common | (codes >= 0xF900) & (codes <= 0xFAFF) | (codes >= 0x20000) & (codes <= 0x323AF)


def hash_shingles(codes: np.ndarray) -> np.ndarray:
    """A hash of each SHINGLE neighbouring code points, uint64 of shape (codes - SHINGLE + 1,)."""
    count = len(codes) - SHINGLE + 1
    hashes = np.zeros(count, np.uint64)
    for place in range(SHINGLE):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += codes[place : place + count]
    hashes ^= hashes >> np.uint64(32)
    hashes *= np.uint64(0xD6E8FEB86659FD93)
    hashes ^= hashes >> np.uint64(29)
    return hashes


def document_keys(texts: list[str], near: bool) -> tuple[np.ndarray, np.ndarray]:
    """What copies of a document share, and each document's share of Chinese characters.

    White space doesn't count. The first key is a hash of the whole text. The others are the bands of a MinHash
    signature over shingles of 5 characters, of which 8 bits a permutation are kept, so that 8 of them make a key of 64
    bits. A text shorter than a shingle is its own shingle. Sources: Broder, "On the resemblance and containment of
    documents" (1997); Li and König, "b-Bit Minwise Hashing" (2010); the signature is rensa's.

    Returns:
        Keys, uint64 of shape (documents, 1 + BANDS), or (documents, 1) unless `near`; shares of shape (documents,).
    """
    dense = ["".join(text.split()) for text in texts]
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in dense)
    exact = np.frombuffer(digests, "<u8").reshape(-1, 1)
    padded = [text[:COMPARED].ljust(SHINGLE, "\0") for text in dense]
    lengths = np.array([len(text) for text in padded])
    starts = np.cumsum(lengths) - lengths
    codes = np.frombuffer("".join(padded).encode("utf-32-le"), "<u4")
    chinese = np.add.reduceat(is_chinese(codes), starts, dtype=np.int64)
    shares = chinese / np.maximum(1, [min(len(text), COMPARED) for text in dense])
    if not near:
        return exact, shares
    within = np.ones(len(codes), bool)
    for place in range(1, SHINGLE):
        within[starts + lengths - place] = False  # a shingle doesn't go over the end of its document
    hashes = hash_shingles(codes)[within[: len(codes) - SHINGLE + 1]]
    offsets = np.concatenate([[0], np.cumsum(lengths - SHINGLE + 1)]).astype(np.uint64)
    digest = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, PERMUTATIONS, 42)
    signatures = (np.array(digest.to_rows(), np.uint32) & 255).astype(np.uint8)
    return np.hstack([exact, signatures.view("<u8")]), shares


def sign(texts: list[str], filters: Filters) -> tuple[list[str], Signed]:
    """The texts without control characters, and all that is to be known of them."""
    cleaned = [remove_control(text) for text in texts] if filters.remove_control else texts
    keys, shares = document_keys(cleaned, filters.near_duplicates > 0)
    reasons, lines = [], []
    for text, share in zip(cleaned, shares, strict=True):
        repeated, hashes = look_at_lines(text)
        lines.append(hashes if filters.boilerplate_documents else [])
        little = share < filters.min_chinese
        reasons.append(REASONS[0] if little else REASONS[1] if repeated > filters.max_repeated else "")
    characters = np.array([len(text) for text in texts])
    control = [before - len(text) for before, text in zip(characters.tolist(), cleaned, strict=True)]
    return cleaned, Signed(reasons, shares, keys, lines, characters, control)


class Seen:
    """The keys of the documents so far, among which a new one looks for copies; a key leads to the first that had it.

    An open-addressing table of document numbers, each checked against its document's keys. With near duplicates a
    document costs 136 bytes of keys and 113 to 226 of table, 0.3 GB a million documents; without, 8 and 7 to 13. Two
    documents of similarity 0.8 share one of the 16 bands with probability 0.95, of 0.9 with 0.9999; then the signatures
    decide, whose estimate has a standard error of 0.035 at 0.8.

    Args:
        columns: keys of a document, of `document_keys`.
        exact: whether the first key, of the whole text, is looked for.
        threshold: the similarity from which a document is a near duplicate.
    """

    ROWS = 1 << 16  # documents whose keys are one array

    def __init__(self, columns: int, exact: bool, threshold: float):
        self.searched = range(0 if exact else 1, columns)
        self.columns, self.threshold, self.count = columns, threshold, 0
        self.blocks, self.views = [], []  # the keys, and the same for reading single ones, which is faster
        self.table = memoryview(np.zeros(1 << 12, np.uint32))

    def row(self, number: int) -> np.ndarray:
        """The keys of a document."""
        return self.blocks[number // self.ROWS][number % self.ROWS]

    def probe(self, column: int, key: int) -> tuple[int, int]:
        """The place of a key in the table, and the number of its document from 1 on, 0 where the place is free."""
        place = ((key ^ column) * 0x9E3779B97F4A7C15 >> 32) & (len(self.table) - 1)
        while number := self.table[place]:
            if self.views[(number - 1) // self.ROWS][(number - 1) % self.ROWS, column] == key:
                break
            place = (place + 1) & (len(self.table) - 1)
        return place, number

    def find(self, row: np.ndarray) -> tuple[int, float] | None:
        """The number, from 0 on, of a document that this one copies and their similarity; None where it is new.

        Args:
            row: the document's keys, uint64 of shape (columns,).
        """
        keys, compared = row.tolist(), set()
        for column in self.searched:
            number = self.probe(column, keys[column])[1] - 1
            if number >= 0 and column == 0:
                return number, 1.0
            if number >= 0 and number not in compared:
                compared.add(number)
                equal = (row[1:].view(np.uint8) == self.row(number)[1:].view(np.uint8)).mean()
                similarity = (equal - 1 / 256) / (1 - 1 / 256)  # 8 bits agree by chance once in 256
                if similarity >= self.threshold:
                    return number, float(similarity)
        return None

    def add(self, row: np.ndarray) -> int:
        """Adds a document's keys and returns its number."""
        if self.count % self.ROWS == 0:
            self.blocks.append(np.zeros((self.ROWS, self.columns), np.uint64))
            self.views.append(memoryview(self.blocks[-1]))
        self.blocks[-1][self.count % self.ROWS] = row
        self.count += 1
        if self.count * self.columns > 0.6 * len(self.table):
            size = 2 * len(self.table)
            self.table = None  # before the new one is there
            self.table = memoryview(np.zeros(size, np.uint32))
            for number in range(self.count):
                self.enter(number, self.row(number).tolist())
        else:
            self.enter(self.count - 1, row.tolist())
        return self.count - 1

    def enter(self, number: int, keys: list[int]) -> None:
        for column, key in enumerate(keys):
            place, first = self.probe(column, key)
            if not first:
                self.table[place] = number + 1


class RecurringLines:
    """Counts in how many documents a line stood, within bounded memory (about 40 MB).

    When there are too many lines, every count is lowered by one and those at zero go, so that a count is never too high
    and too low by at most the number of lines seen / CAPACITY. Source: Misra and Gries, "Finding repeated elements"
    (1982).

    Args:
        documents: from how many on a line is boilerplate; 0 counts nothing.
    """

    CAPACITY = 1 << 18

    def __init__(self, documents: int):
        self.documents, self.counts = documents, {}

    def update(self, hashes: list[int]) -> set[int]:
        """Counts a document's lines and returns those that had stood in enough documents before it."""
        found = {line for line in hashes if self.counts.get(line, 0) >= self.documents} if self.documents else set()
        for line in hashes:
            self.counts[line] = self.counts.get(line, 0) + 1
        if len(self.counts) > self.CAPACITY:
            self.counts = {line: count - 1 for line, count in self.counts.items() if count > 1}
        return found


class Judge:
    """Decides in the corpus' order what becomes of each document.

    Copies are looked for among whole documents: a sentence that stands within a long one is no copy of it.

    Args:
        split: the share of the documents that is held out, by a hash of their text and `seed`: a document stays on its
            side when others come in, and a copy would be on the same.
    """

    def __init__(self, filters: Filters, split: float, seed: int):
        self.filters, self.split, self.seed = filters, split, seed
        columns = 1 + BANDS if filters.near_duplicates else 1
        self.seen = Seen(columns, filters.exact_duplicates, filters.near_duplicates)
        self.lines = RecurringLines(filters.boilerplate_documents)
        self.held_out = bytearray()  # whether a document that was seen is a validation one

    def is_held_out(self, keys: np.ndarray) -> bool:
        mixed = hashlib.blake2b(int(keys[0]).to_bytes(8, "little"), digest_size=8, salt=str(self.seed).encode()[:16])
        return int.from_bytes(mixed.digest(), "little") < self.split * 2**64

    def decide(self, signed: Signed, validation: bool) -> tuple[list[str], dict[int, set[int]], dict[int, tuple]]:
        """What becomes of the documents of a piece.

        Args:
            validation: they are those of --validation_path, which are all kept as they are.

        Returns:
            For each document "train", "validation" or one of REASONS; by document, the hashes of the lines that are
            taken out; by document, the number of the one that it copies and their similarity.
        """
        fates, lines, copies = [], {}, {}
        for number, keys in enumerate(signed.keys):
            held_out = validation or self.is_held_out(keys)
            fate = "validation" if held_out else signed.reasons[number] or "train"
            if fate in ("train", "validation") and not validation and (found := self.seen.find(keys)):
                copies[number] = found
                exact = signed.keys[number][0] == self.seen.row(found[0])[0]
                fate = "copy of validation" if self.held_out[found[0]] else "duplicate" if exact else "near duplicate"
            elif fate in ("train", "validation"):
                self.seen.add(keys)
                self.held_out.append(held_out)
            if fate == "train" and (recurring := self.lines.update(signed.lines[number])):
                lines[number] = recurring
            fates.append(fate)
        return fates, lines, copies
