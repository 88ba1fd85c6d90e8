"""Asks a trained model questions that it was trained on, and counts the answers that it gives word for word.

    python recall.py output_zero2 --data_path data/custom_data001 --show 5

A first look at whether training took hold: a model that learned nothing, or was served with another template than it
was trained with, gets none. A large model that saw each row once or twice need not get any.
"""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import argparse
import sys

import numpy as np
import torch

from data import IGNORE_INDEX, load_splits
from infer import load_trained_model
from rows import UserError


def first_exchange(row: dict) -> tuple[list[int], list[int]]:
    """Token ids of a training row up to its first answer, and of that answer, end of turn included."""
    supervised = [label != IGNORE_INDEX for label in row["labels"]]
    start = supervised.index(True)
    end = next((i for i in range(start, len(supervised)) if not supervised[i]), len(supervised))
    return row["input_ids"][:start], row["input_ids"][start:end]


def ask(model, tokenizer, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Token ids of the greedy reply, end of turn included."""
    input_ids = torch.tensor([prompt], device=model.device)
    attention_mask = torch.ones_like(input_ids)
    output = model.generate(
        input_ids=input_ids, attention_mask=attention_mask, do_sample=False, max_new_tokens=max_new_tokens
    )
    return output[0, len(prompt) :].tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder that the training wrote")
    parser.add_argument("--data_path", default="data/custom_data001", help="what it was trained on")
    parser.add_argument("--validation_split", type=float, default=0.05, help="as in training: those rows are not asked")
    parser.add_argument("--model_max_length", type=int, default=2048, help="as in training")
    parser.add_argument("--seed", type=int, default=42, help="as in training")
    parser.add_argument("--count", type=int, default=20, help="questions asked, drawn at random")
    parser.add_argument("--show", type=int, default=5, help="questions printed with their answers")
    parser.add_argument("--at_least", type=int, default=0, help="fewer right answers than this are an error")
    options = parser.parse_args()
    options.eval_data_path, options.skip_bad_rows = None, True

    model, tokenizer = load_trained_model(options.model)
    rows, _, _ = load_splits(options, tokenizer, options.seed, bad_rows_file=None)
    chosen = np.random.default_rng(options.seed).permutation(len(rows))[: options.count]
    right = 0
    for number, row in enumerate(rows.select(chosen)):
        prompt, answer = first_exchange(row)
        reply = ask(model, tokenizer, prompt, max_new_tokens=len(answer))
        right += reply == answer
        if number < options.show:
            print("\n" + tokenizer.decode(prompt + reply).strip())
            if reply != answer:
                print("  where the training answer is:", tokenizer.decode(answer))
    print(f"\nword for word: {right} of {len(chosen)}")
    if right < options.at_least:
        sys.exit(f"error: fewer than {options.at_least}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
