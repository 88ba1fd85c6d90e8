"""What a user sees of a run: its summary before the first step, train_results.json and loss.png."""

import json
import math
import resource
from pathlib import Path

import torch

from freeze import describe_trained


def describe_pair(tokenizer, row: dict) -> str:
    """A pair as the model gets it: the picture's place, the caption from its tokens back to text."""
    caption = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
    return f"{row['image']}  ⟦{caption}⟧  ({row['length']} tokens, {row['source']})"


def print_run_summary(trainer, tokenizer, model_name: str, summary: dict, messages: list[str]) -> None:
    """One screen, before the first step: what is trained, on what, how, and the first pair."""
    args, galleries = trainer.args, trainer.eval_dataset or {}
    steps_per_epoch = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_per_epoch * args.num_train_epochs)
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type
    rates = {"vision": args.vision_learning_rate, "text": args.text_learning_rate}
    rates = {name: rate for name, rate in rates.items() if rate is not None}
    notes = {
        "bad rows skipped (bad_rows.jsonl)": summary["bad_rows"],
        "pairs taken out, whose images are validation images": summary["copies_of_validation_rows_removed"],
        f"captions cut to {tokenizer.model_max_length} tokens": summary["captions_cut"],
        "captions that an earlier pair has, too": summary["duplicate_captions"],
        "animated images, of which the first frame is taken": summary["animated_images"],
        "groups, each kept within a batch": summary["groups"],
        "keys that were not used": summary["unused_keys"],
        "files that were not read": summary["files_not_read"],
        "images of the folder that are in no pair": summary["images_not_used"],
    }
    in_batch = args.per_device_train_batch_size * args.world_size
    negatives = args.per_device_train_batch_size if args.cross_embedding == "base" else in_batch
    lines = [
        f"model       {model_name}",
        *(f"            {line}" for line in describe_trained(trainer.model)),
        f"pairs       {summary['rows']:,} of {summary['images']:,} images to train on; "
        f"to validate on: {', '.join(f'{name} {len(rows):,}' for name, rows in galleries.items()) or 'none'}",
        f"steps       {steps:,} of {args.per_device_train_batch_size} pairs x {args.world_size} processes"
        f" x {args.gradient_accumulation_steps} accumulation",
        f"loss        {args.cross_embedding}: each pair among {negatives:,}; pairs of one caption or image: "
        f"{args.same_caption}",
        f"rate        {args.learning_rate:g}{''.join(f', {name} encoder {rate:g}' for name, rate in rates.items())}",
        f"devices     {args.world_size} x {device}, {precision}",
        *(f"note        {count}: {text}" for text, count in notes.items() if count),
        *(f"note        {message}" for message in messages),
        f"first pair  {describe_pair(tokenizer, trainer.train_dataset[0])}",
    ]
    print("\n".join(lines), flush=True)


def mean_train_loss(history: list[dict]) -> float:
    """The mean over all steps of a run, also those before it was started again; an entry is the mean since the last."""
    entries = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    starts = [0, *(step for step, _ in entries)]
    return sum(loss * (step - start) for start, (step, loss) in zip(starts, entries, strict=False)) / starts[-1]


def save_report(trainer, summary: dict, seconds: float, steps: int) -> dict:
    """Writes train_results.json and loss.png into output_dir and returns what the former holds.

    Args:
        seconds: of the training, without the evaluations.
        steps: optimizer steps taken by this process, which a resumed run did not all take.
    """
    args, history = trainer.args, trainer.state.log_history
    validation = [entry for entry in history if "eval_mean_recall" in entry]
    training = [entry for entry in history if "logit_scale" in entry]
    pairs = summary["rows"] * trainer.state.epoch * steps / trainer.state.global_step
    results = {
        "cross_embedding": args.cross_embedding,
        "steps": trainer.state.global_step,
        "train_loss": mean_train_loss(history),
        "logit_scale": training[-1]["logit_scale"],
        "seconds": seconds,
        "pairs_per_second": pairs / seconds,
    }
    if validation:
        before, after = validation[0], validation[-1]
        if args.load_best_model_at_end and trainer.state.best_global_step:
            after = next(entry for entry in validation if entry["step"] == trainer.state.best_global_step)
        results |= {
            "mean_recall_best": max(entry["eval_mean_recall"] for entry in validation if entry["step"] > 0),
            "best_checkpoint": trainer.state.best_model_checkpoint,
        }
        for moment, entry in {"before": before, "after": after}.items():
            if moment == "after" or entry["step"] == 0:
                results[moment] = {name: value for name, value in entry.items() if name.startswith("eval_")}
    if args.device.type == "cuda":
        results["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    else:
        results["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    Path(args.output_dir, "train_results.json").write_text(json.dumps(results, indent=2))
    plot_history(history).savefig(Path(args.output_dir, "loss.png"), dpi=120)
    return results


def print_results(results: dict) -> None:
    """The run in numbers, and what each gallery gave before and after."""
    print(json.dumps({name: value for name, value in results.items() if name not in ("before", "after")}, indent=2))
    before, after = results.get("before", {}), results.get("after", {})
    if after:
        print(f"{'gallery':>24} {'':16} {'before':>8} {'after':>8}")
    for name, value in after.items():
        gallery, _, metric = name.removeprefix("eval_").rpartition("/")
        print(f"{gallery:>24} {metric:16} {before.get(name, math.nan):8.3f} {value:8.3f}")


def points_of(history: list[dict], key: str) -> tuple[list, list]:
    """Steps and values of what the log calls `key`."""
    points = [(entry["step"], entry[key]) for entry in history if key in entry]
    return [step for step, _ in points], [value for _, value in points]


def plot_history(history: list[dict]):
    """Loss, recall and temperature by step, as a matplotlib figure of three panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.5), layout="constrained")
    loss, recall, scale = figure.subplots(1, 3)
    loss.plot(*points_of(history, "loss"))
    loss.set(title="training loss", xlabel="step", ylim=(0, None))
    galleries = sorted(
        {name.removesuffix("/i2t_r1") for entry in history for name in entry if name.endswith("/i2t_r1")}
    )
    for name in galleries:
        steps, to_text = points_of(history, f"{name}/i2t_r1")
        means = [(a + b) / 2 for a, b in zip(to_text, points_of(history, f"{name}/t2i_r1")[1], strict=True)]
        recall.plot(steps, means, "o-", label=name.removeprefix("eval_"), markersize=3)
    recall.plot(*points_of(history, "accuracy_i2t"), ":", label="in-batch accuracy")
    recall.set(title="recall@1, mean of both ways", xlabel="step", ylim=(0, 1.02))
    recall.legend(fontsize=7)
    scale.plot(*points_of(history, "logit_scale"))
    scale.set(title="logit_scale", xlabel="step", ylim=(0, None))
    for axes in (loss, recall, scale):
        axes.grid(alpha=0.3)
    return figure
