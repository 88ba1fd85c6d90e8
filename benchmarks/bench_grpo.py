"""GRPO, side by side: verl_base's train.py and TRL's GRPOTrainer, in verl_base's own environment.

    make verl && . .venv-verl/bin/activate
    pip install --no-deps --target .venv-verl/bench -r requirements-bench.txt
    python benchmarks/bench_grpo.py --trl .venv-verl/bench     about an hour

(verl doesn't start where it can import TRL, so TRL is installed aside and put on the path for its own runs only.)

Speed: both start from the same weights and learn from the same prompts, 32 x 8 completions of up to 32 tokens a step in
two optimizer steps, KL to a frozen reference, fp32, one thread a process, taking turns. Counted are completions for
each CPU second of all processes of a way together (ours: the driver, its workers, Ray), from the fourth step on. The
learning rate is so small that the completions keep their length. Two models: the recipe's tuned tiny policy, and a
larger one with random weights, whose completions are all cut off at 32 tokens.

Losses and gradients: a rollout of ours is given to TRL's `_compute_loss`; both learn from it mini-batch by mini-batch,
by plain gradient descent with steps so large that ratios leave 1 and some are clipped, the KL weighing 0.1. What moved
the weights is then the sum of the gradients, so both movements are compared, and the gradients' norms. TRL multiplies
the KL by the ratio unless `use_bias_correction_kl=False`, which is given throughout, since verl's loss doesn't.
"""

import argparse
import functools
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
KL_COEF, RATE = 0.1, 0.03  # where losses and gradients are compared
WAYS = ["verl_base", "TRL", "verl_base, 2 processes", "TRL, 2 processes"]


def cpu_seconds() -> float:
    """User and system time of this process and everything that it started, or under torchrun, that torchrun started."""
    import psutil

    root = psutil.Process().parent() if "LOCAL_RANK" in os.environ else psutil.Process()
    total = 0.0
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
            total += times.user + times.system
        except psutil.NoSuchProcess:  # a short helper of Ray's
            continue
    return total


def make_models(output: str) -> dict[str, str]:
    """Names and folders of the two models that are measured."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from tiny import tiny_model_folder

    tuned, larger = tiny_model_folder("cache_data/arithmetic/train.jsonl", 42), f"{output}/larger"
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    config = Qwen2Config(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(larger)
    tokenizer.save_pretrained(larger)
    return {"tiny policy, 2 layers x 128": tuned, "random weights, 4 layers x 256, vocabulary 8192": larger}


def our_flags(model: str, output: str, processes: int, **changes):
    """The recipe's arguments for this benchmark."""
    from arguments import parse_arguments

    flags = {
        **{"data_path": "cache_data/arithmetic/train.jsonl", "eval_data_path": "cache_data/arithmetic/test.jsonl"},
        **{"train_batch_size": PROMPTS, "rollout_n": GROUP, "ppo_mini_batch_size": PROMPTS // 2, "nproc": processes},
        **{"max_response_length": LENGTH, "learning_rate": 1e-7, "kl_loss_coef": 0.001, "output_dir": output},
        **{"model_name_or_path": model},
    } | changes
    sys.argv = ["train.py", *[word for name, value in flags.items() for word in (f"--{name}", str(value))]]
    return parse_arguments()


def measure_ours(model: str, steps: int, processes: int, output: str) -> dict:
    """Steps of train.py as its driver makes them."""
    from cluster import local_cluster
    from data import load_split
    from reward_manager import load_reward_function
    from tokenizer import load_tokenizer
    from train import collect_step, take_step
    from worker_groups import start_workers

    model_args, data_args, args = our_flags(model, output, processes)
    tokenizer = load_tokenizer(model_args)
    reward_function = load_reward_function(data_args.reward_function, data_args.reward_num_workers)
    prompts, _ = load_split(data_args, tokenizer, args.seed, output)
    lengths = []
    with local_cluster(processes, output) as pool:
        policy, reference = start_workers(pool, model_args, args, tokenizer, LENGTH)
        for step in range(WARM_UP + steps):
            if step == WARM_UP:
                started, cpu = time.perf_counter(), cpu_seconds()
            rollout, scored, _ = collect_step(policy, prompts, step, tokenizer, reward_function, data_args, args)
            lengths.append(take_step(policy, reference, rollout, scored, args)["completion_length"])
        cpu, seconds = cpu_seconds() - cpu, time.perf_counter() - started
    return {"completions": steps * PROMPTS * GROUP, "cpu": cpu, "seconds": seconds, "length": statistics.mean(lengths)}


def build_trl(model_args, args, prompts: list, output: str, steps: int, processes: int):
    """TRL's trainer with the same settings; the same prompts."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from rewards import compute_score
    from tokenizer import load_tokenizer

    def reward(completions, ground_truth, **_):
        return [
            compute_score("arithmetic", turns[0]["content"], answer)["score"]
            for turns, answer in zip(completions, ground_truth, strict=True)
        ]

    config = GRPOConfig(
        output_dir=output,
        use_cpu=True,
        bf16=False,
        ddp_backend="gloo" if processes > 1 else None,
        per_device_train_batch_size=PROMPTS * GROUP // 2 // processes,
        steps_per_generation=2,
        num_generations=GROUP,
        max_completion_length=LENGTH,
        temperature=1.0,
        top_k=0,
        beta=args.kl_loss_coef,
        use_bias_correction_kl=False,
        epsilon=0.2,
        delta=3.0,  # verl's clip_ratio_c
        loss_type="bnpo",  # the mean over the tokens of a mini-batch, as verl's token-mean
        learning_rate=1e-7,
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
        processing_class=load_tokenizer(model_args),
    )


def measure_trl(model: str, steps: int, processes: int, output: str) -> dict:
    """`trainer.train()`, from its fourth generation on."""
    from transformers import TrainerCallback

    from data import load_split
    from tokenizer import load_tokenizer

    model_args, data_args, args = our_flags(model, output, 1)
    prompts, _ = load_split(data_args, load_tokenizer(model_args), args.seed, output)
    trainer = build_trl(model_args, args, prompts, output, WARM_UP + steps, processes)
    marks = {}

    class Clock(TrainerCallback):
        def on_step_end(self, arguments, state, control, **kwargs):
            marks[state.global_step] = time.perf_counter(), cpu_seconds()

    trainer.add_callback(Clock())
    trainer.train()
    (started, cpu), (ended, cpu_end) = marks[2 * WARM_UP], marks[2 * (WARM_UP + steps)]
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    completions = steps * PROMPTS * GROUP
    return {
        "completions": completions,
        "cpu": cpu_end - cpu,
        "seconds": ended - started,
        "length": statistics.mean(lengths),
    }


def comparison_flags(model: str, output: str):
    return our_flags(
        model, output, 1, ppo_mini_batch_size=8, learning_rate=RATE, kl_loss_coef=KL_COEF, max_grad_norm=1e9
    )


def save_our_updates(model: str, output: str) -> dict[str, list[float]]:
    """A rollout, kept in a file, and our losses and gradients' norms on its mini-batches, one after the other."""
    import torch

    import cluster  # before verl: it says to verl and Ray where they are
    import worker_groups
    from advantages import add_advantages
    from data import load_split
    from reward_manager import load_reward_function
    from tokenizer import load_tokenizer
    from train import collect_step
    from worker_groups import compute_log_probs, start_workers, update_policy

    flags = model_args, data_args, args = comparison_flags(model, output)
    worker_groups.FSDPOptimizerConfig = functools.partial(worker_groups.FSDPOptimizerConfig, optimizer="SGD")
    tokenizer = load_tokenizer(model_args)
    reward_function = load_reward_function(data_args.reward_function)
    prompts, _ = load_split(data_args, tokenizer, args.seed, output)
    with cluster.local_cluster(1, output) as pool:
        policy, reference = start_workers(pool, model_args, args, tokenizer, LENGTH)
        rollout, scored, _ = collect_step(policy, prompts, 0, tokenizer, reward_function, *flags[1:])
        reference = compute_log_probs(reference, rollout, args)
        noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(0))
        rollout.batch["ref_log_prob"] = reference + 0.3 * noise  # as if the policy had moved on
        add_advantages(rollout, scored, "grpo", args)
        torch.save(dict(rollout.batch.items()), f"{output}/rollout.pt")
        metrics = update_policy(policy, rollout, args)
        policy.save_model(f"{output}/verl_base")
    return {name: metrics[name] for name in ("loss", "grad_norm", "actor/pg_clipfrac")}


def save_trl_updates(model: str, output: str) -> dict[str, list[float]]:
    """TRL's losses and gradients' norms on the same mini-batches, learning in the same way."""
    import torch

    from data import load_split
    from tokenizer import load_tokenizer

    model_args, data_args, args = comparison_flags(model, output)
    prompts, _ = load_split(data_args, load_tokenizer(model_args), args.seed, output)
    trainer = build_trl(model_args, args, prompts, output, 1, 1)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=RATE)
    batch, metrics = torch.load(f"{output}/rollout.pt"), {"loss": [], "grad_norm": []}
    width = batch["prompts"].shape[1]
    for first in range(0, PROMPTS * GROUP, 8 * GROUP):
        part = {name: values[first : first + 8 * GROUP] for name, values in batch.items()}
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
        metrics["grad_norm"].append(torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()]).item())
        metrics["loss"].append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    trainer.model.save_pretrained(f"{output}/TRL")
    return metrics


def compare_updates(model: str, trl: str, output: str) -> None:
    """Prints the losses and norms of both, and how far their movements, the sums of their gradients, lie apart."""
    import torch
    from safetensors.torch import load_file

    ours, theirs = (run_apart(way, model, 1, trl, output) for way in ("updates", "TRL updates"))
    for number in range(len(ours["loss"])):
        for name in ("loss", "grad_norm"):
            mine, other = ours[name][number], theirs[name][number]
            print(f"update {number + 1}: {name} {mine:.7f}, TRL's {other:.7f}, difference {abs(mine - other):.1e}")
    print("clipped:", ", ".join(f"{share:.2%}" for share in ours["actor/pg_clipfrac"]), "of the tokens")
    before, mine, other = (
        load_file(f"{path}/model.safetensors") for path in (model, f"{output}/verl_base", f"{output}/TRL")
    )
    moved = torch.cat([(mine[name] - before[name]).flatten() for name in before])
    apart = torch.cat([(mine[name] - other[name]).flatten() for name in before])
    share = apart.norm() / moved.norm()
    print(f"all weights moved by {moved.norm():.4f}, TRL's to a place {apart.norm():.1e} away: {share:.1e} of the way")


def run_apart(way: str, model: str, steps: int, trl: str, output: str):
    """A way in a process of its own, and what it prints as its last line; raises CalledProcessError."""
    command = [sys.executable, __file__, "--way", way, "--model", model, "--steps", str(steps), "--output", output]
    if way == "TRL, 2 processes":
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if way.startswith("TRL"):
        environment["PYTHONPATH"] = str(Path(trl).resolve())
    run = subprocess.run(command, cwd=RECIPE, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def compare(name: str, model: str, args, output: str) -> None:
    """Runs all ways on a model and prints their table."""
    found = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            found[way].append(run_apart(way, model, args.steps, args.trl, output))
            print(way, found[way][-1], flush=True)
    speeds = {way: statistics.median(run["completions"] / run["cpu"] for run in runs) for way, runs in found.items()}
    print(f"\n{name}\n\n| way | completions / CPU second | x TRL's | completions / second | tokens a completion |")
    print("|---|---|---|---|---|")
    for way, runs in found.items():
        wall = statistics.median(run["completions"] / run["seconds"] for run in runs)
        length = statistics.mean(run["length"] for run in runs)
        ratio = speeds[way] / speeds[way.replace("verl_base", "TRL")]  # at as many processes
        print(f"| {way} | {speeds[way]:.0f} | {ratio:.2f} | {wall:.0f} | {length:.1f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", default=".venv-verl/bench", help="where TRL was installed")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way")
    parser.add_argument("--steps", type=int, default=15, help="steps that are counted")
    for name in ("--way", "--model", "--output"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(RECIPE))
    if args.way:
        result = {
            "verl_base": lambda: measure_ours(args.model, args.steps, 1, args.output),
            "verl_base, 2 processes": lambda: measure_ours(args.model, args.steps, 2, args.output),
            "TRL": lambda: measure_trl(args.model, args.steps, 1, args.output),
            "TRL, 2 processes": lambda: measure_trl(args.model, args.steps, 2, args.output),
            "updates": lambda: save_our_updates(args.model, args.output),
            "TRL updates": lambda: save_trl_updates(args.model, args.output),
        }[args.way]()
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(result))
        return
    args.trl = str(Path(args.trl).resolve())
    os.chdir(RECIPE)
    subprocess.run([sys.executable, "prepare.py", "arithmetic"], check=True, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as output:
        models = make_models(output)
        compare_updates(next(iter(models.values())), args.trl, output)
        for name, model in models.items():
            compare(name, model, args, output)


if __name__ == "__main__":
    main()
