"""The memory of one step of BLOOM-560m's real shape, whose 250,880 tokens make the logits larger than all else.

    python benchmarks/bench_head.py             about 5 minutes, and 16 GB of memory for the model's own loss

Random weights, fp32, one thread: 4 rows of 400 tokens, the last half of each supervised; a forward and a backward pass,
each way in a process of its own. Measured is how far the peak of the resident memory rises over what the process held
before the step, less the gradients, which are as large as the weights in every way.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from bench_sft import COMMON, DEVICES, build_model, import_recipe

WAYS = ["model's own loss", "chinese_bloom padded", "chinese_bloom"]
ROWS, TOKENS = 4, 400


def measure(way: str) -> dict:
    import torch

    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 250_000, (ROWS, TOKENS), generator=random).tolist()
    labels = [[-100] * (TOKENS // 2) + row[TOKENS // 2 :] for row in ids]
    rows = [{"input_ids": row, "labels": label, "length": TOKENS} for row, label in zip(ids, labels, strict=True)]
    if way == "model's own loss":
        model = build_model("bloom-560m")

        def step():
            return model(input_ids=torch.tensor(ids), labels=torch.tensor(labels), use_cache=False).loss
    else:
        trainer = import_recipe(way, COMMON | DEVICES["cpu"], "bloom-560m")(
            rows, ROWS, f"/tmp/bench_head_{os.getpid()}"
        )
        trainer.model.train()
        model, batch = trainer.model, trainer.data_collator(rows)
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)

        def step():
            return trainer.summed_loss(model, batch) / (ROWS * TOKENS // 2)

    gradients = sum(weight.numel() for weight in model.parameters()) * 4
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far, here of the weights' making
    loss = step()
    loss.backward()
    peak = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])
    return {"loss": loss.item(), "gb": (peak * 1024 - before - gradients) / 1e9}


def main():
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    print("| way | memory of the step, GB | loss |\n|---|---|---|")
    for way in WAYS:
        command = [sys.executable, __file__, way]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        result = json.loads(printed.splitlines()[-1])
        print(f"| {way} | {result['gb']:.2f} | {result['loss']:.5f} |", flush=True)


if __name__ == "__main__":
    main()
