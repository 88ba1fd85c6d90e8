"""What the training has done to the validation pairs: measures before and after, and over the steps as a picture."""

import json
import math
from pathlib import Path


def save_preferences(trainer) -> None:
    """Adds each measure of the validation before and after to train_results.json, and draws rewards.png.

    An SFT has no preferences to speak of.
    """
    if trainer.args.loss_type == "sft":
        return
    history, folder = trainer.state.log_history, Path(trainer.args.output_dir)
    validation = [entry for entry in history if "eval_rewards/accuracies" in entry]
    if validation:
        report = folder / "train_results.json"
        results = json.loads(report.read_text())
        before, after = validation[0], validation[-1]
        moments = {"before": before, "after": after} if before["step"] == 0 else {"after": after}
        for moment, entry in moments.items():
            measures = [key for key in entry if "/" in key or key == "eval_preference_loss"]
            results[moment] = {key.removeprefix("eval_"): entry[key] for key in measures}
        report.write_text(json.dumps(results, indent=2))
        for key, value in results["after"].items():
            print(f"{key:<28} {results.get('before', {}).get(key, math.nan):9.3f} -> {value:9.3f}")
    plot_rewards(history).savefig(folder / "rewards.png", dpi=120)


def plot_rewards(history: list[dict]):
    """Reward accuracy, rewards and log-probabilities by step, as a matplotlib figure of three panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.5), layout="constrained")
    panels = {
        "reward accuracy": ["rewards/accuracies"],
        "reward (nats x beta)": ["rewards/chosen", "rewards/rejected"],
        "log-probability (nats a reply)": ["logps/chosen", "logps/rejected"],
    }
    for axes, (title, keys) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for key in keys:
            for prefix, style in (("", "-"), ("eval_", "o-")):
                points = [(entry["step"], entry[prefix + key]) for entry in history if prefix + key in entry]
                if points:
                    axes.plot(*zip(*points, strict=True), style, label=prefix + key, markersize=4)
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure
