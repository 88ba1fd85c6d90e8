"""What a user sees of a run: the run summary, train_results.json, pictures and suspicious rows."""

import itertools
import json
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
    loader = trainer.get_train_dataloader()
    *_, steps = trainer.set_initial_training_values(args, loader)
    lengths = column(splits["train"], "length")
    batches = [lengths[batch] for batch in itertools.islice(loader.batch_sampler, 1000) if batch]
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


def suspicious_rows(table: pd.DataFrame, logits: np.ndarray, id2label: dict[int, str], split: str) -> pd.DataFrame:
    """The rows whose label the model is most sure is another one: hard ones, and the likely label errors."""
    probability = torch.from_numpy(logits).softmax(1).numpy()
    predicted = pd.Series([id2label[index] for index in logits.argmax(1).tolist()], index=table.index)
    rows = table[["text", "label", "source"]].assign(predicted=predicted, probability=probability.max(1), split=split)
    return rows[rows.label != predicted]


def save_report(trainer, predictions: dict, tables: dict, train_metrics: dict, tokens: float) -> dict:
    """Writes train_results.json, per_class.csv, confusion.png, loss.png and suspicious_rows.csv into output_dir.

    Args:
        predictions: "validation", "test" -> logits of their rows, shape (rows, num_labels).
        tokens: that this process has seen in training.

    Returns:
        What train_results.json holds.
    """
    args, history, config = trainer.args, trainer.state.log_history, trainer.model.config
    folder = Path(args.output_dir)
    losses = pd.DataFrame(history).dropna(subset="loss")  # each the mean of the steps since the last
    results = {
        "steps": trainer.state.global_step,
        "train_loss": float(np.average(losses.loss, weights=losses.step.diff().fillna(losses.step))),
        "seconds": train_metrics["train_runtime"],
        "tokens_per_second": tokens / train_metrics["train_runtime"],
        "best_checkpoint": trainer.state.best_model_checkpoint,
    }
    first = next((entry for entry in history if "eval_loss" in entry and entry["step"] == 0), {})
    results |= {f"validation_{name}_before": first[f"eval_{name}"] for name in ("loss", "accuracy") if first}
    is_quick = len(tables["train"]) * config.num_labels <= MAX_BASELINE
    compared, suspicious = score_baseline(tables) if predictions and is_quick else {}, []
    for split, logits in predictions.items():
        labels = np.array([config.label2id[label] for label in tables[split].label])
        scores = trainer.measure(logits, labels)
        results |= {f"{split}_{name}": scores[name] for name in ("loss", "accuracy", "macro_f1")}
        beside = ""
        if compared:
            results |= {f"{split}_{name}_of_baseline": compared[split][name] for name in ("accuracy", "macro_f1")}
            beside = f"   the linear model beside it {compared[split]['accuracy']:.4f}"
        print(f"{split:<11} accuracy {scores['accuracy']:.4f}{beside}")
        suspicious.append(suspicious_rows(tables[split], logits, config.id2label, split))
    if predictions:  # the last part: the test rows where there are any
        table = pd.DataFrame(scores["per_class"], index=pd.Index(config.id2label.values(), name="class"))
        table = table.iloc[np.lexsort((table.f1, table.support == 0))]  # those without a row at the end
        write_csv(table.reset_index(), folder / "per_class.csv")
        print(f"{split} rows by class, the worst first:\n{table.to_string(float_format='%.3f')}")
        if len(unseen := table.index[table.support == 0]):
            print(f"classes without a {split} row, which macro-F1 leaves out: {', '.join(unseen)}")
        if config.num_labels <= MAX_PICTURED:
            figure = plot_confusion(labels, logits.argmax(1), list(config.id2label.values()))
            figure.savefig(folder / "confusion.png", dpi=120)
        rows = pd.concat(suspicious).sort_values("probability", ascending=False)
        write_csv(rows.head(SUSPICIOUS_ROWS), folder / "suspicious_rows.csv")
    of_gpu, of_process = torch.cuda.max_memory_allocated(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1000
    results["peak_memory_gb"] = (of_gpu if args.device.type == "cuda" else of_process) / 1e9
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

    `labels` and `predicted` are numbers, shape (rows,), and so are the names where there is no Chinese font.
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
