"""What Qwen2.5 of each size needs of one GPU's memory, by train_qwen's estimate; no GPU and no weights are needed.

    python benchmarks/memory_table.py                              a few minutes on one core
    python benchmarks/memory_table.py --sizes 7B --batch_size 1

GB of 10^9 bytes that must be free on each card, CUDA's own and the gaps between blocks included: bf16, rows of 2,048
tokens of which half are supervised; with gradient checkpointing / without.
"""

import argparse
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

RECIPE = Path(__file__).parent.parent / "train_qwen"
# As published in each config.json: hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
# num_key_value_heads, vocab_size, tied head
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
    "72B": (8192, 29568, 80, 64, 8, 152064, False),
}
WAYS = {  # all weights or LoRA, DeepSpeed's settings, GPUs
    "LoRA, 1 GPU": (True, None, 1),
    "LoRA, ZeRO-3, 8 GPUs": (True, "ds_zero3_no_offload.json", 8),
    "all weights, 1 GPU": (False, None, 1),
    "all weights, ZeRO-2, 8 GPUs": (False, "ds_zero2_no_offload.json", 8),
    "all weights, ZeRO-3, 8 GPUs": (False, "ds_zero3_no_offload.json", 8),
}


def make_config(shape: tuple):
    from transformers import Qwen2Config

    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    return Qwen2Config(**dict(zip([*names, "vocab_size", "tie_word_embeddings"], shape, strict=True)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=[*SHAPES], help="of Qwen2.5")
    parser.add_argument("--batch_size", type=int, default=4, help="rows on one GPU")
    parser.add_argument("--tokens", type=int, default=2048, help="of each row")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(RECIPE))
    from datasets import Dataset

    from arguments import ModelArguments
    from fast_path import FastPath
    from memory import Plan, estimate

    half = options.tokens // 2
    row = {"input_ids": [1] * options.tokens, "labels": [-100] * half + [1] * half, "length": options.tokens}
    print(f"| | {' | '.join(WAYS)} |")
    print("|---" * (len(WAYS) + 1), end="|\n")
    for size in options.sizes:
        cells = []
        for lora, file, gpus in WAYS.values():
            zero = json.loads((RECIPE / file).read_text())["zero_optimization"] if file else None
            plan = Plan(ModelArguments(use_lora=lora), batch_size=options.batch_size, zero=zero, world_size=gpus)
            dataset, config = Dataset.from_list([row] * options.batch_size * gpus), make_config(SHAPES[size])
            needed = [
                estimate(config, dataset, replace(plan, checkpointing=on), FastPath).needed for on in (True, False)
            ]
            cells.append(" / ".join(f"{bytes_ / 1e9:.0f}" for bytes_ in needed))
        print(f"| {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
