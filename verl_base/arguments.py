"""The flags of train.py. Those that verl has too are called as in verl's own trainer."""

import os
import sys
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser

from cluster import ON_GPU
from rows import UserError

# What each algorithm sets where no flag says otherwise. Sources: GRPO arXiv:2402.03300, RLOO arXiv:2402.14740,
# REINFORCE++ arXiv:2501.03262 (the KL costs reward, token by token), DAPO arXiv:2503.14476 (a higher upper clip, no
# reference, groups that are all right or all wrong replaced, the last fifth of a completion's places punished; as in
# verl's recipe, completions that were cut off are learned from).
GRPO = {
    **{"adv_estimator": "grpo", "clip_ratio_high": 0.2, "kl_loss_coef": 0.001, "use_kl_in_reward": False},
    **{"filter_groups": False, "overlong_buffer_share": 0.0, "mask_truncated_completions": False},
}
REINFORCE = {"adv_estimator": "reinforce_plus_plus", "kl_loss_coef": 0.0, "use_kl_in_reward": True}
DAPO = {"clip_ratio_high": 0.28, "kl_loss_coef": 0.0, "filter_groups": True, "overlong_buffer_share": 0.2}
ALGORITHMS = {
    "grpo": GRPO,
    "rloo": GRPO | {"adv_estimator": "rloo"},
    "reinforce_plus_plus": GRPO | REINFORCE,
    "dapo": GRPO | DAPO,
}

SCHEDULES = ("constant", "cosine")
TRACKERS = ("none", "tensorboard", "wandb", "swanlab", "mlflow", "trackio")
LOSS_MODES = ("vanilla", "gspo")
KL_ESTIMATORS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
KL_LOSS_TYPES = (*KL_ESTIMATORS, "kl+", "k1+", "abs+", "low_var_kl+", "k3+")
LOSS_AGG_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
# What is out of its range fails later or means something else than one would think: a max_grad_norm of 0 scales every
# gradient to nothing, a rollout_is_threshold of 0 every weight, and by a lora_r of 0 verl means no adapter at all.
COUNTS = ("total_training_steps", "train_batch_size", "ppo_mini_batch_size", "ppo_epochs", "ppo_max_token_len_per_gpu")
COUNTS += ("max_num_gen_batches", "val_n", "test_freq", "save_freq", "save_total_limit", "logging_steps", "nproc")
COUNTS += ("max_prompt_length", "max_response_length", "reward_num_workers", "lora_r", "lora_alpha")
MORE_THAN_ZERO = ("learning_rate", "temperature", "val_temperature", "max_grad_norm", "rollout_is_threshold")
MORE_THAN_ZERO += ("reward_timeout",)
NOT_NEGATIVE = ("seed", "lr_warmup_steps", "weight_decay", "clip_ratio_low", "clip_ratio_high", "entropy_coeff")
NOT_NEGATIVE += ("kl_loss_coef", "kl_coef", "overlong_buffer_len", "overlong_penalty_factor")
RANGES = {
    "at least 1": (COUNTS, lambda value: value >= 1),
    "more than 0": (MORE_THAN_ZERO, lambda value: value > 0),
    "at least 0": (NOT_NEGATIVE, lambda value: value >= 0),
}


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        default="tiny", metadata={"help": "A hub id or a folder; tiny: the embedded model, tuned on sft.jsonl first."}
    )
    use_lora: bool = field(default=False, metadata={"help": "Learn adapters only; the model itself is the reference."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters; larger holds more and costs more."})
    lora_alpha: int = field(default=32, metadata={"help": "Their scale; usually twice the rank."})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Names of the layers with adapters, or all-linear."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that the model brings along."})
    attn_implementation: str = field(
        default="", metadata={"help": "sdpa, or flash_attention_2 (taken on a GPU where flash-attn is installed)."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass: less memory, a third slower."}
    )


@dataclass
class DataArguments:
    data_path: str = field(
        default="cache_data/arithmetic/train.jsonl", metadata={"help": "A .json / .jsonl file of prompts, or a folder."}
    )
    eval_data_path: str | None = field(
        default=None, metadata={"help": "Validation prompts; without it validation_split is cut off the data."}
    )
    validation_split: float | None = field(
        default=None, metadata={"help": "Share of data_path kept for validation; 0.05 unless given."}
    )
    max_prompt_length: int = field(default=512, metadata={"help": "Tokens; a longer prompt is a bad row."})
    max_response_length: int = field(
        default=256, metadata={"help": "Tokens; a completion is cut off there and counts as not finished."}
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Go on without rows that can't be used; bad_rows.jsonl lists them."}
    )
    reward_function: str = field(
        default="rewards.py:compute_score", metadata={"help": "file.py:function that gives a completion its score."}
    )
    reward_timeout: float = field(
        default=300.0, metadata={"help": "Seconds that it has for a completion; what takes longer has failed."}
    )
    reward_num_workers: int = field(
        default=8, metadata={"help": "Processes with its file loaded, each asked about a completion at a time."}
    )
    skip_bad_rewards: bool = field(
        default=False, metadata={"help": "Leave a completion out, and count it, where the reward function fails on it."}
    )


@dataclass
class TrainingArguments:
    output_dir: str = field(default="output", metadata={"help": "Checkpoints, report and the trained model."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Start afresh where a run was before."})
    algorithm: str = field(default="grpo", metadata={"help": ", ".join(ALGORITHMS)})
    total_training_steps: int = field(default=200, metadata={"help": "Batches of prompts to learn from."})
    train_batch_size: int = field(default=32, metadata={"help": "Prompts a step, of all processes together."})
    rollout_n: int = field(default=8, metadata={"help": "Completions to each prompt: a group."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling in training; more of it explores more."})
    val_temperature: float = field(default=1.0, metadata={"help": "Of sampling on validation prompts."})
    ppo_mini_batch_size: int = field(default=16, metadata={"help": "Prompts an optimizer step."})
    ppo_epochs: int = field(default=1, metadata={"help": "Times that a batch is learned from."})
    ppo_max_token_len_per_gpu: int = field(
        default=16384, metadata={"help": "Tokens that a process takes at once; lower it when memory runs out."}
    )
    learning_rate: float = field(default=1e-6, metadata={"help": "1e-6 suits a model of billions, LoRA 1e-5."})
    lr_warmup_steps: int = field(default=0, metadata={"help": "Steps over which the learning rate rises."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "constant or cosine."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are scaled down to this norm."})
    clip_ratio_low: float = field(default=0.2, metadata={"help": "How far a token's probability may fall a step."})
    clip_ratio_high: float | None = field(default=None, metadata={"help": "And rise; by algorithm."})
    kl_loss_coef: float | None = field(
        default=None, metadata={"help": "Weight of the KL to the reference; 0: no reference is loaded. By algorithm."}
    )
    kl_loss_type: str = field(
        default="low_var_kl",
        metadata={"help": "verl's: low_var_kl (k3), kl (k1), mse (k2), abs; with a + the gradient is k2's, unbiased."},
    )
    use_kl_in_reward: bool | None = field(
        default=None,
        metadata={"help": "The KL to the reference is taken off the reward, token by token. By algorithm."},
    )
    kl_coef: float = field(default=0.001, metadata={"help": "Its weight there."})
    kl_penalty: str = field(default="kl", metadata={"help": "Its estimator there: kl (k1), abs, mse (k2), low_var_kl."})
    norm_adv_by_std_in_grpo: bool = field(
        default=True,
        metadata={"help": "Divide by the group's deviation; false, as Dr. GRPO does: only subtract its mean."},
    )
    loss_mode: str = field(
        default="vanilla", metadata={"help": "vanilla, or gspo: one ratio for all tokens of a completion."}
    )
    rollout_is: str | None = field(
        default=None,
        metadata={"help": "token or sequence: weights for a rollout whose probabilities aren't the trainer's (TIS)."},
    )
    rollout_is_threshold: float = field(default=2.0, metadata={"help": "Such a weight is this at most."})
    overlong_buffer_len: int | None = field(
        default=None,
        metadata={"help": "Of the tokens that a completion may have, so many at the end cost reward. By algorithm."},
    )
    overlong_penalty_factor: float = field(default=1.0, metadata={"help": "What the last of them costs."})
    mask_truncated_completions: bool | None = field(
        default=None, metadata={"help": "Completions that were cut off are not learned from. By algorithm."}
    )
    entropy_coeff: float = field(default=0.0, metadata={"help": "Weight of an entropy bonus."})
    loss_agg_mode: str = field(
        default="token-mean", metadata={"help": "verl's: token-mean, seq-mean-token-mean, seq-mean-token-sum ..."}
    )
    max_num_gen_batches: int = field(
        default=4,
        metadata={"help": "dapo: batches sampled for a step at most, until enough groups are neither right nor wrong."},
    )
    recompute_log_probs: bool | None = field(
        default=None, metadata={"help": "Old log-probabilities by a forward pass, not as sampled; true under bf16."}
    )
    val_n: int = field(default=8, metadata={"help": "Completions to each validation prompt."})
    test_freq: int = field(default=25, metadata={"help": "Steps between two evaluations."})
    save_freq: int = field(default=50, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints that are kept."})
    logging_steps: int = field(default=5, metadata={"help": "Steps between two printed lines."})
    report_to: str = field(
        default="none", metadata={"help": "tensorboard, wandb, swanlab ... where installed: verl's."}
    )
    seed: int = field(default=42, metadata={"help": "Of the order of prompts, the sampling and the tiny model."})
    nproc: int | None = field(default=None, metadata={"help": "Processes: all GPUs, or 2 on the CPU."})
    fast_path: bool = field(
        default=Path(__file__).with_name("fast_path.py").exists(),
        metadata={"help": "False samples and trains by Transformers and verl alone; the same numbers, slower."},
    )
    bf16: bool | None = field(default=None, metadata={"help": "bfloat16; true on GPUs that have it."})


def fill_by_hardware(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> None:
    """What wasn't given: processes, precision, attention, and what the algorithm says."""
    if args.nproc is None:
        args.nproc = torch.cuda.device_count() if ON_GPU else min(2, len(os.sched_getaffinity(0)))
    if args.bf16 is None:
        args.bf16 = ON_GPU and torch.cuda.is_bf16_supported(including_emulation=False)
    if args.recompute_log_probs is None:
        args.recompute_log_probs = args.bf16
    if not model_args.attn_implementation:
        flash = ON_GPU and args.bf16 and find_spec("flash_attn") is not None
        model_args.attn_implementation = "flash_attention_2" if flash else "sdpa"
    for name in ("clip_ratio_high", "kl_loss_coef", "use_kl_in_reward", "mask_truncated_completions"):
        if getattr(args, name) is None:
            setattr(args, name, ALGORITHMS[args.algorithm][name])
    if args.overlong_buffer_len is None:
        share = ALGORITHMS[args.algorithm]["overlong_buffer_share"]
        args.overlong_buffer_len = round(share * data_args.max_response_length)


def refuse_flags_without_effect(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> None:
    """Raises UserError for a flag that would change nothing here."""
    defaults = {field.name: field.default for field in [*fields(ModelArguments), *fields(TrainingArguments)]}
    for name in ("lora_r", "lora_alpha"):
        if not model_args.use_lora and getattr(model_args, name) != defaults[name]:
            raise UserError(f"--{name} has no effect without --use_lora true.")
    if not model_args.use_lora and model_args.target_modules != ["all-linear"]:
        raise UserError("--target_modules has no effect without --use_lora true.")
    if not ALGORITHMS[args.algorithm]["filter_groups"] and args.max_num_gen_batches != defaults["max_num_gen_batches"]:
        raise UserError(f"--max_num_gen_batches has no effect on {args.algorithm}, which draws no group again.")
    needs = {
        "kl_loss_type": ("--kl_loss_coef above 0", args.kl_loss_coef > 0),
        "kl_coef": ("--use_kl_in_reward true", args.use_kl_in_reward),
        "kl_penalty": ("--use_kl_in_reward true", args.use_kl_in_reward),
        "norm_adv_by_std_in_grpo": ("the advantages of grpo or dapo", args.algorithm in ("grpo", "dapo")),
        "overlong_penalty_factor": ("--overlong_buffer_len above 0", args.overlong_buffer_len > 0),
        "rollout_is": ("--recompute_log_probs true", args.recompute_log_probs),
        "rollout_is_threshold": ("--rollout_is", args.rollout_is is not None),
    }
    for name, (needed, there) in needs.items():
        if not there and getattr(args, name) != defaults[name]:
            raise UserError(f"--{name} has no effect without {needed}.")
    if data_args.eval_data_path and data_args.validation_split is not None:
        raise UserError("--validation_split has no effect with --eval_data_path; give one of them.")


def check_ranges(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> None:
    """Raises UserError for a number that is out of its range, as nan is of each; what isn't given is in it."""
    given = vars(model_args) | vars(data_args) | vars(args)
    for range_, (names, is_within) in RANGES.items():
        for name in names:
            if given[name] is not None and not is_within(given[name]):
                raise UserError(f"--{name} {given[name]}: must be {range_}.")


def check_values(data_args: DataArguments, args: TrainingArguments) -> None:
    """Raises UserError for a flag whose value can't work."""
    if args.algorithm not in ALGORITHMS:
        raise UserError(f"--algorithm {args.algorithm}: known are {', '.join(ALGORITHMS)}.")
    choices = {
        **{"lr_scheduler_type": SCHEDULES, "loss_agg_mode": LOSS_AGG_MODES, "loss_mode": LOSS_MODES},
        **{"kl_loss_type": KL_LOSS_TYPES, "kl_penalty": KL_ESTIMATORS, "rollout_is": (None, "token", "sequence")},
        "report_to": TRACKERS,
    }
    for name, known in choices.items():
        if getattr(args, name) not in known:
            raise UserError(f"--{name} {getattr(args, name)}: known are {', '.join(filter(None, known))}.")
    if args.report_to != "none" and find_spec(args.report_to) is None:
        raise UserError(f"--report_to {args.report_to}: it isn't installed; pip install {args.report_to}.")
    if (args.overlong_buffer_len or 0) > data_args.max_response_length:
        raise UserError(
            f"--overlong_buffer_len {args.overlong_buffer_len}: at most --max_response_length "
            f"{data_args.max_response_length}, the tokens that a completion may have; 0 for none."
        )
    if args.rollout_n < 2:
        raise UserError(
            f"--rollout_n {args.rollout_n}: a completion is compared with the others of its group; give 2 or more."
        )
    if args.train_batch_size % args.ppo_mini_batch_size:
        raise UserError(
            f"--train_batch_size {args.train_batch_size} is not a multiple of --ppo_mini_batch_size "
            f"{args.ppo_mini_batch_size}, so the last optimizer step of a batch would be smaller."
        )
    if data_args.validation_split is not None and not 0 < data_args.validation_split < 1:
        raise UserError(f"--validation_split {data_args.validation_split}: a share between 0 and 1.")


def check_processes(args: TrainingArguments) -> None:
    """Raises UserError where a batch can't be split evenly."""
    for name in ("train_batch_size", "ppo_mini_batch_size"):
        if getattr(args, name) % args.nproc:
            raise UserError(f"--{name} {getattr(args, name)} can't be split over {args.nproc} processes evenly.")


def read_yaml_flags(path: str) -> list[str]:
    """A YAML mapping as the words of a command line: YAML itself takes 1e-6 for a text."""
    words = []
    for name, value in yaml.safe_load(Path(path).read_text("utf-8")).items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])] if value is not None else []
    return words


def parse_arguments() -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Flags, or a YAML file of them.

    Raises:
        UserError: a flag that is unknown, can't work, or has no effect together with the others.
    """
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments), allow_abbrev=False)
    try:
        words = sys.argv[1:]
        if len(words) == 1 and words[0].endswith((".yaml", ".yml")):
            words = read_yaml_flags(words[0])
        model_args, data_args, args = parser.parse_args_into_dataclasses(words)
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise UserError(str(error)) from None
    check_ranges(model_args, data_args, args)
    check_values(data_args, args)
    fill_by_hardware(model_args, data_args, args)
    refuse_flags_without_effect(model_args, data_args, args)
    check_processes(args)
    model_args.model_name_or_path = model_args.model_name_or_path.rstrip("/")
    return model_args, data_args, args
