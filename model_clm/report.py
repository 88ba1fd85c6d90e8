"""What a user sees of a run: its summary before the first step, train_results.json, samples.txt and loss.png."""

import json
import math
import resource
import time
from pathlib import Path

import torch


def count_parameters(model) -> tuple[int, int]:
    """All of them, and those that stand in a matrix product for each token: all but the table, if it has no head."""
    # Under ZeRO-3 a parameter is an empty shell that knows its whole size as ds_numel.
    sizes = {id(p): getattr(p, "ds_numel", p.numel()) for p in model.parameters()}
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = sum(sizes.values())
    return total, total - (0 if table is head else sizes[id(table)])


def count_rows_of_sources(windows, rows: int) -> dict[str, float]:
    """Epochs of each source that so many rows of training are."""
    if windows.slots is None:
        return dict.fromkeys(windows.sources, rows / len(windows))
    places = zip(windows.sources, windows.slots, windows.counts, strict=True)
    return {source: rows * slots / sum(windows.slots) / count for source, slots, count in places if slots}


def plan_steps(trainer) -> tuple[int, int]:
    """Steps of an epoch and of the run."""
    args = trainer.args
    per_epoch = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
    return per_epoch, args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)


def rows_of_a_step(args) -> int:
    return args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps


def print_run_summary(trainer, tokenizer, model_name: str, summary: dict, messages: list[str]) -> None:
    """One screen, before the first step: what is trained, on what, how, and a row with its borders."""
    args, windows = trainer.args, trainer.train_dataset.windows
    total, multiplied = count_parameters(trainer.model)
    per_epoch, steps = plan_steps(trainer)
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type
    epochs = count_rows_of_sources(windows, min(steps * rows_of_a_step(args), steps / per_epoch * len(windows)))
    sources, held_out = windows.manifest["sources"], summary["validation"].items()
    first = windows[0]
    border = "attention ends there" if trainer.document_mask else "a row is read as one text"
    lines = [
        f"model       {model_name}  ({total:,} parameters, {multiplied:,} of them multiplied for each token)",
        *(
            f"source      {name}: {sources[name]['tokens']:,} tokens, {sources[name]['documents']:,} documents, "
            f"{epochs.get(name, 0):.2f} epochs of it in this run"
            for name in sources
        ),
        f"rows        {len(windows):,} an epoch of {windows.length} tokens; documents end by EOS, {border}",
        f"validation  {', '.join(f'{name} {rows.bytes:,} bytes' for name, rows in held_out) or 'none was held out'}",
        f"steps       {steps:,} of {args.per_device_train_batch_size} rows x {args.world_size} processes"
        f" x {args.gradient_accumulation_steps} accumulation",
        f"devices     {args.world_size} x {device}, {precision}",
        *(f"note        {message}" for message in messages),
        f"first row, of {first['source']}: {tokenizer.decode(first['input_ids'][:200])}",
    ]
    print("\n".join(lines), flush=True)


def mean_train_loss(history: list[dict]) -> float:
    """The mean over all steps of a run, also those before it was started again; an entry is the mean since the last."""
    entries = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    starts = [0, *(step for step, _ in entries)]
    return sum(loss * (step - start) for start, (step, loss) in zip(starts, entries, strict=False)) / starts[-1]


def measure_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Floating-point operations a second in a large matrix product on this device."""
    size = 4096 if device.type == "cuda" else 1024
    a, b = torch.ones(size, size, device=device, dtype=dtype), torch.ones(size, size, device=device, dtype=dtype)
    count, start = 0, None
    while start is None or time.perf_counter() - start < seconds:
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        start, count = start or time.perf_counter(), count + 1  # the first one warms up
    return (count - 1) * 2 * size**3 / (time.perf_counter() - start)


def measure_use(trainer, tokens_per_second: float) -> float:
    """The share of what the devices can multiply that went into the model's own products (MFU).

    6 operations a token and a weight (Kaplan et al., "Scaling Laws for Neural Language Models", 2020), attention's own
    products left out; the peak is measured on this machine, by all processes at the same time.
    """
    args = trainer.args
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    peak = torch.tensor(measure_peak(args.device, half), dtype=torch.float64, device=args.device)
    return 6 * count_parameters(trainer.model)[1] * tokens_per_second / trainer.accelerator.reduce(peak).item()


def save_report(trainer, summary: dict, seconds: float, steps: int, mfu: float, texts: list[dict]) -> dict:
    """Writes train_results.json, samples.txt and loss.png into output_dir and returns what the first holds.

    Args:
        seconds: of the training steps, evaluation left out.
        steps: optimizer steps taken by this process, which a resumed run did not all take.
    """
    args, history, windows = trainer.args, trainer.state.log_history, trainer.train_dataset.windows
    validation = [entry for entry in history if "eval_loss" in entry]
    all_steps = trainer.state.global_step
    results = {
        "steps": all_steps,
        "tokens": round(summary["tokens"] * trainer.state.epoch),
        "epochs": count_rows_of_sources(windows, round(trainer.state.epoch * len(windows))),
        "mixture": summary["mixture"],
        "train_loss": mean_train_loss(history),
        "bigram_seconds": summary["bigram_seconds"],
        "seconds": seconds,
        "tokens_per_second": summary["tokens"] * trainer.state.epoch * steps / all_steps / seconds,
        "mfu": mfu,
    }
    if validation:
        before, after = validation[0], validation[-1]
        if args.load_best_model_at_end and trainer.state.best_global_step:
            after = next(entry for entry in validation if entry["step"] == trainer.state.best_global_step)
        moments = {"before": before, "after": after} if before["step"] == 0 else {"after": after}
        for name in (name for name in after if name.startswith("eval_") and name in before):
            results |= {f"{name}_{moment}": entry[name] for moment, entry in moments.items()}
    if args.device.type == "cuda":
        results["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    else:
        results["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    folder = Path(args.output_dir)
    (folder / "train_results.json").write_text(json.dumps(results, indent=2))
    lines = [f"{text['prompt']}⟦{text['continuation']}⟧\n  ({text['original']})\n" for text in texts]
    (folder / "samples.txt").write_text("\n".join(lines), encoding="utf-8")
    plot_loss(history).savefig(folder / "loss.png", dpi=120)
    return results


def plot_loss(history: list[dict]):
    """Training loss by step, and each source's validation in bits per byte, as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = sorted({name for entry in history for name in entry if name.endswith("/bits_per_byte")})
    for axes, keys, unit in ((left, ["loss", "eval_loss"], "loss"), (right, names, "bits per byte")):
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            label = {"loss": "training", "eval_loss": "validation"}.get(key, key.removeprefix("eval_").split("/")[0])
            if points:
                axes.plot(*zip(*points, strict=True), "-" if key == "loss" else "o-", label=label, markersize=4)
        axes.set(xlabel="step", ylabel=unit)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    return figure
