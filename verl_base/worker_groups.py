"""The policy and its frozen reference as groups of Ray workers: their settings, and what the driver asks them for."""

from functools import partial

import ray
import torch
from verl import DataProto
from verl.protocol import pad_dataproto_to_divisor
from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup
from verl.single_controller.ray.base import create_colocated_worker_cls
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.config.actor import PolicyLossConfig
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

from data import Prompt
from tokenizer import find_stop_tokens, read_generation_config
from workers import PolicyWorker


def worker_config(model_args, args, trained: bool) -> TrainingWorkerConfig:
    """verl's settings for the policy (trained) or for the reference (forward only, never with adapters)."""
    precision = "bf16" if args.bf16 else "fp32"
    lora = trained and model_args.use_lora
    targets = model_args.target_modules
    flash = model_args.attn_implementation == "flash_attention_2"  # verl packs sequences for it
    model_type = "language_model"
    if args.fast_path and not flash and not model_args.gradient_checkpointing:
        from fast_path import MODEL_TYPE as model_type
    return TrainingWorkerConfig(
        model_type=model_type,
        model_config=HFModelConfig(
            path=model_args.model_name_or_path,
            trust_remote_code=model_args.trust_remote_code,
            load_tokenizer=False,
            use_remove_padding=flash,
            enable_gradient_checkpointing=model_args.gradient_checkpointing,
            override_config={"attn_implementation": model_args.attn_implementation},
            lora_rank=model_args.lora_r if lora else 0,
            lora_alpha=model_args.lora_alpha,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            forward_only=not trained,
            model_dtype="fp32" if trained else precision,  # what the optimizer updates stays in fp32
            mixed_precision={"param_dtype": precision, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
            use_torch_compile=False,
            use_dynamic_bsz=True,
            max_token_len_per_gpu=args.ppo_max_token_len_per_gpu,
            infer_max_token_len_per_gpu=args.ppo_max_token_len_per_gpu,
        ),
        optimizer_config=FSDPOptimizerConfig(
            lr=args.learning_rate,
            lr_warmup_steps=args.lr_warmup_steps,
            lr_scheduler_type=args.lr_scheduler_type,
            total_training_steps=args.total_training_steps,
            weight_decay=args.weight_decay,
            clip_grad=args.max_grad_norm,
        ),
        checkpoint_config=CheckpointConfig(),
    )


def policy_loss(args) -> partial:
    """PPO's clipped loss, with the KL to the reference and the entropy where they are weighed (verl's `ppo_loss`)."""
    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=args.rollout_n,
        ppo_mini_batch_size=args.ppo_mini_batch_size,
        use_dynamic_bsz=True,
        ppo_max_token_len_per_gpu=args.ppo_max_token_len_per_gpu,
        clip_ratio=args.clip_ratio_low,
        clip_ratio_low=args.clip_ratio_low,
        clip_ratio_high=args.clip_ratio_high,
        loss_agg_mode=args.loss_agg_mode,
        entropy_coeff=args.entropy_coeff,
        use_kl_loss=args.kl_loss_coef > 0,
        kl_loss_coef=args.kl_loss_coef,
        kl_loss_type=args.kl_loss_type,
        policy_loss=PolicyLossConfig(loss_mode=args.loss_mode),
    )
    return partial(ppo_loss, config=config)


def needs_reference(args) -> bool:
    return args.kl_loss_coef > 0 or args.use_kl_in_reward


def start_workers(
    pool, model_args, args, tokenizer, completion_length: int
) -> tuple[RayWorkerGroup, RayWorkerGroup | None]:
    """The policy, and the reference in the same processes: None where none is needed, or LoRA's base model is it."""
    generation_config = read_generation_config(model_args.model_name_or_path, model_args.trust_remote_code)
    policy = RayClassWithInitArgs(
        ray.remote(PolicyWorker),
        config=worker_config(model_args, args, trained=True),
        tokenizer=tokenizer,
        stop_tokens=find_stop_tokens(tokenizer, generation_config),
        completion_length=completion_length,
        fast=args.fast_path,
    )
    roles = {"policy": policy}
    if needs_reference(args) and not model_args.use_lora:
        frozen = worker_config(model_args, args, trained=False)
        roles["reference"] = RayClassWithInitArgs(ray.remote(TrainingWorker), config=frozen)
    group = RayWorkerGroup(pool, create_colocated_worker_cls(roles), device_name="cuda" if pool.use_gpu else "cpu")
    spawned = group.spawn(prefix_set=roles.keys())
    for role in spawned.values():
        role.reset()
    spawned["policy"].set_loss_fn(policy_loss(args))
    return spawned["policy"], spawned.get("reference")


def collate_prompts(prompts: list[Prompt], pad_token_id: int) -> DataProto:
    """Left-padded `input_ids` and `attention_mask` [prompts, longest]."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt.input_ids) :] = torch.tensor(prompt.input_ids)
        attention_mask[row, longest - len(prompt.input_ids) :] = 1
    return DataProto.from_dict(tensors={"input_ids": input_ids, "attention_mask": attention_mask})


def sample(policy, prompts: list[Prompt], pad_token_id: int, n: int, temperature: float, seed: int) -> DataProto:
    """n completions to each prompt, from all workers."""
    batch = collate_prompts(prompts, pad_token_id)
    batch.meta_info |= {"n": n, "temperature": temperature, "seed": seed}
    padded, added = pad_dataproto_to_divisor(batch, policy.world_size)
    rollout = policy.generate_sequences(padded)
    return rollout[: len(rollout) - added * n]


def without_padding(batch: DataProto, args):
    """The batch in the form of verl's engines: each sequence as long as it is, in one nested tensor."""
    batch.meta_info |= {"temperature": args.temperature, "force_group_size": args.rollout_n}
    return left_right_2_no_padding(batch.to_tensordict())


def compute_log_probs(workers: RayWorkerGroup, batch: DataProto, args, **options):
    """Log-probabilities [completions, length] that a group of workers gives to the completions of a batch."""
    data = without_padding(batch, args)
    tu.assign_non_tensor(data, calculate_entropy=False, compute_loss=False, **options)
    output = workers.infer_batch(data).get()
    return no_padding_2_padding(tu.get(output, "log_probs"), data).float()


def update_policy(policy: RayWorkerGroup, batch: DataProto, args) -> dict[str, list]:
    """One optimizer step for each mini-batch, `ppo_epochs` times over the batch; returns verl's metrics."""
    data = without_padding(batch, args)
    completions = args.ppo_mini_batch_size * args.rollout_n
    tu.assign_non_tensor(
        data,
        calculate_entropy=args.entropy_coeff > 0,
        global_batch_size=completions,
        mini_batch_size=completions,
        epochs=args.ppo_epochs,
        dataloader_kwargs={"shuffle": False},  # the completions to a prompt stay together
        compute_loss=True,
    )
    return tu.get(policy.train_mini_batch(data).get(), "metrics")
