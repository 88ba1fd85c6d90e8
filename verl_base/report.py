"""What a run says: its summary, a line a step, replies at intervals, train_results.json and reward.png."""

import json
from pathlib import Path

from cluster import ON_GPU
from rollout import Judged

SHOWN = ("reward", "acc", "format", "reply_length", "kl", "entropy", "grad_norm", "equal_groups", "replies_per_second")


def print_run_summary(model_name: str, prompts: list, validation: list, tokenizer, args, messages) -> None:
    """What is about to happen, and the first prompt as the model will see it."""
    first = prompts[0]
    devices = f"{args.nproc} {'GPUs' if ON_GPU else 'CPU processes'}, {'bf16' if args.bf16 else 'fp32'}, FSDP2"
    kl = f"KL to the reference weighs {args.kl_loss_coef}" if args.kl_loss_coef else "no reference model"
    updates = args.train_batch_size // args.ppo_mini_batch_size * args.ppo_epochs
    print(
        *messages,
        f"model           {model_name}",
        f"algorithm       {args.algorithm}; clip {args.clip_ratio_low} / {args.clip_ratio_high}; {kl}",
        f"prompts         {len(prompts):,} to learn from, {len(validation):,} for validation",
        f"a step          {args.train_batch_size} prompts x {args.rollout_n} replies, {updates} updates",
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


def report_evaluation(step: int, scores: dict, judged: Judged, samples_file: Path, shown: int = 3) -> None:
    """Prints validation figures and a few replies, so that a gamed reward is seen; the file gets more of them."""
    print(f"validation after step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
    n = len(judged.replies) // len(judged.prompts)
    with samples_file.open("a", encoding="utf-8") as file:
        for number, prompt in enumerate(judged.prompts[:32]):
            question, reply = prompt.messages[-1]["content"], judged.replies[number * n]
            score = judged.scores[number * n]
            row = {"step": step, "prompt": question, "reply": reply, "score": score}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if number < shown:
                print(f"    {question} -> {reply} [{score:.2f}]", flush=True)


def plot_reward(history: list[dict]):
    """Four pictures of a run: reward and validation accuracy, KL and entropy, lengths, groups of equal rewards."""
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
    draw(length, steps, "reply_length", label="tokens a reply")
    draw(groups, steps, "equal_groups", label="groups whose rewards are all equal")
    for axes in (reward, distance, length, groups):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def save_report(output_dir: str, history: list[dict], results: dict) -> None:
    """history.jsonl, reward.png and train_results.json; the latter last, since it says that the run came to its end."""
    rows = "".join(json.dumps(row) + "\n" for row in history)
    Path(output_dir, "history.jsonl").write_text(rows, "utf-8")
    plot_reward(history).savefig(Path(output_dir, "reward.png"), dpi=120)
    Path(output_dir, "train_results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False), "utf-8")
