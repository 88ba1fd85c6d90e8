"""GRPO and its relatives on verl: sample a group of replies to each prompt, judge them, learn from the better ones.

python train.py --data_path cache_data/arithmetic/train.jsonl --eval_data_path cache_data/arithmetic/test.jsonl
"""

import dataclasses
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np

from arguments import ALGORITHMS, parse_arguments
from checkpoint import (
    FULL_DISK,
    NO_PERMISSION,
    errno_of,
    explain_write_errors,
    find_checkpoint,
    hash_model_files,
    lock_output_dir,
    seal_checkpoint,
    share_weights,
    step_of,
)
from cluster import local_cluster, ray  # it says to verl and Ray where they are
from data import VALIDATION, check_groups, hash_prompts, load_split, prompts_of_draw, save_prompts
from engines import compute_log_probs, start_workers, update_policy
from judge import load_reward_function
from model import load_tokenizer
from report import print_run_summary, print_step, report_evaluation, save_report
from rollout import (
    add_advantages,
    evaluate,
    find_equal_groups,
    join_rollouts,
    judge_replies,
    rollout_statistics,
    sample,
    select_groups,
)
from rows import UserError
from tiny import tiny_model_folder


def describe_run(model_args, data_args, args, prompts: list, validation: list) -> dict:
    """What must be the same for a checkpoint to be continued exactly."""
    settings = dataclasses.asdict(args) | dataclasses.asdict(model_args)
    for name in ("output_dir", "overwrite_output_dir", "logging_steps", "save_freq", "save_total_limit"):
        del settings[name]
    settings["model's files"] = hash_model_files(model_args.model_name_or_path)
    settings["reward_function"] = data_args.reward_function
    settings["its file"] = hashlib.sha256(Path(data_args.reward_function.rpartition(":")[0]).read_bytes()).hexdigest()
    settings["max_response_length"] = data_args.max_response_length
    settings["prompts"] = hash_prompts(prompts + validation)
    return json.loads(json.dumps(settings))


def collect_step(policy, prompts: list, draw: int, tokenizer, reward_function, data_args, args):
    """A step's replies, what they score, and the number of the next draw of prompts.

    dapo: groups whose scores are all equal teach nothing and are replaced from further draws, of which there are at
    most `max_num_gen_batches`; where these don't bring enough, equal groups fill the batch.
    """
    unequal, equal = [], []
    while True:
        batch = prompts_of_draw(prompts, draw, args.train_batch_size, args.seed)
        seed = 1000 * args.seed + draw + 1
        rollout = sample(policy, batch, tokenizer.pad_token_id, args.rollout_n, args.temperature, seed)
        judged = judge_replies(rollout, batch, tokenizer, reward_function, data_args.skip_bad_rewards)
        draw += 1
        if not ALGORITHMS[args.algorithm]["filter_groups"]:
            return rollout, judged, draw
        zero_variance = find_equal_groups(judged)
        unequal.append(select_groups(rollout, judged, np.flatnonzero(~zero_variance)))
        equal.append(select_groups(rollout, judged, np.flatnonzero(zero_variance)))
        found = sum(len(judged.prompts) for _, judged in unequal)
        if found >= args.train_batch_size or len(unequal) == args.max_num_gen_batches:
            rollout, judged = join_rollouts([pair for pair in unequal + equal if pair[1].prompts])
            return *select_groups(rollout, judged, np.arange(args.train_batch_size)), draw


def take_step(policy, reference, rollout, judged, args) -> dict[str, float]:
    """Learns from a step's replies and says how it went."""
    if args.recompute_log_probs:
        rollout.batch["old_log_probs"] = compute_log_probs(policy, rollout, args)
    if reference is not None:
        rollout.batch["ref_log_prob"] = compute_log_probs(reference, rollout, args)
    elif args.kl_loss_coef > 0:
        rollout.batch["ref_log_prob"] = compute_log_probs(policy, rollout, args, no_lora_adapter=True)
    add_advantages(rollout, judged, ALGORITHMS[args.algorithm]["adv_estimator"])
    metrics = rollout_statistics(rollout, judged)
    learned = update_policy(policy, rollout, args)
    for name, theirs in (("kl", "kl_loss"), ("clip_fraction", "actor/pg_clipfrac"), ("loss", "loss")):
        if theirs in learned:
            metrics[name] = float(np.mean(learned[theirs]))
    norms = np.array(learned["grad_norm"])
    metrics |= {"grad_norm": float(norms.mean()), "skipped_updates": int((~np.isfinite(norms)).sum())}
    metrics |= {"learning_rate": learned["lr"][-1], "memory_gb": max(learned["perf/max_memory_allocated_gb"])}
    return metrics


def run_steps(policy, reference, prompts, validation, tokenizer, reward_function, checkpoint, flags) -> list[dict]:
    """All steps from the checkpoint on, or from the first; returns the history of the whole run."""
    _, data_args, args = flags
    output = Path(args.output_dir)
    history, draw = [], 0

    def measure(step: int) -> None:
        scores, judged = evaluate(policy, validation, tokenizer, reward_function, data_args, args)
        history.append({"step": step, **scores})
        report_evaluation(step, scores, judged, output / "samples.jsonl")

    if checkpoint:
        policy.load_checkpoint(f"{checkpoint}/policy")
        state = json.loads(Path(checkpoint, "driver.json").read_text("utf-8"))
        history, draw = state["history"], state["draw"]
    else:
        (output / "samples.jsonl").unlink(missing_ok=True)
        measure(0)
    for step in range(step_of(checkpoint) + 1 if checkpoint else 1, args.total_training_steps + 1):
        started = time.perf_counter()
        rollout, judged, draw = collect_step(policy, prompts, draw, tokenizer, reward_function, data_args, args)
        metrics = take_step(policy, reference, rollout, judged, args)
        seconds = time.perf_counter() - started
        history.append({"step": step, **metrics, "seconds": seconds, "replies_per_second": len(rollout) / seconds})
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
        "equal_groups": sum(row["equal_groups"] for row in steps),
        "bad_rewards": sum(row["bad_rewards"] for row in steps),
        "skipped_updates": sum(row["skipped_updates"] for row in steps),
        "replies_per_second": float(np.median([row["replies_per_second"] for row in steps])),
        "memory_gb_per_process": max(row["memory_gb"] for row in steps),
        "seconds": time.perf_counter() - started,
    }


def main():
    flags = parse_arguments()
    try:
        train(*flags)
    except Exception as error:
        raised = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        # A worker that has lost another (gloo) is Ray's to report: there is no other process that would tell why.
        if errno_of(raised) not in FULL_DISK + NO_PERMISSION:
            raise
        with explain_write_errors(flags[2].output_dir):
            raise raised from error


def train(model_args, data_args, args) -> None:
    """The run, from the files to the report."""
    started = time.perf_counter()
    flags = model_args, data_args, args
    lock = lock_output_dir(args.output_dir)
    model_name = model_args.model_name_or_path
    if model_name == "tiny":
        model_args.model_name_or_path = tiny_model_folder(data_args.data_path, args.seed)
    tokenizer = load_tokenizer(model_args)
    reward_function = load_reward_function(data_args.reward_function)
    prompts, validation = load_split(data_args, tokenizer, args.seed, args.output_dir)
    check_groups(prompts, data_args, args)
    run = describe_run(model_args, data_args, args, prompts, validation)
    checkpoint, finished, messages = find_checkpoint(args.output_dir, run, args.overwrite_output_dir)
    if finished:
        return print(*messages)
    save_prompts(validation, Path(args.output_dir, VALIDATION))
    print_run_summary(model_name, prompts, validation, tokenizer, args, messages)
    with local_cluster(args.nproc, args.output_dir) as pool:
        policy, reference = start_workers(pool, model_args, args, tokenizer, data_args.max_response_length)
        history = run_steps(policy, reference, prompts, validation, tokenizer, reward_function, checkpoint, flags)
        policy.save_model(args.output_dir)
        share_weights(Path(args.output_dir))
    results = summarise(history, model_args, data_args, started)
    save_report(args.output_dir, history, results)
    print(json.dumps(results, indent=2))
    lock.close()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except ray.exceptions.RayError as error:
        sys.exit(f"error: a worker failed, so the run ended: {error}")
