"""What a user sees of a run: the run summary, train_results.json, pictures and suspicious rows."""

import itertools
import json
import math
import resource
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from baseline import score_baseline
from data import column
from rows import write_csv

SUSPICIOUS_ROWS = 50
MAX_PICTURED = 200  # classes: the picture grows with their square
MAX_BASELINE = 1_000_000  # training rows times classes; so many take minutes


def print_run_summary(trainer, tokenizer, model_name: str, splits: dict, tables: dict, notes: list[str]) -> None:
    """Some lines before the first step: what is trained, on what, how, and the first row with its label.

    Args:
        splits: part -> its encoded rows; tables: part -> its texts and labels.
    """
    args = trainer.args
    parameters = list(trainer.model.parameters())
    # Under ZeRO-3 a parameter is an empty shell that knows its full size as ds_numel.
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters]
    trainable = sum(size for size, parameter in zip(sizes, parameters, strict=True) if parameter.requires_grad)
    sampler = trainer.get_train_dataloader().batch_sampler
    steps_per_epoch = math.ceil(len(sampler) / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_per_epoch * args.num_train_epochs)
    lengths = column(splits["train"], "length")
    batches = [lengths[batch] for batch in itertools.islice(sampler, 1000) if batch]
    padding = 1 - sum(batch.sum() for batch in batches) / sum(batch.max() * len(batch) for batch in batches)
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type
    labels = ", ".join(f"{label} {count:,}" for label, count in tables["train"].label.value_counts().items())
    cut = {name: int(column(rows, "cut").sum()) for name, rows in splits.items()}
    cuts = [f"{count:,} of the {name} rows are longer and were cut at the end" for name, count in cut.items() if count]
    first = splits["train"][0]["input_ids"]
    lines = [
        f"model       {model_name}  ({sum(sizes):,} parameters, {trainable:,} trainable)",
        f"rows        {', '.join(f'{len(rows):,} {name}' for name, rows in splits.items())}",
        f"classes     {labels}",
        f"tokens      {lengths.sum():,} an epoch, {lengths.max()} in the longest row",
        f"padding     {padding:.1%}",
        f"steps       {steps:,} of about {args.per_device_train_batch_size} rows x {args.world_size} processes"
        f" x {args.gradient_accumulation_steps} accumulation",
        f"devices     {args.world_size} x {device}, {precision}",
        *(f"note        {note}" for note in [*notes, *cuts]),
        f"first row   {tables['train'].label[0]}: {tokenizer.decode(first)}",
    ]
    print("\n".join(lines), flush=True)


def per_class_table(scores: dict, id2label: dict[int, str]) -> pd.DataFrame:
    """Precision, recall, F1 and rows of each class, the worst F1 first; classes that have no row at the end."""
    table = pd.DataFrame(scores["per_class"], index=pd.Index(id2label.values(), name="class"))
    return pd.concat([table[table.support > 0].sort_values("f1"), table[table.support == 0]])


def suspicious_rows(table: pd.DataFrame, logits: np.ndarray, id2label: dict[int, str], split: str) -> pd.DataFrame:
    """The rows whose label the model is most sure is another one: hard ones, and the likely label errors."""
    probability = torch.from_numpy(logits).softmax(1).numpy()
    predicted = pd.Series([id2label[index] for index in logits.argmax(1).tolist()], index=table.index)
    rows = table[["text", "label", "source"]].assign(predicted=predicted, probability=probability.max(1), split=split)
    return rows[rows.label != predicted].sort_values("probability", ascending=False)


def mean_train_loss(history: list[dict]) -> float:
    """The mean over all steps of a run, also those before it was started again; an entry is the mean since the last."""
    entries = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    starts = [0, *(step for step, _ in entries)]
    return sum(loss * (step - start) for start, (step, loss) in zip(starts, entries, strict=False)) / starts[-1]


def save_report(trainer, predictions: dict, tables: dict, train_metrics: dict, tokens: float) -> dict:
    """Writes train_results.json, per_class.csv, confusion.png, loss.png and suspicious_rows.csv into output_dir.

    Args:
        predictions: "validation", "test" -> logits of their rows, shape (rows, num_labels).
        tables: part -> its texts and labels.
        tokens: that this process has seen in training.

    Returns:
        What train_results.json holds.
    """
    args, history, config = trainer.args, trainer.state.log_history, trainer.model.config
    folder = Path(args.output_dir)
    results = {
        "steps": trainer.state.global_step,
        "train_loss": mean_train_loss(history),
        "seconds": train_metrics["train_runtime"],
        "tokens_per_second": tokens / train_metrics["train_runtime"],
        "best_checkpoint": trainer.state.best_model_checkpoint,
    }
    first = next((entry for entry in history if "eval_loss" in entry), {})
    results |= {f"validation_{name}_before": first[f"eval_{name}"] for name in ("loss", "accuracy") if first}
    is_quick = len(tables["train"]) * config.num_labels <= MAX_BASELINE
    compared, suspicious = score_baseline(tables) if predictions and is_quick else {}, []
    for split, logits in predictions.items():
        labels = np.array([config.label2id[label] for label in tables[split].label])
        scores = trainer.measure(logits, labels)
        results |= {f"{split}_{name}": scores[name] for name in ("loss", "accuracy", "macro_f1")}
        results |= {
            f"{split}_{name}_of_baseline": compared[split][name] for name in ("accuracy", "macro_f1") if compared
        }
        beside = f"   the linear model beside it {compared[split]['accuracy']:.4f}" if compared else ""
        print(f"{split:<11} accuracy {scores['accuracy']:.4f}{beside}")
        suspicious.append(suspicious_rows(tables[split], logits, config.id2label, split))
    if predictions:  # the last part: the test rows where there are any
        table = per_class_table(scores, config.id2label)
        write_csv(table.reset_index(), folder / "per_class.csv")
        print(f"{split} rows by class, the worst first:\n{table.to_string(float_format='%.3f')}")
        if len(unseen := table.index[table.support == 0]):
            print(f"classes without a {split} row, which macro-F1 leaves out: {', '.join(unseen)}")
        if config.num_labels <= MAX_PICTURED:
            plot_confusion(labels, logits.argmax(1), list(config.id2label.values())).savefig(
                folder / "confusion.png", dpi=120
            )
        rows = pd.concat(suspicious).sort_values("probability", ascending=False)
        write_csv(rows.head(SUSPICIOUS_ROWS), folder / "suspicious_rows.csv")
    if args.device.type == "cuda":
        results["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    else:
        results["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    (folder / "train_results.json").write_text(json.dumps(results, indent=2))
    plot_loss(history).savefig(folder / "loss.png", dpi=120)
    return results


def plot_loss(history: list[dict]):
    """The training and validation loss by step, and the validation accuracy, as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    table = pd.DataFrame(history).set_index("step")
    curves = (
        (left, "loss", "training", "-"),
        (left, "eval_loss", "validation", "o-"),
        (right, "eval_accuracy", "", "o-"),
    )
    for axes, key, label, style in curves:
        if key in table:
            axes.plot(table[key].dropna(), style, label=label, markersize=4)
        axes.grid(alpha=0.3)
    left.set(xlabel="step", ylabel="loss (nats per row)")
    left.legend()
    right.set(xlabel="step", ylabel="validation accuracy")
    return figure


def find_chinese_font():
    """An installed font that has Chinese characters, as matplotlib's FontProperties; None where there is none."""
    from matplotlib import font_manager

    names = ("NotoSansCJK-Regular", "SourceHanSansSC", "PingFang", "msyh", "simhei", "wqy-zenhei", "wqy-microhei")
    found = {name.lower(): path for path in font_manager.findSystemFonts() for name in names if name in path}
    file = next((found[name.lower()] for name in names if name.lower() in found), None)
    return font_manager.FontProperties(fname=file) if file else None


def plot_confusion(labels: np.ndarray, predicted: np.ndarray, names: list[str]):
    """The share of each class's rows (down) that was taken for each class (across), as a matplotlib figure.

    Without a Chinese font the classes have their numbers.

    Args:
        labels, predicted: the classes' numbers, shape (rows,); names: of the classes, by their numbers.
    """
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    font, count = find_chinese_font(), len(names)
    names = names if font or all(map(str.isascii, names)) else range(count)
    share = confusion_matrix(labels, predicted, labels=range(count), normalize="true")
    size = min(2.5 + 0.6 * count, 40)
    axes = Figure(figsize=(size + 1, size), layout="constrained").subplots()
    style = {"cmap": "Blues", "im_kw": {"vmin": 0, "vmax": 1}, "values_format": ".2f", "xticks_rotation": 45}
    ConfusionMatrixDisplay(share, display_labels=names).plot(ax=axes, include_values=count <= 40, **style)
    axes.set(xlabel="predicted", ylabel="label")
    for tick in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        tick.set_fontproperties(font)
    return axes.figure
