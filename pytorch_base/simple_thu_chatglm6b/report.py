"""What a user sees of a run: its summary before the first step, train_results.json and loss.png."""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import html
import itertools
import json
import math
import resource
from pathlib import Path

import torch

from data import IGNORE_INDEX, column


def show_labels(tokenizer, input_ids: list[int], labels: list[int]) -> str:
    """The conversation as the model reads it, with what it is trained on between ⟦ and ⟧."""
    pieces, start = [], 0
    for position in range(1, len(input_ids) + 1):
        supervised = labels[start] != IGNORE_INDEX
        if position == len(input_ids) or (labels[position] != IGNORE_INDEX) != supervised:
            piece = tokenizer.decode(input_ids[start:position])
            pieces.append(f"⟦{piece}⟧" if supervised else piece)
            start = position
    return "".join(pieces)


def labels_as_html(tokenizer, input_ids: list[int], labels: list[int]) -> str:
    """The same for a notebook: what the model is trained on stands in colour."""
    text = html.escape(show_labels(tokenizer, input_ids, labels)).replace("\n", "<br>")
    return f"<p>{text.replace('⟦', '<mark>').replace('⟧', '</mark>')}</p>"


def print_run_summary(trainer, tokenizer, model_name: str, summary: dict, messages: list[str]) -> None:
    """One screen, before the first step: what is trained, on what, how, and the first example with its labels."""
    args, parameters = trainer.args, list(trainer.model.parameters())
    # Under ZeRO-3 a parameter is an empty shell that knows its whole size as ds_numel.
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters]
    trainable = sum(size for size, parameter in zip(sizes, parameters, strict=True) if parameter.requires_grad)
    sampler = trainer.get_train_dataloader().batch_sampler
    steps_per_epoch = math.ceil(len(sampler) / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_per_epoch * args.num_train_epochs)
    lengths = column(trainer.train_dataset, "length")
    batches = [lengths[batch] for batch in itertools.islice(sampler, 1000) if batch]
    padding = 1 - sum(batch.sum() for batch in batches) / sum(batch.max() * len(batch) for batch in batches)
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type
    notes = {
        "bad rows skipped (bad_rows.jsonl)": summary["bad_rows"],
        "copies of validation rows taken out": summary["copies_of_validation_rows_removed"],
        "duplicates among the training rows, kept": summary["duplicates_kept"],
        "rows that lost early turns to fit": summary["rows_that_lost_early_turns"],
        "rows of which each turn is an example, since the template renders history otherwise": summary[
            "rows_split_by_turn"
        ],
        "keys that were not used": summary["unused_keys"],
        "files that were not read": summary["files_not_read"],
    }
    lines = [
        f"model       {model_name}  ({sum(sizes):,} parameters, {trainable:,} trainable)",
        f"examples    {summary['rows']:,} to train on, {summary['validation_rows']:,} to validate on",
        f"tokens      {summary['tokens']:,} an epoch, {summary['supervised_tokens']:,} of them supervised",
        f"padding     {padding:.0%} of padded batches{', left out by the fast path' * args.fast_path}",
        f"steps       {steps:,} of {args.per_device_train_batch_size} examples x {args.world_size} processes"
        f" x {args.gradient_accumulation_steps} accumulation",
        f"devices     {args.world_size} x {device}, {precision}",
        *(f"note        {count}: {text}" for text, count in notes.items() if count),
        *(f"note        {message}" for message in messages),
        "first example, what is learned between ⟦ and ⟧:",
        show_labels(tokenizer, trainer.train_dataset[0]["input_ids"], trainer.train_dataset[0]["labels"]),
    ]
    print("\n".join(lines), flush=True)


def mean_train_loss(history: list[dict]) -> float:
    """The mean over all steps of a run, also those before it was started again; an entry is the mean since the last."""
    entries = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    starts = [0, *(step for step, _ in entries)]
    return sum(loss * (step - start) for start, (step, loss) in zip(starts, entries, strict=False)) / starts[-1]


def save_report(trainer, summary: dict, train_metrics: dict, steps: int) -> dict:
    """Writes train_results.json and loss.png into output_dir and returns what the former holds.

    Args:
        steps: optimizer steps taken by this process, which a resumed run did not all take.
    """
    args, history = trainer.args, trainer.state.log_history
    validation = [entry for entry in history if "eval_loss" in entry]
    seconds = train_metrics["train_runtime"]
    tokens = summary["tokens"] * trainer.state.epoch * steps / trainer.state.global_step
    results = {
        "steps": trainer.state.global_step,
        "train_loss": mean_train_loss(history),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }
    if validation:
        before, after = validation[0], validation[-1]
        if args.load_best_model_at_end and trainer.state.best_global_step:
            after = next(entry for entry in validation if entry["step"] == trainer.state.best_global_step)
        moments = {"before": before, "after": after} if before["step"] == 0 else {"after": after}
        for name in [name for name in after if name not in ("epoch", "step")]:
            title = name.replace("eval_perplexity", "perplexity")
            results |= {f"{title}_{moment}": entry[name] for moment, entry in moments.items()}
        results["eval_loss_best"] = min(entry["eval_loss"] for entry in validation)
        results["best_checkpoint"] = trainer.state.best_model_checkpoint
    if args.device.type == "cuda":
        results["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    else:
        results["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    Path(args.output_dir, "train_results.json").write_text(json.dumps(results, indent=2))
    plot_loss(history).savefig(Path(args.output_dir, "loss.png"), dpi=120)
    return results


def plot_loss(history: list[dict]):
    """The training and validation loss by step, as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    return figure
