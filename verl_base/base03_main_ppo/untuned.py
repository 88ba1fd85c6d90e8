"""The tiny model before it has learned anything: the tokenizer of a task's sft.jsonl, and random weights.

python -m base03_main_ppo.untuned cache_data/arithmetic/sft.jsonl output_main_ppo/untuned
"""

import json
import sys
from pathlib import Path

from tiny import build_untuned


def save_untuned(sft_path: Path, folder: str, seed: int = 42) -> None:
    rows = [json.loads(line) for line in sft_path.read_text("utf-8").splitlines()]
    for part in build_untuned(rows, seed):
        part.save_pretrained(folder)


if __name__ == "__main__":
    save_untuned(Path(sys.argv[1]), sys.argv[2])
