"""Supervised fine-tuning, side by side: train_qwen, TRL's SFTTrainer in three ways, and a plain padded Trainer.

    pip install -r requirements-bench.txt
    python benchmarks/bench_sft.py                      about 15 minutes on 2 cores
    python benchmarks/bench_sft.py --rounds 1 --batch_sizes 8

Every way trains the same Qwen2 (6 layers x 256, vocabulary 8192) on the same rows in the same order, fp32, one thread,
in a process of its own; the ways take turns, `--rounds` times, and the median counts. Measured is the whole of
`trainer.train()`: real (unpadded) tokens per CPU second, and how far the peak of the resident memory rises over what
the process held after its imports. All ways run without gradient checkpointing, which TRL would switch on by itself.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
WAYS = ["train_qwen", "trl default", "trl packing", "trl chunked loss", "plain trainer"]
COMMON = {
    "use_cpu": True,
    "learning_rate": 1e-4,
    "num_train_epochs": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "bf16": False,
}


def make_rows(count: int = 96) -> list[dict]:
    """Rows of 50 to 550 tokens (log-uniform), the last 30 to 70 % of each supervised; in the order of training."""
    import numpy as np

    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        length = int(np.exp(rng.uniform(np.log(50), np.log(550))))
        prompt = int(length * rng.uniform(0.3, 0.7))
        input_ids = rng.integers(10, 8192, length).tolist()
        rows.append({"input_ids": input_ids, "labels": [-100] * prompt + input_ids[prompt:], "length": length})
    return rows


def build_model():
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=8192,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )


def import_way(way: str):
    """Imports what the way needs, so that the memory of imports is not counted, and returns its builder."""
    import deepspeed  # noqa: F401  (Accelerate imports it in every way as soon as training starts)
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    torch.set_num_threads(1)
    if way == "train_qwen":
        sys.path.insert(0, str(ROOT / "train_qwen"))
        from train import TrainingArguments
        from trainer import SFTTrainer

        def build(rows, batch_size, output):
            settings = COMMON | {"eval_strategy": "no", "eval_on_start": False, "lr_scheduler_type": "linear"}
            settings |= {"warmup_steps": 0, "per_device_train_batch_size": batch_size, "output_dir": output}
            return SFTTrainer(build_model(), TrainingArguments(**settings), train_dataset=Dataset.from_list(rows))

        return build
    if way == "plain trainer":
        from transformers import DataCollatorForSeq2Seq, Qwen2Tokenizer, Trainer, TrainingArguments

        class InOrder(Trainer):
            def _get_train_sampler(self, train_dataset=None):
                return SequentialSampler(self.train_dataset)

        def build(rows, batch_size, output):
            settings = COMMON | {"per_device_train_batch_size": batch_size, "output_dir": output}
            dataset = Dataset.from_list(rows).remove_columns("length")
            collator = DataCollatorForSeq2Seq(Qwen2Tokenizer())
            return InOrder(build_model(), TrainingArguments(**settings), data_collator=collator, train_dataset=dataset)

        return build
    from transformers import Qwen2Tokenizer
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset)

    def build(rows, batch_size, output):
        settings = COMMON | {"per_device_train_batch_size": batch_size, "output_dir": output}
        if way == "trl packing":  # about as many tokens a step as the other ways have
            settings |= {"packing": True, "max_length": 1024, "per_device_train_batch_size": batch_size // 4}
        if way == "trl chunked loss":
            settings |= {"loss_type": "chunked_nll"}
        dataset = Dataset.from_list(rows).remove_columns("length")
        return InOrder(build_model(), SFTConfig(**settings), train_dataset=dataset, processing_class=Qwen2Tokenizer())

    return build


def measure(way: str, batch_size: int, output: str) -> dict:
    """One training run in this process."""
    build = import_way(way)
    rows = make_rows()
    if way != "train_qwen":  # which deals rows to steps by their lengths: all others get the same steps
        sys.path.insert(0, str(ROOT / "train_qwen"))
        from batch import BalancedBatchSampler

        lengths = [row["length"] for row in rows]
        sampler = BalancedBatchSampler(lengths, [[i] for i in range(len(rows))], batch_size, 1, 1, 0, seed=42)
        rows = [rows[i] for batch in sampler for i in batch]
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    baseline = pages * os.sysconf("SC_PAGE_SIZE")
    trainer = build(rows, batch_size, output)
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "tokens_per_cpu_second": sum(row["length"] for row in rows) / seconds,
        "memory_growth_gb": (peak - baseline) / 1e9,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def run_all(rounds: int, batch_sizes: list[int]) -> dict:
    """Medians over the rounds of every way and batch size, each run in a fresh process, the ways taking turns."""
    runs = {}
    for _ in range(rounds):
        for batch_size in batch_sizes:
            for way in WAYS:
                command = [sys.executable, __file__, "--way", way, "--batch_sizes", str(batch_size)]
                environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
                result = subprocess.run(command, env=environment, capture_output=True, text=True)
                if result.returncode:
                    sys.exit(result.stderr)
                runs.setdefault((batch_size, way), []).append(json.loads(result.stdout.splitlines()[-1]))
    return {key: {name: statistics.median(r[name] for r in some) for name in some[0]} for key, some in runs.items()}


def print_table(medians: dict, batch_sizes: list[int]) -> None:
    for batch_size in batch_sizes:
        ways = {way: medians[batch_size, way] for way in WAYS}
        peers = [ways[way] for way in WAYS if way.startswith("trl")]
        best_speed = max(peer["tokens_per_cpu_second"] for peer in peers)
        best_memory = min(peer["memory_growth_gb"] for peer in peers)
        print(
            f"\nbatch {batch_size}\n\n| way | tokens / CPU second | x TRL's best | memory growth, GB | x TRL's best |",
            end="",
        )
        print(" first loss | last loss |\n|---|---|---|---|---|---|---|")
        for way, result in ways.items():
            speed, memory = result["tokens_per_cpu_second"], result["memory_growth_gb"]
            print(
                f"| {way} | {speed:.0f} | {speed / best_speed:.2f} | {memory:.2f} | {memory / best_memory:.2f} "
                f"| {result['first_loss']:.5f} | {result['last_loss']:.5f} |"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of every way; the median counts")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 8], help="samples a step")
    parser.add_argument("--way", choices=WAYS, help="one run of one way in this process, printed as JSON")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.batch_sizes[0], f"/tmp/bench_sft_{os.getpid()}")))
    else:
        print_table(run_all(options.rounds, options.batch_sizes), options.batch_sizes)


if __name__ == "__main__":
    main()
