"""The validation loss of each language, before and after the training."""

import json
from pathlib import Path

from transformers import TrainerCallback

from languages import LANGUAGES, language_of


class LanguageLoss(TrainerCallback):
    """The validation loss of each language, before the first step and after the last.

    Writes languages.json, `{tag: {"rows", "before", "after"}}`, and languages.png, the same as bars, into output_dir.
    """

    def __init__(self, trainer):
        self.trainer, self.rows = trainer, {}
        tags = [language_of(source) for source in trainer.eval_dataset["source"]]
        for tag in [*LANGUAGES, "other"]:
            if tag in tags:
                indices = [i for i, found in enumerate(tags) if found == tag]
                self.rows[tag] = trainer.eval_dataset.select(indices)

    def measure(self) -> None:
        for tag, rows in self.rows.items():
            self.trainer.evaluate(rows, metric_key_prefix=f"eval_{tag}")

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:  # else the history of the checkpoint has it
            self.measure()

    def on_train_end(self, args, state, control, **kwargs):
        self.measure()
        if not state.is_world_process_zero:
            return
        losses = {}
        for tag, rows in self.rows.items():
            history = [entry[f"eval_{tag}_loss"] for entry in state.log_history if f"eval_{tag}_loss" in entry]
            losses[tag] = {"rows": len(rows), "before": history[0], "after": history[-1]}
            print(f"{LANGUAGES.get(tag, tag):<10} validation loss {history[0]:.3f} -> {history[-1]:.3f}")
        Path(args.output_dir, "languages.json").write_text(json.dumps(losses, indent=2))
        plot_languages(losses).savefig(Path(args.output_dir, "languages.png"), dpi=120)


def plot_languages(losses: dict[str, dict]):
    """Two bars a language, as a matplotlib figure; its labels are the tags, which any font has."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for shift, moment in ((-0.2, "before"), (0.2, "after")):
        heights = [loss[moment] for loss in losses.values()]
        axes.bar([position + shift for position in range(len(losses))], heights, 0.4, label=moment)
    axes.set_xticks(range(len(losses)), [f"{tag} ({loss['rows']})" for tag, loss in losses.items()])
    axes.set(ylabel="validation loss (nats per supervised token)")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)  # above, where no bar is
    return figure
