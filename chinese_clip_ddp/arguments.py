"""The flags of train.py, and what each of Transformers' means to a run."""

from dataclasses import MISSING, dataclass, field

import torch
import transformers
from transformers import IntervalStrategy

from contrastive import MODES, SAME_CAPTION
from flags import RENAMED, parse_flags
from model import POOLINGS
from rows import UserError
from tiny import SAMPLE_DATA

# What Transformers' flags mean to a run. These decide its numbers: with another value a checkpoint is another run's.
DECIDES_THE_NUMBERS = (
    *("seed", "full_determinism", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"),
    *("max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm"),
    *("optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("bf16", "fp16", "tf32", "use_cpu", "activation_checkpointing", "activation_checkpointing_kwargs"),
    *("gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode", "deepspeed"),
    *("ddp_backend", "ddp_bucket_cap_mb"),
    *("text_learning_rate", "vision_learning_rate", "cross_embedding", "same_caption", "gradcache_chunk_size"),
    *("loss_block_size", "image_augmentation"),
)

# These say what is reported, measured, saved and how it is run, and may change where a run goes on.
FREE = (
    *("output_dir", "overwrite_output_dir", "run_name", "project", "report_to", "disable_tqdm", "debug"),
    *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_on_each_node"),
    *("log_level", "log_level_replica", "skip_memory_metrics"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "push_to_hub", "hub_token", "hub_revision"),
    *("hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
    *("early_stopping_patience", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("save_strategy", "save_steps", "save_on_each_node", "save_total_limit", "torch_empty_cache_steps"),
    *("dataloader_num_workers", "dataloader_pin_memory", "ddp_find_unused_parameters", "ddp_broadcast_buffers"),
    *("ddp_static_graph", "ddp_timeout", "local_rank", "do_train", "do_eval"),
    "gradient_checkpointing",  # the name that everybody types, handed on as activation_checkpointing
)

# These would change nothing here, or not what their names say.
BATCHES = "batch.PairBatchSampler shares the pairs out"
VALIDATION = "evaluate_retrieval.py measures retrieval in galleries of pairs"
NOT_TAKEN = {
    "label_smoothing_factor": "the loss is contrastive.contrastive_loss",
    "label_names": "pairs have no labels",
    "data_seed": "--seed decides the order of the pairs too",
    "dataloader_drop_last": "every pair is trained on",
    "train_sampling_strategy": BATCHES,
    "length_column_name": BATCHES,
    "accelerator_config": BATCHES,
    "parallelism_config": BATCHES,
    "remove_unused_columns": BATCHES,
    "dataloader_persistent_workers": "--dataloader_num_workers alone is handed on",
    "dataloader_prefetch_factor": "--dataloader_num_workers alone is handed on",
    "dataloader_multiprocessing_context": "--dataloader_num_workers alone is handed on",
    "dataloader_in_order": "--dataloader_num_workers alone is handed on",
    "resume_from_checkpoint": "a run in an --output_dir that holds its checkpoints goes on by itself",
    "ignore_data_skip": "a run that goes on would see its first pairs again",
    "restore_callback_states_from_checkpoint": "early stopping goes on counting by itself",
    "save_only_model": "a run can't go on from such a checkpoint; the model is saved at the end",
    "enable_jit_checkpoint": "what is written in a hurry is no complete checkpoint; lower --save_steps",
    "auto_find_batch_size": "the batch is the loss's negatives; --gradcache_chunk_size makes it fit",
    "average_tokens_across_devices": "the loss is always the mean over the pairs of all processes",
    "include_num_input_tokens_seen": "pairs are counted, not tokens",
    "neftune_noise_alpha": "noise on the token embeddings would be the text tower's alone",
    "use_liger_kernel": "it has no kernels for these towers",
    "liger_kernel_config": "it has no kernels for these towers",
    "fsdp": "the towers are small: plain DDP, or --deepspeed",
    "fsdp_config": "the towers are small: plain DDP, or --deepspeed",
    "use_cache": "an encoder has no use for a cache",
    "prediction_loss_only": VALIDATION,
    "include_for_metrics": VALIDATION,
    "batch_eval_metrics": VALIDATION,
    "eval_do_concat_batches": VALIDATION,
    "eval_use_gather_object": VALIDATION,
    "eval_accumulation_steps": VALIDATION,
    "bf16_full_eval": VALIDATION,
    "fp16_full_eval": VALIDATION,
    "do_predict": "infer.py asks the trained model",
}

# Flags of the older script, and of Chinese-CLIP and open_clip.
RENAMED |= {
    "cache_dir": "the environment variable HF_HOME",
    "source_length": "--max_seq_length",
    "target_length": "--max_seq_length",
    "train_data": "--data_path",
    "val_data": "--eval_data_path",
    "context_length": "--max_seq_length",
    "model_max_length": "--max_seq_length",
    "text_pooler": "--text_pooling",
    "vision_model_name_or_path": "--image_model_name_or_path",
    "freeze_vision": "--freeze vision",
    "lock_image": "--freeze vision",
    "lock_text": "--freeze text",
    "lock_image_unlocked_groups": "--freeze vision --unlocked_layers n",
    "accum_freq": "--gradcache_chunk_size, pairs that go through the towers at once",
    "local_loss": "--cross_embedding local, or tiled, which needs less memory",
    "gather_with_grad": "--cross_embedding gather_nn, or tiled, which needs less memory",
    "siglip": "--cross_embedding sigmoid",
    "use_augment": "--image_augmentation crop",
}


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A CLIP, Chinese-CLIP, SigLIP or dual encoder; by default 'tiny', which is built on the spot."
        },
    )
    text_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A text encoder (BERT, RoBERTa, bge), with --image_model_name_or_path."}
    )
    image_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A vision encoder (ViT, DINOv2, Swin, LeViT, or a CLIP's own)."}
    )
    text_pooling: str | None = field(default=None, metadata={"help": f"{' | '.join(POOLINGS)}; cls by default."})
    vision_pooling: str | None = field(
        default=None, metadata={"help": "The same; by default cls where the encoder has a class token, else mean."}
    )
    projection_dim: int | None = field(
        default=None, metadata={"help": "Width of the common space; by default the encoders' own, or the smaller one."}
    )
    freeze: str = field(default="none", metadata={"help": "none | vision | text: the encoder that isn't trained."})
    unlocked_layers: int = field(default=0, metadata={"help": "Last layers of the frozen encoder that are trained."})


@dataclass
class DataArguments:
    data_path: str = field(default=SAMPLE_DATA, metadata={"help": "A file or a folder of image-text pairs."})
    eval_data_path: str | None = field(
        default=None, metadata={"help": "Validation pairs, each file a gallery; else validation_split is cut off."}
    )
    validation_split: float | None = field(
        default=None, metadata={"help": "Share of the images of data_path to validate on; 0.05 unless given, 0: none."}
    )
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Tokens of a caption, a longer one is cut; by default the model's positions."}
    )
    language: str = field(
        default="zh", metadata={"help": "zh | en: which of a row's zh_prompt and prompt is its caption."}
    )
    data_size: int | None = field(default=None, metadata={"help": "The first so many rows only; all by default."})
    image_cache_gb: float = field(
        default=2.0,
        metadata={"help": "Images of the encoder's size are kept on disk where they fit into this."},
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Go on without pairs that can't be trained on; bad_rows.jsonl lists them."}
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    output_dir: str = field(default="output", metadata={"help": "Checkpoints, the model and the report."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start afresh where output_dir holds checkpoints, which are removed."}
    )
    bf16: bool | None = field(default=None, metadata={"help": "bf16; by default where the GPU has it."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Of all that has no rate of its own."})
    text_learning_rate: float | None = field(default=None, metadata={"help": "Another rate for the text encoder."})
    vision_learning_rate: float | None = field(default=None, metadata={"help": "Another rate for the vision encoder."})
    weight_decay: float = field(default=0.05, metadata={"help": "Of matrices; scalars, biases and norms have none."})
    adam_beta2: float = field(default=0.98, metadata={"help": "How long the optimizer remembers a gradient's size."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or below 1 the share of all steps."})
    cross_embedding: str = field(
        default="tiled", metadata={"help": f"The loss over the ranks: {' | '.join(MODES)}; contrastive.py tells."}
    )
    same_caption: str = field(
        default="mask", metadata={"help": f"Pairs of one caption or image: {' | '.join(SAME_CAPTION)}."}
    )
    loss_block_size: int = field(default=1024, metadata={"help": "Side of a block of similarities in tiled, sigmoid."})
    gradcache_chunk_size: int | None = field(
        default=None, metadata={"help": "Pairs that go through the encoders at once, for a batch that doesn't fit."}
    )
    image_augmentation: str = field(default="none", metadata={"help": "none | crop: random 90 to 100 %% of an image."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two points of the loss curve."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "True hides a loss that is not a number."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images, or captions, embedded at once."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When the galleries are searched."})
    eval_on_start: bool = field(default=True, metadata={"help": "Search the galleries before the first step."})
    save_strategy: str = field(default="epoch", metadata={"help": "When a checkpoint is written."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept: the newest and the best."})
    metric_for_best_model: str | None = field(
        default="mean_recall",
        metadata={"help": "What the best checkpoint is best in, or <gallery>/i2t_r1."},
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better metric."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "What a step doesn't use is frozen here."}
    )
    report_to: str = field(default="none", metadata={"help": "tensorboard, wandb, swanlab ... where installed."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Left to the collator here."})
    include_num_input_tokens_seen: str = field(default="no", metadata={"help": "Not taken: pairs are counted."})

    def __post_init__(self):
        for name, reason in NOT_TAKEN.items():
            of = self.__dataclass_fields__[name]
            if getattr(self, name) != (of.default_factory() if of.default is MISSING else of.default):
                raise UserError(f"--{name} is not taken: {reason}.")
        # >>> hardware
        gpu_has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        if self.bf16 is None:
            self.bf16 = gpu_has_bf16 and not self.use_cpu and not self.fp16
        cpu = torch.cpu.get_capabilities()
        if self.bf16 and not gpu_has_bf16 and not (cpu.get("avx512_bf16") or cpu.get("amx_bf16")):
            raise UserError("--bf16 true: this machine has no bf16 arithmetic. Leave it out: fp32 is used on the CPU.")
        if self.fp16 and (self.use_cpu or not torch.cuda.is_available()):
            raise UserError("--fp16 true: needs a GPU. Leave it out: fp32 is used on the CPU.")
        if self.gradient_checkpointing:  # the name that everybody types; Transformers 5 calls it by another
            self.activation_checkpointing, self.gradient_checkpointing = True, None
        super().__post_init__()
        if self.deepspeed and self.use_cpu and torch.distributed.is_initialized():
            import deepspeed

            # Accelerate starts gloo without telling DeepSpeed, which would shard the model for a single process.
            deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        self._n_gpu = min(self._n_gpu, 1)  # one process drives one GPU; torchrun starts one for each
        # <<< hardware


CHOICES = {
    "text_pooling": (None, *POOLINGS),
    "vision_pooling": (None, *POOLINGS),
    "freeze": ("none", "vision", "text"),
    "language": ("zh", "en"),
    "cross_embedding": tuple(MODES),
    "same_caption": tuple(SAME_CAPTION),
    "image_augmentation": ("none", "crop"),
}


def parse_arguments() -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Flags, or a YAML file of them, which flags may follow.

    Raises:
        UserError: a flag that is unknown, or that has no effect together with the others.
    """
    model_args, data_args, args = parse_flags(ModelArguments, DataArguments, TrainingArguments)
    for name, choices in CHOICES.items():
        value = next(getattr(group, name) for group in (model_args, data_args, args) if name in vars(group))
        if value not in choices:
            known = ", ".join(choice for choice in choices if choice)
            raise UserError(f"--{name} {value}: there is no such choice; known are {known}.")
    check_model_flags(model_args)
    check_training_flags(model_args, args)
    if data_args.eval_data_path and data_args.validation_split is not None:
        raise UserError("--validation_split has no effect with --eval_data_path; give one of them.")
    if data_args.validation_split is None:
        data_args.validation_split = 0.05
    if not 0 <= data_args.validation_split < 1:
        raise UserError(f"--validation_split {data_args.validation_split:g}: a share of the images, from 0 to below 1.")
    if data_args.data_size is not None and data_args.data_size < 1:
        raise UserError(f"--data_size {data_args.data_size}: 1 or more; leave it out for all rows.")
    refuse_validation_without_rows(data_args, args)
    return model_args, data_args, args


def check_model_flags(model_args) -> None:
    """Raises UserError for flags of the model that contradict each other; sets the default model."""
    text, image = model_args.text_model_name_or_path, model_args.image_model_name_or_path
    if bool(text) != bool(image):
        missing = "image" if text else "text"
        raise UserError(f"--{missing}_model_name_or_path is missing: a dual encoder needs both of its encoders.")
    if text and model_args.model_name_or_path:
        raise UserError("--model_name_or_path has no effect with the two encoders; give it, or them.")
    if not text:
        model_args.model_name_or_path = model_args.model_name_or_path or "tiny"
        for name in ("text_pooling", "vision_pooling", "projection_dim"):
            if getattr(model_args, name) is not None:
                raise UserError(f"--{name} has no effect with --model_name_or_path: the model decides.")
    if model_args.unlocked_layers and model_args.freeze == "none":
        raise UserError("--unlocked_layers has no effect without --freeze vision or --freeze text.")
    if model_args.unlocked_layers < 0:
        raise UserError(f"--unlocked_layers {model_args.unlocked_layers}: 0 or more.")
    if model_args.projection_dim is not None and model_args.projection_dim < 1:
        raise UserError(f"--projection_dim {model_args.projection_dim}: 1 or more.")


def check_training_flags(model_args, args) -> None:
    """Raises UserError for a flag that would change nothing here, or that can't work with another."""
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        name = "num_train_epochs" if args.max_steps else "max_steps"
        raise UserError(f"--{name} {getattr(args, name):g}: nothing would be trained.")
    if args.loss_block_size != 1024 and args.cross_embedding not in ("tiled", "sigmoid"):
        raise UserError(f"--loss_block_size has no effect with --cross_embedding {args.cross_embedding}.")
    if args.loss_block_size < 1:
        raise UserError(f"--loss_block_size {args.loss_block_size}: 1 or more.")
    for tower in ("text", "vision"):
        rate = getattr(args, f"{tower}_learning_rate")
        if rate is not None and model_args.freeze == tower and not model_args.unlocked_layers:
            raise UserError(f"--{tower}_learning_rate has no effect with --freeze {tower}.")
    if args.gradcache_chunk_size is None:
        return
    if args.gradcache_chunk_size < 1:
        raise UserError(f"--gradcache_chunk_size {args.gradcache_chunk_size}: 1 or more.")
    if args.deepspeed:
        raise UserError(
            "--gradcache_chunk_size can't be had with --deepspeed: ZeRO shares the gradients out after each backward "
            "pass, and GradCache has one for each chunk of a batch. Leave --deepspeed out."
        )
    if args.fp16:
        raise UserError(
            "--gradcache_chunk_size can't be had with --fp16 true, which scales the loss. Give --bf16 true."
        )
    if args.gradient_accumulation_steps > 1:
        raise UserError(
            "--gradcache_chunk_size has no effect beside --gradient_accumulation_steps: it is the other way to a large "
            "batch, one whose pairs are all negatives of each other. Raise --per_device_train_batch_size instead."
        )
    if args.per_device_train_batch_size <= args.gradcache_chunk_size:
        raise UserError(
            f"--gradcache_chunk_size {args.gradcache_chunk_size} has no effect: the batch of a process is "
            f"{args.per_device_train_batch_size}. Raise --per_device_train_batch_size."
        )


def refuse_validation_without_rows(data_args, args) -> None:
    """Leaves out the validation where there are no rows for it; raises UserError where a flag needs it."""
    if not data_args.eval_data_path and not data_args.validation_split:
        if args.early_stopping_patience is not None or args.load_best_model_at_end:
            raise UserError(
                "early stopping and the best model need validation rows: --validation_split or --eval_data_path"
            )
        args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False
