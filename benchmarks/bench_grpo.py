"""GRPO, side by side: verl_base's train.py and TRL's GRPOTrainer, in verl_base's own environment.

    make verl && . .venv-verl/bin/activate && pip install -r requirements-bench.txt
    python benchmarks/bench_grpo.py                            about 10 minutes

Speed: both start from the recipe's tuned tiny policy and learn from the same prompts, 32 x 8 replies of up to 32 tokens a
step in two optimizer steps, KL to a frozen reference, one thread, fp32, in a process (ours: a driver, a worker and Ray's
own processes) of their own, taking turns. Counted are replies for each CPU second of all processes of a way together,
from the fourth step on. The learning rate is so small that the replies keep their length.

Losses: a rollout of ours is given to TRL's `_compute_loss`; then both learn from it with AdamW, mini-batch by mini-batch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = Path(__file__).parent.parent / "verl_base"
PROMPTS, GROUP, LENGTH, WARM_UP = 32, 8, 32, 3
WAYS = ["verl_base", "verl_base, 2 workers", "TRL"]


def cpu_seconds() -> float:
    """User and system time of this process and everything that it started."""
    import psutil

    here = psutil.Process()
    total = 0.0
    for process in [here, *here.children(recursive=True)]:
        try:
            times = process.cpu_times()
            total += times.user + times.system
        except psutil.NoSuchProcess:  # a short helper of Ray's
            continue
    return total


def our_flags(output: str, processes: int, **changes):
    """The recipe's arguments for this benchmark."""
    from arguments import read_flags

    flags = {
        **{"data_path": "cache_data/arithmetic/train.jsonl", "eval_data_path": "cache_data/arithmetic/test.jsonl"},
        **{"train_batch_size": PROMPTS, "rollout_n": GROUP, "ppo_mini_batch_size": PROMPTS // 2, "nproc": processes},
        **{"max_response_length": LENGTH, "learning_rate": 1e-7, "kl_loss_coef": 0.001, "output_dir": output},
    } | changes
    sys.argv = ["train.py", *[word for name, value in flags.items() for word in (f"--{name}", str(value))]]
    model_args, data_args, args = read_flags()
    from tiny import tiny_policy_folder

    model_args.model_name_or_path = tiny_policy_folder(data_args.data_path, args.seed)
    return model_args, data_args, args


def measure_ours(steps: int, processes: int, output: str) -> dict:
    """Steps of train.py as its driver makes them."""
    from cluster import local_cluster
    from data import load_split
    from engines import start_workers
    from model import load_policy_tokenizer
    from rewards import compute_score
    from train import collect_step, take_step

    model_args, data_args, args = our_flags(output, processes)
    tokenizer = load_policy_tokenizer(model_args)
    prompts, _ = load_split(data_args, tokenizer, args.seed, output)
    lengths = []
    with local_cluster(processes, output) as pool:
        policy, reference = start_workers(pool, model_args, args, LENGTH)
        for step in range(WARM_UP + steps):
            if step == WARM_UP:
                started, cpu = time.perf_counter(), cpu_seconds()
            rollout, judged, _ = collect_step(policy, prompts, step, tokenizer, compute_score, data_args, args)
            lengths.append(take_step(policy, reference, rollout, judged, model_args, args, step + 1)["reply_length"])
        cpu, seconds = cpu_seconds() - cpu, time.perf_counter() - started
    return {"replies": steps * PROMPTS * GROUP, "cpu": cpu, "seconds": seconds, "length": statistics.mean(lengths)}


def build_trl(model_args, data_args, args, prompts: list, output: str, steps: int, learning_rate: float = 1e-7):
    """TRL's trainer with the same settings; the same prompts in the same order of steps."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from model import load_policy_tokenizer
    from rewards import compute_score

    def reward(completions, ground_truth, **_):
        return [
            compute_score("arithmetic", turns[0]["content"], answer)["score"]
            for turns, answer in zip(completions, ground_truth, strict=True)
        ]

    config = GRPOConfig(
        output_dir=output,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=PROMPTS * GROUP // 2,
        steps_per_generation=2,
        num_generations=GROUP,
        max_completion_length=LENGTH,
        temperature=1.0,
        top_k=0,
        beta=0.001,
        epsilon=0.2,
        loss_type="bnpo",  # the mean over the tokens of a mini-batch, as verl's token-mean
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_steps=2 * steps,
        gradient_checkpointing=False,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=args.seed,
    )
    rows = [{"prompt": prompt.messages, "ground_truth": prompt.ground_truth} for prompt in prompts]
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_policy_tokenizer(model_args),
    )


def measure_trl(steps: int, output: str) -> dict:
    """`trainer.train()`, from its fourth generation on."""
    from transformers import TrainerCallback

    from data import load_split
    from model import load_policy_tokenizer

    model_args, data_args, args = our_flags(output, 1)
    prompts, _ = load_split(data_args, load_policy_tokenizer(model_args), args.seed, output)
    trainer = build_trl(model_args, data_args, args, prompts, output, WARM_UP + steps)
    marks = {}

    class Clock(TrainerCallback):
        def on_step_end(self, arguments, state, control, **kwargs):
            marks[state.global_step] = time.perf_counter(), cpu_seconds()

    trainer.add_callback(Clock())
    trainer.train()
    (started, cpu), (ended, cpu_end) = marks[2 * WARM_UP], marks[2 * (WARM_UP + steps)]
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    replies = steps * PROMPTS * GROUP
    return {
        "replies": replies,
        "cpu": cpu_end - cpu,
        "seconds": ended - started,
        "length": statistics.mean(lengths),
    }


def compare_losses(output: str, learning_rate: float = 1e-4) -> list[tuple[float, float]]:
    """Losses of ours and of TRL's, mini-batch by mini-batch of one rollout, both learning from each."""
    import torch

    from cluster import local_cluster
    from data import load_split
    from engines import compute_log_probs, start_workers, update_policy
    from model import load_policy_tokenizer
    from rewards import compute_score
    from rollout import add_advantages
    from train import collect_step

    model_args, data_args, args = our_flags(output, 1, learning_rate=learning_rate, ppo_mini_batch_size=8)
    tokenizer = load_policy_tokenizer(model_args)
    prompts, _ = load_split(data_args, tokenizer, args.seed, output)
    with local_cluster(1, output) as pool:
        policy, reference = start_workers(pool, model_args, args, LENGTH)
        rollout, judged, _ = collect_step(policy, prompts, 0, tokenizer, compute_score, data_args, args)
        rollout.batch["ref_log_prob"] = compute_log_probs(reference, rollout, args) - 0.01  # as if it had moved on
        add_advantages(rollout, judged, "grpo")
        ours = update_policy(policy, rollout, args, step=1)["loss"]
    trainer = build_trl(model_args, data_args, args, prompts, output, 1)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=learning_rate, weight_decay=0.0)
    theirs, width = [], rollout.batch["prompts"].shape[1]
    for part in rollout.batch.split(8 * GROUP):
        inputs = {
            "prompt_ids": part["prompts"],
            "prompt_mask": part["attention_mask"][:, :width],
            "completion_ids": part["responses"],
            "completion_mask": part["response_mask"],
            "advantages": part["advantages"][:, 0],
            "old_per_token_logps": part["old_log_probs"],
            "ref_per_token_logps": part["ref_log_prob"],
        }
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
    return list(zip(ours, theirs, strict=True))


def run_apart(way: str, steps: int) -> dict:
    """A way in a process of its own; raises CalledProcessError with what it said."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, __file__, "--way", way, "--steps", str(steps), "--output", output]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=RECIPE, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way")
    parser.add_argument("--steps", type=int, default=20, help="steps that are counted")
    parser.add_argument("--way", choices=[*WAYS, "losses"], help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        sys.path.insert(0, str(RECIPE))
        os.chdir(RECIPE)
        if args.way == "losses":
            print(json.dumps(compare_losses(args.output)))
        elif args.way == "TRL":
            print(json.dumps(measure_trl(args.steps, args.output)))
        else:
            print(json.dumps(measure_ours(args.steps, 1 + ("2 workers" in args.way), args.output)))
        return
    subprocess.run([sys.executable, "prepare.py", "arithmetic"], cwd=RECIPE, check=True, stdout=subprocess.DEVNULL)
    for number, (ours, theirs) in enumerate(run_apart("losses", 1), start=1):
        print(f"update {number}: loss {ours:.7f}, TRL's {theirs:.7f}, difference {abs(ours - theirs):.1e}", flush=True)
    found = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            found[way].append(run_apart(way, args.steps))
            print(way, found[way][-1], flush=True)
    speeds = {way: statistics.median(run["replies"] / run["cpu"] for run in runs) for way, runs in found.items()}
    print("\n| way | replies / CPU second | x TRL's | replies / second | tokens a reply |\n|---|---|---|---|---|")
    for way, runs in found.items():
        wall = statistics.median(run["replies"] / run["seconds"] for run in runs)
        length = statistics.mean(run["length"] for run in runs)
        print(f"| {way} | {speeds[way]:.0f} | {speeds[way] / speeds['TRL']:.2f} | {wall:.0f} | {length:.1f} |")


if __name__ == "__main__":
    main()
