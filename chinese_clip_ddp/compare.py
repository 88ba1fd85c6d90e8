"""Several runs in one picture, and in a table.

python compare.py output_all/tiled output_all/custom             writes compare.png beside the first folder
python compare.py output_all/*/ --picture my_picture.png
"""

import argparse
import json
import sys
from pathlib import Path

from report import points_of
from rows import UserError


def read_run(folder: str) -> tuple[list[dict], dict]:
    """The log and the results of a finished run; raises UserError where it isn't one."""
    state, results = Path(folder, "trainer_state.json"), Path(folder, "train_results.json")
    if not state.is_file() or not results.is_file():
        raise UserError(f"{folder}: holds no finished run (trainer_state.json, train_results.json). Train it first.")
    return json.loads(state.read_text())["log_history"], json.loads(results.read_text())


def plot_runs(runs: dict[str, list[dict]]):
    """Loss, mean recall and temperature of each run by step, as a matplotlib figure of three panels.

    Args:
        runs: name -> log_history.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = {
        "loss": "training loss (base and sigmoid: other losses)",
        "eval_mean_recall": "mean recall of the galleries",
        "logit_scale": "logit_scale",
    }
    for axes, (key, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for number, (name, history) in enumerate(runs.items()):
            # One that lies on another is seen by its gaps.
            axes.plot(*points_of(history, key), label=name, linestyle=(number, (len(runs), number)), alpha=0.8)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="output folders of finished runs")
    parser.add_argument("--picture", help="where the picture goes; by default compare.png beside the first folder")
    args = parser.parse_args(argv)
    try:
        names = [Path(folder).name for folder in args.folders]
        names = names if len(set(names)) == len(names) else args.folders
        runs = {name: read_run(folder) for name, folder in zip(names, args.folders, strict=True)}
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{'run':20} {'loss':>8} {'mean recall':>12} {'logit_scale':>12} {'pairs/s':>8}")
    for name, (_, results) in runs.items():
        recall = results.get("after", {}).get("eval_mean_recall", float("nan"))
        print(
            f"{name:20} {results['train_loss']:8.3f} {recall:12.4f} {results['logit_scale']:12.3f} "
            f"{results['pairs_per_second']:8.0f}"
        )
    picture = args.picture or str(Path(args.folders[0]).resolve().parent / "compare.png")
    plot_runs({name: history for name, (history, _) in runs.items()}).savefig(picture, dpi=120)
    print(picture)


if __name__ == "__main__":
    main()
