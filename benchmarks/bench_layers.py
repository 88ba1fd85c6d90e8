"""Norms and gated MLPs that keep fewer activations: speed and memory with them and without, on several families.

    python benchmarks/bench_layers.py          about 4 minutes on 2 cores

Each family is a model of 6 layers x 256 with a vocabulary of 8192, trained for an epoch on the rows of bench_sft.py,
batch 8, fp32, one thread, in a process of its own; the two ways take turns and the median counts. All else of the fast
path is the same in both. Kept is what autograd holds of a batch between the forward and the backward pass, the weights
left out: the process's own peak has much else in it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from bench_sft import COMMON, DEVICES, ROOT, first_and_last_loss, make_rows

FAMILIES = {"qwen2": "Qwen2", "gemma": "Gemma", "phi3": "Phi3", "olmo2": "Olmo2"}
SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "vocab_size": 8192, "head_dim": 64, "pad_token_id": 0}


def measure(family: str, smaller: bool) -> dict:
    """One training run in this process."""
    import torch
    import transformers
    from datasets import Dataset

    sys.path.insert(0, str(ROOT / "train_qwen"))
    import deepspeed  # noqa: F401  (Accelerate imports it as soon as training starts)

    from arguments import TrainingArguments
    from fast_path import FastPath
    from trainer import SFTTrainer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = getattr(transformers, f"{FAMILIES[family]}Config")(**SHAPE)
    model = getattr(transformers, f"{FAMILIES[family]}ForCausalLM")(config)
    settings = COMMON | DEVICES["cpu"] | {"eval_strategy": "no", "eval_on_start": False, "warmup_steps": 0}
    settings |= {"per_device_train_batch_size": 8, "output_dir": f"/tmp/bench_layers_{os.getpid()}"}
    rows = make_rows("cpu")
    trainer = SFTTrainer(model, TrainingArguments(**settings), train_dataset=Dataset.from_list(rows))
    path = FastPath(trainer)
    if not smaller:
        path.take_smaller_layers = lambda undo: None
    path.choose_ways()
    kept = count_kept(trainer, rows[:8])
    path.undo.close()
    trainer.add_callback(path)
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    speed = sum(row["length"] for row in rows) / seconds
    return {"tokens_per_second": speed, "kept_mb": kept, **first_and_last_loss(trainer)}


def count_kept(trainer, rows: list[dict]) -> float:
    """Megabytes that the graph of one batch's loss holds, each storage once."""
    import torch

    weights = {weight.untyped_storage().data_ptr() for weight in trainer.model.parameters()}
    storages = {}

    def remember(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    trainer.model.train()
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        loss = trainer.summed_loss(trainer.model, trainer.data_collator(rows))
    kept = sum(storages.values()) / 1e6
    del loss  # until here the graph is alive
    return kept


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way; the median counts")
    parser.add_argument("--one", nargs=2, help="a family, and true or false: one run in this process, as JSON")
    options = parser.parse_args()
    if options.one:
        return print(json.dumps(measure(options.one[0], options.one[1] == "true")))
    print("| family | tokens / CPU second, without -> with | ratio | activations kept, MB | ratio | last loss |")
    print("|---|---|---|---|---|---|")
    for family in FAMILIES:
        runs = {"false": [], "true": []}
        for _ in range(options.rounds):
            for smaller, results in runs.items():
                command = [sys.executable, __file__, "--one", family, smaller]
                environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
                output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
                results.append(json.loads(output.splitlines()[-1]))
        speed, kept, loss = (
            [statistics.median(run[name] for run in results) for results in runs.values()]
            for name in ("tokens_per_second", "kept_mb", "last_loss")
        )
        print(
            f"| {family} | {speed[0]:.0f} -> {speed[1]:.0f} | {speed[1] / speed[0]:.2f} "
            f"| {kept[0]:.0f} -> {kept[1]:.0f} | {kept[1] / kept[0]:.2f} | {loss[0]:.5f}, {loss[1]:.5f} |"
        )


if __name__ == "__main__":
    main()
