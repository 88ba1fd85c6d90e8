"""GRPO and its relatives on verl: sample a group of completions to each prompt, score them, learn from the better ones.

python train.py --data_path cache_data/arithmetic/train.jsonl --eval_data_path cache_data/arithmetic/test.jsonl
"""

import dataclasses
import hashlib
import json
import sys
import time
from pathlib import Path

from cluster import local_cluster, ray  # before verl: it says to verl and Ray where they are

# isort: split
import numpy as np
from verl import DataProto

from advantages import (
    add_advantages,
    find_zero_variance_groups,
    join_rollouts,
    punish_length,
    select_groups,
    token_kl,
    weigh_rollout,
)
from arguments import ALGORITHMS, parse_arguments
from checkpoint import (
    FULL_DISK,
    NO_PERMISSION,
    errno_of,
    explain_write_errors,
    find_checkpoint,
    hash_model_files,
    is_complete,
    list_checkpoints,
    lock_output_dir,
    seal_checkpoint,
    share_weights,
    step_of,
)
from data import VALIDATION, Prompt, check_groups, hash_prompts, load_split, prompts_of_draw, save_prompts
from report import (
    print_run_summary,
    print_step,
    report_evaluation,
    save_report,
    start_tracking,
)
from reward_manager import Scored, load_reward_function, score_completions
from rows import UserError
from tiny import tiny_model_folder
from tokenizer import load_tokenizer
from worker_groups import compute_log_probs, needs_reference, sample, start_workers, update_policy


def describe_run(model_args, data_args, args, prompts: list, validation: list) -> dict:
    """What decides the numbers, and so must be the same for a checkpoint to be continued.

    Free are memory, looks and saves, the names of files whose contents are hashed here, and under a constant rate the
    number of steps, on which nothing depends then.
    """
    settings = dataclasses.asdict(args) | dataclasses.asdict(model_args)
    for name in ("output_dir", "overwrite_output_dir", "logging_steps", "save_freq", "save_total_limit", "test_freq"):
        del settings[name]
    for name in ("ppo_max_token_len_per_gpu", "gradient_checkpointing", "report_to", "trust_remote_code"):
        del settings[name]
    for name in ("val_n", "val_temperature"):
        del settings[name]
    if args.lr_scheduler_type == "constant":
        del settings["total_training_steps"]
    settings["model's files"] = hash_model_files(model_args.model_name_or_path)
    if settings["model's files"]:  # not a hub id
        del settings["model_name_or_path"]
    path, _, settings["reward_function"] = data_args.reward_function.rpartition(":")
    settings["its file"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    settings["max_response_length"] = data_args.max_response_length
    settings["prompts"] = hash_prompts(prompts + validation)
    return json.loads(json.dumps(settings))


def collect_step(policy, prompts: list, draw: int, tokenizer, reward_function, data_args, args):
    """A step's completions, what they score, and the number of the next draw of prompts.

    dapo: groups that are all right or all wrong are replaced from further draws, of which there are at most
    `max_num_gen_batches`; where these don't bring enough, such groups fill the batch. As in verl, what counts is `acc`
    (without it, the score), and not what a completion earns for its form or pays for its length.
    """
    kept, spare = [], []
    while True:
        batch = prompts_of_draw(prompts, draw, args.train_batch_size, args.seed)
        seed = 1000 * args.seed + draw + 1
        rollout = sample(policy, batch, tokenizer.pad_token_id, args.rollout_n, args.temperature, seed)
        scored = score_completions(rollout, batch, tokenizer, reward_function, data_args)
        zero_variance = find_zero_variance_groups(scored, scored.right)
        if args.overlong_buffer_len:
            punish_length(scored, data_args.max_response_length, args)
        draw += 1
        if not ALGORITHMS[args.algorithm]["filter_groups"]:
            return rollout, scored, draw
        kept.append(select_groups(rollout, scored, np.flatnonzero(~zero_variance)))
        spare.append(select_groups(rollout, scored, np.flatnonzero(zero_variance)))
        found = sum(len(scored.prompts) for _, scored in kept)
        if found >= args.train_batch_size or len(kept) == args.max_num_gen_batches:
            rollout, scored = join_rollouts([pair for pair in kept + spare if pair[1].prompts])
            return *select_groups(rollout, scored, np.arange(args.train_batch_size)), draw


def rollout_statistics(rollout: DataProto, scored: Scored) -> dict[str, float]:
    """Means over the completions that have a score; entropy is estimated by the sampled tokens' own log-probabilities.

    What there is no figure of, since no completion has one, is left out.
    """
    mask = rollout.batch["response_mask"].bool()
    log_probs = rollout.batch["old_log_probs"][mask]
    scores = scored.scores[~np.isnan(scored.scores)]
    values = {name: values[np.isfinite(values)] for name, values in scored.parts.items()}
    return {
        **({"reward": float(scores.mean()), "reward_std": float(scores.std())} if len(scores) else {}),
        **{name: float(known.mean()) for name, known in values.items() if len(known)},
        "completion_length": float(scored.lengths.mean()),
        "longest_completion": int(scored.lengths.max()),
        "finished": float(scored.finished.mean()),
        **({"entropy": -log_probs.mean().item()} if len(log_probs) else {}),
        "zero_variance_groups": int(find_zero_variance_groups(scored, scored.scores).sum()),
        "bad_rewards": len(scored.scores) - len(scores),
    }


def take_step(policy, reference, rollout, scored, args) -> dict[str, float]:
    """Learns from a step's completions and says how it went."""
    if args.recompute_log_probs:
        rollout.batch["rollout_log_probs"] = rollout.batch["old_log_probs"]
        rollout.batch["old_log_probs"] = compute_log_probs(policy, rollout, args)
    if reference is not None:
        rollout.batch["ref_log_prob"] = compute_log_probs(reference, rollout, args)
    elif needs_reference(args):
        rollout.batch["ref_log_prob"] = compute_log_probs(policy, rollout, args, no_lora_adapter=True)
    add_advantages(rollout, scored, ALGORITHMS[args.algorithm]["adv_estimator"], args)
    metrics = rollout_statistics(rollout, scored)
    mask = rollout.batch["response_mask"]
    if args.rollout_is and mask.any():
        metrics["rollout_is_mean"] = weigh_rollout(rollout, args)
    if args.use_kl_in_reward and mask.any():
        metrics["kl"] = float(token_kl(rollout, args.kl_penalty)[mask.bool()].mean())
    learned = update_policy(policy, rollout, args)
    for name, theirs in (("kl", "kl_loss"), ("clip_fraction", "actor/pg_clipfrac"), ("loss", "loss")):
        if theirs in learned:
            metrics[name] = float(np.mean(learned[theirs]))
    norms = np.array(learned.get("grad_norm", []))
    skipped = len(learned.get("skipped", [])) + int((~np.isfinite(norms)).sum())
    metrics |= {"skipped_updates": skipped, "learning_rate": learned["lr"][-1]}
    if np.isfinite(norms).any():
        metrics["grad_norm"] = float(norms[np.isfinite(norms)].mean())
    metrics["memory_gb"] = max(learned.get("perf/max_memory_allocated_gb", [0.0]))
    return {name: value for name, value in metrics.items() if np.isfinite(value)}  # what JSON has


def evaluate(policy, prompts: list[Prompt], tokenizer, reward_function, data_args, args):
    """Validation prompts, `val_n` completions each: pass@1 is the mean of `acc`, pass@n whether one of the n is right.

    A completion without a score is not right; `bad_rewards` counts them, where there are some.

    Returns:
        These figures by name, and what they were made of (Scored).
    """
    rollout = sample(policy, prompts, tokenizer.pad_token_id, args.val_n, args.val_temperature, args.seed)
    scored = score_completions(rollout, prompts, tokenizer, reward_function, data_args, may_all_fail=True)
    right = scored.groups(np.nan_to_num(scored.right))
    statistics = rollout_statistics(rollout, scored)
    scores = {"pass@1": float(right.mean()), f"pass@{args.val_n}": float(right.max(1).mean())}
    shown = ("format", "completion_length", "finished") + ("bad_rewards",) * bool(statistics["bad_rewards"])
    return scores | {name: statistics[name] for name in shown if name in statistics}, scored


def run_steps(policy, reference, prompts, validation, tokenizer, reward_function, checkpoint, flags) -> list[dict]:
    """All steps from the checkpoint on, or from the first; returns the history of the whole run."""
    _, data_args, args = flags
    output = Path(args.output_dir)
    history, draw = [], 0

    tracker = start_tracking(args)

    def record(row: dict) -> None:
        history.append(row)
        if tracker:
            tracker.log({name: value for name, value in row.items() if name != "step"}, row["step"])

    def measure(step: int) -> None:
        scores, scored = evaluate(policy, validation, tokenizer, reward_function, data_args, args)
        record({"step": step, **scores})
        report_evaluation(step, scores, scored, output / "samples.jsonl")

    if checkpoint:
        policy.load_checkpoint(f"{checkpoint}/policy")
        state = json.loads(Path(checkpoint, "driver.json").read_text("utf-8"))
        history, draw = state["history"], state["draw"]
    else:
        (output / "samples.jsonl").unlink(missing_ok=True)
        measure(0)
    for step in range(step_of(checkpoint) + 1 if checkpoint else 1, args.total_training_steps + 1):
        started = time.perf_counter()
        rollout, scored, draw = collect_step(policy, prompts, draw, tokenizer, reward_function, data_args, args)
        metrics = take_step(policy, reference, rollout, scored, args)
        seconds = time.perf_counter() - started
        record({"step": step, **metrics, "seconds": seconds, "completions_per_second": len(rollout) / seconds})
        last = step == args.total_training_steps
        if step % args.logging_steps == 0 or last:
            print_step(history[-1], args.total_training_steps)
        if step % args.test_freq == 0 or last:
            measure(step)
        if step % args.save_freq == 0 or last:
            folder = output / f"checkpoint-{step}"
            policy.save_checkpoint(str(folder / "policy"), global_step=step)
            (folder / "driver.json").write_text(json.dumps({"draw": draw, "history": history}), "utf-8")
            seal_checkpoint(folder, args.save_total_limit)
    if tracker:
        tracker.finish()
    return history


def summarise(history: list[dict], model_args, data_args, started: float) -> dict:
    """train_results.json: validation before and after, and what it took."""
    evaluations = [row for row in history if "pass@1" in row]
    steps = [row for row in history if "reward" in row]
    return {
        "model": model_args.model_name_or_path,
        "reward_function": str(Path(data_args.reward_function).resolve()),  # with the function's name at its end
        "max_response_length": data_args.max_response_length,
        "trust_remote_code": model_args.trust_remote_code,
        "before": evaluations[0],
        "after": evaluations[-1],
        "kl": steps[-1].get("kl"),
        "zero_variance_groups": sum(row["zero_variance_groups"] for row in steps),
        "bad_rewards": sum(row["bad_rewards"] for row in steps),
        "skipped_updates": sum(row["skipped_updates"] for row in steps),
        "completions_per_second": float(np.median([row["completions_per_second"] for row in steps])),
        "memory_gb_per_process": max(row["memory_gb"] for row in steps),
        "seconds": time.perf_counter() - started,
    }


def main():
    flags = parse_arguments()
    try:
        train(*flags)
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted; {str(interrupt) or 'nothing was trained yet'}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        raised = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        # A worker that has lost another (gloo) is Ray's to report: there is no other process that would tell why.
        if errno_of(raised) not in FULL_DISK + NO_PERMISSION:
            raise
        with explain_write_errors(flags[2].output_dir):
            raise raised from error


def find_own_checkpoint(args, run: dict) -> tuple[str | None, bool, list[str]]:
    """`find_checkpoint`, where a run that came to its end goes on if more steps are asked for.

    Raises:
        UserError: the folder is another run's, or that run has no checkpoint left to go on from.
    """
    checkpoint, finished, messages = find_checkpoint(args.output_dir, run, args.overwrite_output_dir)
    if not finished:
        return checkpoint, finished, messages
    report = Path(args.output_dir, "train_results.json")
    steps = json.loads(report.read_text("utf-8"))["after"]["step"]
    if steps >= args.total_training_steps:
        return checkpoint, finished, messages
    if not has_checkpoint(args.output_dir):
        raise UserError(
            f"{args.output_dir} holds a model finished after {steps} steps, but no complete checkpoint from which to "
            f"go on to {args.total_training_steps}. Give that model (an adapter merged first) to a run in another "
            "--output_dir / OUTPUT as its --model_name_or_path, or start afresh by --overwrite_output_dir true."
        )
    report.unlink()  # it says that nothing is left
    return find_checkpoint(args.output_dir, run, overwrite=False)


def has_checkpoint(output_dir: str) -> bool:
    return any(is_complete(checkpoint) for checkpoint in list_checkpoints(Path(output_dir)))


def say_how_to_go_on(args) -> str:
    """What an interrupted run needs, once the checkpoints in its folder are its own."""
    if not has_checkpoint(args.output_dir):
        return "no checkpoint was written yet"
    without = " without --overwrite_output_dir" if args.overwrite_output_dir else ""
    return f"the same command{without} goes on from the last checkpoint"


def train(model_args, data_args, args) -> None:
    """The run, from the files to the report.

    Raises:
        KeyboardInterrupt: with what there is to say of going on, or empty before anything was trained.
    """
    started = time.perf_counter()
    flags = model_args, data_args, args
    lock = lock_output_dir(args.output_dir)
    model_name = model_args.model_name_or_path
    if model_name == "tiny":
        model_args.model_name_or_path = tiny_model_folder(data_args.data_path, args.seed)
    tokenizer = load_tokenizer(model_args)
    workers, timeout = data_args.reward_num_workers, data_args.reward_timeout
    reward_function = load_reward_function(data_args.reward_function, workers, timeout)
    prompts, validation = load_split(data_args, tokenizer, args.seed, args.output_dir)
    check_groups(prompts, data_args, args)
    run = describe_run(model_args, data_args, args, prompts, validation)
    checkpoint, finished, messages = find_own_checkpoint(args, run)
    if finished:
        return print(*messages)
    try:
        save_prompts(validation, Path(args.output_dir, VALIDATION))
        print_run_summary(model_name, prompts, validation, tokenizer, args, messages)
        with local_cluster(args.nproc, args.output_dir) as pool:
            policy, reference = start_workers(pool, model_args, args, tokenizer, data_args.max_response_length)
            history = run_steps(policy, reference, prompts, validation, tokenizer, reward_function, checkpoint, flags)
            policy.save_model(args.output_dir)
            share_weights(Path(args.output_dir))
        results = summarise(history, model_args, data_args, started)
        save_report(args.output_dir, history, results)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(say_how_to_go_on(args)) from None
    print(json.dumps(results, indent=2))
    reward_function.close()
    lock.close()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except ray.exceptions.RayError as error:
        sys.exit(f"error: a worker failed, so the run ended: {error}")
