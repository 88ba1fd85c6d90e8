"""What a run says: its summary, a line a step, completions at intervals, train_results.json and reward.png."""

import json
import os
from pathlib import Path

import numpy as np

from cluster import ON_GPU
from reward_manager import Scored

SHOWN = ("reward", "acc", "format", "completion_length", "kl", "entropy", "grad_norm")
SHOWN += ("zero_variance_groups", "completions_per_second")


def print_run_summary(model_name: str, prompts: list, validation: list, tokenizer, args, messages) -> None:
    """What is about to happen, and the first prompt as the model will see it."""
    first = prompts[0]
    devices = f"{args.nproc} {'GPUs' if ON_GPU else 'CPU processes'}, {'bf16' if args.bf16 else 'fp32'}, FSDP2"
    kl = f"KL to the reference weighs {args.kl_loss_coef}" if args.kl_loss_coef else "no reference model"
    if args.use_kl_in_reward:
        kl = f"KL to the reference costs {args.kl_coef} in the reward"
    updates = args.train_batch_size // args.ppo_mini_batch_size * args.ppo_epochs
    print(
        *messages,
        f"model           {model_name}",
        f"algorithm       {args.algorithm}; clip {args.clip_ratio_low} / {args.clip_ratio_high}; {kl}",
        f"prompts         {len(prompts):,} to learn from, {len(validation):,} for validation",
        f"a step          {args.train_batch_size} prompts x {args.rollout_n} completions, {updates} updates",
        f"steps           {args.total_training_steps}, learning rate {args.learning_rate}",
        f"devices         {devices}",
        f"first prompt    {tokenizer.decode(first.input_ids)!r}",
        f"its truth       {first.ground_truth!r} ({first.source})",
        sep="\n",
        flush=True,
    )


def print_step(metrics: dict, total_steps: int) -> None:
    left = (total_steps - metrics["step"]) * metrics["seconds"] / 60
    figures = " ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics)
    print(f"step {metrics['step']:4d}  {figures}  {left:.1f} min left", flush=True)


def report_evaluation(step: int, scores: dict, scored: Scored, samples_file: Path, shown: int = 3) -> None:
    """Prints validation figures and a few completions, so that a gamed reward is seen; the file gets more of them."""
    print(f"validation after step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
    n = len(scored.completions) // len(scored.prompts)
    with samples_file.open("a", encoding="utf-8") as file:
        for number, prompt in enumerate(scored.prompts[:32]):
            question, completion = prompt.messages[-1]["content"], scored.completions[number * n]
            score = scored.scores[number * n]
            row = {"step": step, "prompt": question, "completion": completion}
            row["score"] = None if np.isnan(score) else score  # JSON has no NaN
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if number < shown:
                print(f"    {question} -> {completion} [{score:.2f}]", flush=True)


def start_tracking(args):
    """verl's tracker of that name (--report_to), or None; TensorBoard's files are written into the run's folder."""
    if args.report_to == "none":
        return None
    from verl.utils.tracking import Tracking

    os.environ.setdefault("TENSORBOARD_DIR", str(Path(args.output_dir, "tensorboard")))
    return Tracking("verl_base", Path(args.output_dir).name, args.report_to)


def plot_reward(history: list[dict]):
    """Four pictures of a run: reward and validation accuracy, KL and entropy, lengths, zero-variance groups."""
    from matplotlib.figure import Figure

    steps = [row for row in history if "reward" in row]
    evaluations = [row for row in history if "pass@1" in row]
    passes = [name for name in evaluations[0] if name.startswith("pass@")]
    figure = Figure(figsize=(11, 7), layout="constrained")
    reward, distance, length, groups = figure.subplots(2, 2).flat

    def draw(axes, rows, name, **style):
        axes.plot([row["step"] for row in rows if name in row], [row[name] for row in rows if name in row], **style)

    draw(reward, steps, "reward", color="0.7", label="reward, training")
    for name in passes:
        draw(reward, evaluations, name, marker="o", label=f"{name}, validation")
    draw(distance, steps, "kl", label="KL to the reference")
    draw(distance, steps, "entropy", label="entropy, nats a token")
    draw(length, steps, "completion_length", label="tokens a completion")
    draw(groups, steps, "zero_variance_groups", label="zero-variance groups")
    for axes in (reward, distance, length, groups):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def save_report(output_dir: str, history: list[dict], results: dict) -> None:
    """history.jsonl, reward.png and train_results.json; the latter last, since it says that the run came to its end."""
    rows = "".join(json.dumps(row, allow_nan=False) + "\n" for row in history)
    Path(output_dir, "history.jsonl").write_text(rows, "utf-8")
    plot_reward(history).savefig(Path(output_dir, "reward.png"), dpi=120)
    Path(output_dir, "train_results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False), "utf-8")
