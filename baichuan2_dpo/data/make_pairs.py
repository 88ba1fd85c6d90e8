"""Preference pairs of three kinds out of questions.jsonl, untold.jsonl, evasive.txt and rude.txt: train/, validation/.

    python data/make_pairs.py

    helpful   a helpful reply against an evasive one
    polite    a polite reply against a rude one
    right     a right answer against a wrong one of the same style and length

Every fifth line of questions.jsonl and of the bad replies is held out: 30 of 150 prompts, and 15 of 75 bad replies of a
kind. A held-out question asks in other words for a fact that one training question of its topic tells; no near-copy of
it is in training, nor any of its replies. Half of its wrong answers name what the wrong answer of training names. The
held-out prompts come twice: with bad replies that training has too (helpful.jsonl, polite.jsonl) and with held-out ones
(unseen.jsonl). untold.jsonl is the control: right against wrong on 30 facts that training does not tell. The same
sources give the same bytes.
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
FIFTH = 5


def read(name: str) -> list[str]:
    return (HERE / name).read_text(encoding="utf-8").splitlines()


def read_rows(name: str) -> list[dict]:
    return [json.loads(line) for line in read(name)]


def split(lines: list) -> tuple[list, list]:
    """The lines for training, and every fifth one, held out."""
    return [line for number, line in enumerate(lines, 1) if number % FIFTH], lines[FIFTH - 1 :: FIFTH]


def pair(questions: list[dict], chosen: str, bad: list[str]) -> list[dict]:
    """One row a question: its text of the kind `chosen` against the bad replies in turn, over and over."""
    return [
        {"prompt": question["prompt"], "chosen": question[chosen], "rejected": bad[number % len(bad)]}
        for number, question in enumerate(questions)
    ]


def pair_right(questions: list[dict]) -> list[dict]:
    return [{"prompt": row["prompt"], "chosen": row["answer"], "rejected": row["wrong"]} for row in questions]


def write(name: str, rows: list[dict]):
    path = HERE / name
    path.parent.mkdir(exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")
    print(f"{name}: {len(rows)} pairs")


def main():
    train, validation = split(read_rows("questions.jsonl"))
    unseen = []
    for kind, source in (("helpful", "evasive.txt"), ("polite", "rude.txt")):
        known, new = split(read(source))
        write(f"train/{kind}.jsonl", pair(train, kind, known))
        write(f"validation/{kind}.jsonl", pair(validation, kind, known[::2]))
        unseen += pair(validation, kind, new)
    write("train/right.jsonl", pair_right(train))
    write("validation/right.jsonl", pair_right(validation))
    write("validation/untold.jsonl", pair_right(read_rows("untold.jsonl")))
    write("validation/unseen.jsonl", unseen)


if __name__ == "__main__":
    main()
