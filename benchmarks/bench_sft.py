"""Supervised fine-tuning, side by side: a recipe, TRL's SFTTrainer in several ways, and a plain padded Trainer.

    pip install -r requirements-bench.txt
    python benchmarks/bench_sft.py                      about 15 minutes on 2 cores
    python benchmarks/bench_sft.py --rounds 1 --batch_sizes 8
    python benchmarks/bench_sft.py --model bloom        chinese_bloom, with and without padding, in place of train_qwen
    python benchmarks/bench_sft.py --device cuda --model 0.5b --batch_sizes 8      on one GPU, in bf16

On the CPU every way trains the same Qwen2 or BLOOM (6 layers x 256, vocabulary 8192) on the same rows in the same
order, fp32, one thread, in a process of its own; the ways take turns, `--rounds` times, and the median counts. Measured
is the whole of `trainer.train()`: real (unpadded) tokens per CPU second, and how far the peak of the resident memory
rises over what the process held after its imports. All ways run without gradient checkpointing, which TRL would switch
on by itself.

On a GPU it is a Qwen2.5 in its real shape with random weights, fp32 with bf16 autocast, on rows of 50 to 2,000 tokens;
measured are real tokens per second in the second epoch, the share of the card's bf16 peak that the useful
operations take (MFU; attention's own products left out), and the most memory that PyTorch held.
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
OTHER_WAYS = ["trl default", "trl packing", "trl chunked loss", "plain trainer"]
WAYS = {"small": ["train_qwen", *OTHER_WAYS], "bloom": ["chinese_bloom", "chinese_bloom padded", *OTHER_WAYS]}
GPU_WAYS = ["train_qwen", "train_qwen packing", "trl default", "trl liger", "trl packing", "trl chunked loss"]
# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, vocab_size, tied head
SHAPES = {
    "small": (256, 1024, 6, 4, 2, 8192, True),
    "bloom": (256, 1024, 6, 4, 4, 8192, True),
    "bloom-560m": (1024, 4096, 24, 16, 16, 250880, True),
    "0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
}
PEAK_TFLOPS = {"A100": 312, "A800": 312, "H100": 989, "H800": 989, "H200": 989, "H20": 148, "RTX 4090": 165}  # bf16
COMMON = {
    "learning_rate": 1e-4,
    "num_train_epochs": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
DEVICES = {
    "cpu": {"use_cpu": True, "bf16": False},
    "cuda": {"use_cpu": False, "bf16": True, "num_train_epochs": 2},
}


def make_rows(device: str) -> list[dict]:
    """Rows of 50 to 550 (on a GPU 2,000) tokens, log-uniform, the last 30 to 70 % supervised; in order of training."""
    import numpy as np

    rng = np.random.default_rng(0)
    rows = []
    for _ in range(96):
        length = int(np.exp(rng.uniform(np.log(50), np.log(550 if device == "cpu" else 2000))))
        prompt = int(length * rng.uniform(0.3, 0.7))
        input_ids = rng.integers(10, 8192, length).tolist()
        rows.append({"input_ids": input_ids, "labels": [-100] * prompt + input_ids[prompt:], "length": length})
    return rows


def build_model(shape: str):
    import torch
    from transformers import BloomConfig, BloomForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    if shape.startswith("bloom"):
        hidden_size, _, layers, heads, _, vocab_size, _ = SHAPES[shape]
        config = BloomConfig(vocab_size=vocab_size, hidden_size=hidden_size, n_layer=layers, n_head=heads)
        return BloomForCausalLM(config)
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    names += ["vocab_size", "tie_word_embeddings"]
    with torch.device("cpu" if shape == "small" else "cuda"):
        return Qwen2ForCausalLM(Qwen2Config(**dict(zip(names, SHAPES[shape], strict=True))))


def import_recipe(way: str, common: dict, shape: str):
    """Imports the recipe that the way is called after; returns its builder."""
    sys.path.insert(0, str(ROOT / way.split()[0]))
    from datasets import Dataset

    from arguments import TrainingArguments
    from trainer import SFTTrainer

    if shape.startswith("bloom"):
        from alibi import AlibiFastPath as FastPath
    else:
        from fast_path import FastPath

    def build(rows, batch_size, output):
        settings = common | {"eval_strategy": "no", "eval_on_start": False, "lr_scheduler_type": "linear"}
        settings |= {"warmup_steps": 0, "per_device_train_batch_size": batch_size, "output_dir": output}
        packing = None
        if way.endswith("packing"):
            packing, settings["per_device_train_batch_size"] = 2048, batch_size // 4
        dataset = Dataset.from_list(rows)
        arguments = TrainingArguments(**settings)
        trainer = SFTTrainer(build_model(shape), arguments, train_dataset=dataset, packing=packing)
        trainer.add_callback(FastPath(trainer, remove_padding=not way.endswith("padded")))
        return trainer

    return build


def import_way(way: str, device: str, shape: str):
    """Imports what the way needs, so that the memory of imports is not counted, and returns its builder."""
    import deepspeed  # noqa: F401  (Accelerate imports it in every way as soon as training starts)
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    common = COMMON | DEVICES[device]
    torch.set_num_threads(1 if device == "cpu" else 4)
    if not way.startswith(("trl", "plain")):
        return import_recipe(way, common, shape)
    if way == "plain trainer":
        from transformers import DataCollatorForSeq2Seq, Qwen2Tokenizer, Trainer, TrainingArguments

        class InOrder(Trainer):
            def _get_train_sampler(self, train_dataset=None):
                return SequentialSampler(self.train_dataset)

        def build(rows, batch_size, output):
            settings = common | {"per_device_train_batch_size": batch_size, "output_dir": output}
            dataset = Dataset.from_list(rows).remove_columns("length")
            collator = DataCollatorForSeq2Seq(Qwen2Tokenizer())
            arguments, model = TrainingArguments(**settings), build_model(shape)
            return InOrder(model, arguments, data_collator=collator, train_dataset=dataset)

        return build
    from transformers import Qwen2Tokenizer
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset)

    def build(rows, batch_size, output):
        settings = common | {"per_device_train_batch_size": batch_size, "output_dir": output, "max_length": 2048}
        if way == "trl packing":  # about as many tokens a step as the other ways have
            length = 1024 if device == "cpu" else 2048
            settings |= {"packing": True, "max_length": length, "per_device_train_batch_size": batch_size // 4}
        if way == "trl liger":
            settings |= {"use_liger_kernel": True}
        if way == "trl chunked loss":
            settings |= {"loss_type": "chunked_nll"}
        dataset = Dataset.from_list(rows).remove_columns("length")
        model, arguments = build_model(shape), SFTConfig(**settings)
        return InOrder(model, arguments, train_dataset=dataset, processing_class=Qwen2Tokenizer())

    return build


def measure(way: str, batch_size: int, output: str, device: str, shape: str) -> dict:
    """One training run in this process."""
    build = import_way(way, device, shape)
    rows = make_rows(device)
    if way.startswith(
        ("trl", "plain")
    ):  # a recipe assigns rows to steps by their lengths: the others get the same steps
        sys.path.insert(0, str(ROOT / "train_qwen"))
        from batch import BalancedBatchSampler

        lengths = [row["length"] for row in rows]
        sampler = BalancedBatchSampler(lengths, [[i] for i in range(len(rows))], batch_size, 1, 1, 0, seed=42)
        rows = [rows[i] for batch in sampler for i in batch]
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    baseline = pages * os.sysconf("SC_PAGE_SIZE")
    trainer = build(rows, batch_size, output)
    if device == "cuda":
        return measure_on_gpu(trainer, rows)
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    speed, memory = sum(row["length"] for row in rows) / seconds, (peak - baseline) / 1e9
    return {"tokens_per_second": speed, "memory_gb": memory, **first_and_last_loss(trainer)}


def first_and_last_loss(trainer) -> dict:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"first_loss": losses[0], "last_loss": losses[-1]}


def measure_on_gpu(trainer, rows: list[dict]) -> dict:
    """Speed in the second epoch: in the first one kernels are chosen and memory is found for each new length."""
    import torch
    from transformers import TrainerCallback

    marks = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            marks.append((time.perf_counter(), state.epoch))

    trainer.add_callback(Clock())
    trainer.train()
    (start, first_epoch), (end, last_epoch) = next(mark for mark in marks if mark[1] >= 1), marks[-1]
    share = last_epoch - first_epoch  # of the rows, and nearly of the tokens
    tokens, supervised = (share * sum(map(count, rows)) for count in (lambda row: row["length"], count_supervised))
    head, embedding = trainer.model.get_output_embeddings().weight, trainer.model.get_input_embeddings().weight
    outside = head.numel() + (0 if embedding is head else embedding.numel())
    body = sum(weight.numel() for weight in trainer.model.parameters()) - outside
    flops = 6 * (body * tokens + head.numel() * supervised)  # the head is needed where something is supervised only
    peak = next(tflops for name, tflops in PEAK_TFLOPS.items() if name in torch.cuda.get_device_name())
    return {
        "tokens_per_second": tokens / (end - start),
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9,
        **first_and_last_loss(trainer),
        "mfu": flops / (end - start) / (peak * 1e12),
    }


def count_supervised(row: dict) -> int:
    return sum(label != -100 for label in row["labels"])


def run_all(options) -> dict:
    """Medians over the rounds of every way and batch size, each run in a fresh process, the ways taking turns."""
    runs = {}
    for _ in range(options.rounds):
        for batch_size in options.batch_sizes:
            for way in WAYS.get(options.model, GPU_WAYS):
                command = [sys.executable, __file__, "--way", way, "--batch_sizes", str(batch_size)]
                command += ["--device", options.device, "--model", options.model]
                environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
                result = subprocess.run(command, env=environment, capture_output=True, text=True)
                if result.returncode:  # out of memory, say: the other ways are measured all the same
                    print(f"batch {batch_size}, {way} failed:\n{result.stderr[-1000:]}", file=sys.stderr, flush=True)
                else:
                    runs.setdefault((batch_size, way), []).append(json.loads(result.stdout.splitlines()[-1]))
    return {key: {name: statistics.median(r[name] for r in some) for name in some[0]} for key, some in runs.items()}


def print_table(medians: dict, options) -> None:
    second, memory = ("CPU second", "memory growth") if options.device == "cpu" else ("second", "peak memory")
    for batch_size in options.batch_sizes:
        ways = {way: result for (size, way), result in medians.items() if size == batch_size}
        peers = [result for way, result in ways.items() if way.startswith("trl")]
        best_speed = max(peer["tokens_per_second"] for peer in peers)
        best_memory = min(peer["memory_gb"] for peer in peers)
        columns = ["way", f"tokens / {second}", "x TRL's best", f"{memory}, GB", "x TRL's best", "first loss"]
        columns += ["last loss"] + ["MFU"] * (options.device == "cuda")
        print(f"\nbatch {batch_size}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for way, result in ways.items():
            speed, gigabytes = result["tokens_per_second"], result["memory_gb"]
            cells = [way, f"{speed:.0f}", f"{speed / best_speed:.2f}", f"{gigabytes:.2f}"]
            cells += [f"{gigabytes / best_memory:.2f}", f"{result['first_loss']:.5f}", f"{result['last_loss']:.5f}"]
            cells += [f"{result['mfu']:.1%}"] if "mfu" in result else []
            print(f"| {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of every way; the median counts")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 8], help="examples a step")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="cuda: one GPU, bf16, longer rows")
    parser.add_argument("--model", choices=SHAPES, default="small", help="shape of the model; the larger ones on a GPU")
    parser.add_argument(
        "--way", choices={*GPU_WAYS, *sum(WAYS.values(), [])}, help="one run of one way in this process, as JSON"
    )
    options = parser.parse_args()
    if options.way:
        output = f"/tmp/bench_sft_{os.getpid()}"
        print(json.dumps(measure(options.way, options.batch_sizes[0], output, options.device, options.model)))
    else:
        print_table(run_all(options), options)


if __name__ == "__main__":
    main()
