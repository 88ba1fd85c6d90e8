"""The flags of train.py, and what each of Transformers' means to a run."""

import os
from dataclasses import MISSING, dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import IntervalStrategy

from flags import parse_flags
from model import ASPECT_RATIOS
from rows import UserError
from tiny import SAMPLE_DATA

# Attention that sees only what its mask lets it see: it needs padded batches.
PADDED_ATTENTION = ("eager", "sdpa", "flex_attention")

# What Transformers' flags mean to a run. These decide its numbers: with another value a checkpoint is another run's.
DECIDES_THE_NUMBERS = (
    *("seed", "full_determinism", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"),
    *("max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm"),
    *("optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("bf16", "fp16", "tf32", "neftune_noise_alpha", "use_liger_kernel", "liger_kernel_config", "use_cpu"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "deepspeed", "fsdp", "fsdp_config"),
    *("ddp_backend", "ddp_bucket_cap_mb", "fast_path", "projector_learning_rate", "vision_learning_rate"),
)

# These say what is reported, measured, saved and how it is run, and may change where a run goes on.
FREE = (
    *("output_dir", "overwrite_output_dir", "run_name", "project", "report_to", "disable_tqdm", "debug"),
    *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_on_each_node"),
    *("log_level", "log_level_replica", "include_num_input_tokens_seen", "skip_memory_metrics"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "push_to_hub", "hub_token", "hub_revision"),
    *("hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
    *("early_stopping_patience", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("save_strategy", "save_steps", "save_on_each_node", "save_total_limit", "torch_empty_cache_steps"),
    *("dataloader_num_workers", "dataloader_pin_memory", "ddp_find_unused_parameters", "ddp_broadcast_buffers"),
    *("ddp_static_graph", "ddp_timeout", "local_rank", "do_train", "do_eval"),
    "gradient_checkpointing",  # the name that everybody types, handed on as activation_checkpointing
)

TRAIN_TYPES = ("use_lora", "none", "freeze_vision", "projector")

# These would change nothing here, or not what their names say.
BATCHES = "rows are assigned to steps and ranks by their tokens"
VALIDATION = "the validation measures the loss and nothing else, as it is trained on"
NOT_TAKEN = {
    "label_smoothing_factor": "the loss is SFTTrainer.loss_of_logits",
    "label_names": "the labels are made of the conversations",
    "data_seed": "--seed decides the order of the rows too",
    "dataloader_drop_last": "every row is trained on",
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
    "ignore_data_skip": "a run that goes on would see its first rows again",
    "restore_callback_states_from_checkpoint": "early stopping goes on counting by itself",
    "save_only_model": "a run can't go on from such a checkpoint; the model is saved at the end",
    "enable_jit_checkpoint": "what is written in a hurry is no complete checkpoint; lower --save_steps",
    "auto_find_batch_size": "set --per_device_train_batch_size, and --gradient_accumulation_steps to make up for it",
    "average_tokens_across_devices": "the loss is always the mean over the tokens of all processes",
    "use_cache": "a training step has no use for a cache",
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


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        default="tiny", metadata={"help": "Folder or hub id of a LLaVA; 'tiny' builds a small one on the spot."}
    )
    train_type: str | None = field(
        default=None,
        metadata={
            "help": "projector: it alone (stage 1); freeze_vision: projector and language model (stage 2, default); "
            "use_lora: projector, and adapters in the language model; none: nothing is frozen."
        },
    )
    use_lora: bool = field(default=False, metadata={"help": "The same as --train_type use_lora."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapters. Raise it for a task far from the base."})
    lora_alpha: int = field(default=16, metadata={"help": "Adapters are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout on the adapters' input; 0 for much data."})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Layers that get an adapter, e.g. q_proj v_proj. Fewer of them need less memory."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "sdpa or eager train on padded batches; flash_attention_2 is taken where it is."},
    )
    image_aspect_ratio: str | None = field(
        default=None,
        metadata={
            "help": "pad, crop or squash makes pictures square, kept in the processor; else as it does by itself."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code that comes with the model. Only if you have read it."}
    )

    def __post_init__(self):
        if self.train_type not in (None, *TRAIN_TYPES):
            raise UserError(f"--train_type {self.train_type}: give one of {', '.join(TRAIN_TYPES)}.")
        if self.image_aspect_ratio not in (None, *ASPECT_RATIOS):
            raise UserError(f"--image_aspect_ratio {self.image_aspect_ratio}: give one of {', '.join(ASPECT_RATIOS)}.")
        if self.use_lora and self.train_type not in (None, "use_lora"):
            raise UserError(f"--use_lora true contradicts --train_type {self.train_type}; give one of them.")
        self.train_type = "use_lora" if self.use_lora else self.train_type or "freeze_vision"
        self.use_lora = self.train_type == "use_lora"


@dataclass
class DataArguments:
    data_path: str = field(
        default=SAMPLE_DATA,
        metadata={
            "help": "A file or a folder of conversations with pictures, or http://... of web_dataset_backend.py."
        },
    )
    eval_data_path: str | None = field(
        default=None, metadata={"help": "Validation rows; without it validation_split is cut off the data."}
    )
    validation_split: float | None = field(
        default=None, metadata={"help": "Share of data_path to validate on; 0.05 unless given, 0 for none."}
    )
    model_max_length: int = field(
        default=2048, metadata={"help": "Tokens of a conversation; a longer one loses its oldest exchanges."}
    )
    packing: bool = field(
        default=False, metadata={"help": "Fill bins of model_max_length tokens; the batch size then counts bins."}
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Go on without rows that can't be trained on; bad_rows.jsonl lists them."}
    )
    feature_cache_gb: float = field(
        default=10.0,
        metadata={
            "help": "What a frozen tower's features may take on the disk; where it isn't enough, or 0, no cache."
        },
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    output_dir: str = field(default="output", metadata={"help": "Checkpoints, the model and the report."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start afresh where output_dir holds checkpoints, which are removed."}
    )
    bf16: bool | None = field(default=None, metadata={"help": "bf16; by default where the GPU has it."})
    learning_rate: float = field(
        default=1e-4, metadata={"help": "1e-3 for the projector alone, 1e-4 to 4e-4 for LoRA, 2e-5 for all weights."}
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "The projector's own; beside LoRA's 2e-4 LLaVA gives it 2e-5."}
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "The tower's own, with --train_type none: a tenth of the others' or less."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps, or below 1 the share of all steps."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two points of the loss curve."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "True hides a loss that is not a number."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When the validation loss is measured."})
    eval_on_start: bool = field(default=True, metadata={"help": "Measure the validation loss before the first step."})
    save_strategy: str = field(default="epoch", metadata={"help": "When a checkpoint is written."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept: the newest and the best."})
    metric_for_best_model: str | None = field(default="loss", metadata={"help": "What the best checkpoint is best in."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better validation loss."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=True, metadata={"help": "Experts and indexers may be left without a gradient by a step's tokens."}
    )
    fast_path: bool = field(
        default=Path(__file__).with_name("fast_path.py").exists(),
        metadata={"help": "False trains by the plain step of trainer.py alone; the loss is the same."},
    )
    dataloader_num_workers: int | None = field(
        default=None, metadata={"help": "Processes a rank that decode pictures; by default up to 8 beside a GPU, or 0."}
    )
    report_to: str = field(default="none", metadata={"help": "tensorboard, wandb, swanlab ... where installed."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Left to the collator here."})

    def __post_init__(self):
        for name, reason in NOT_TAKEN.items():
            of = self.__dataclass_fields__[name]
            if getattr(self, name) != (of.default_factory() if of.default is MISSING else of.default):
                raise UserError(f"--{name} is not taken: {reason}.")
        if self.dataloader_num_workers is None:
            share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            self.dataloader_num_workers = min(8, share) if torch.cuda.is_available() and not self.use_cpu else 0
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


def parse_arguments() -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Flags, or a YAML file of them, which flags may follow.

    Raises:
        UserError: a flag that is unknown, or that has no effect together with the others.
    """
    model_args, data_args, args = parse_flags(ModelArguments, DataArguments, TrainingArguments)
    refuse_flags_without_effect(model_args, data_args, args)
    if data_args.validation_split is None:
        data_args.validation_split = 0.05
    refuse_validation_without_rows(data_args, args)
    return model_args, data_args, args


def refuse_validation_without_rows(data_args, args) -> None:
    """Leaves out the validation where there are no rows for it; raises UserError where a flag needs it."""
    if not data_args.eval_data_path and not data_args.validation_split:
        if args.early_stopping_patience is not None or args.load_best_model_at_end:
            raise UserError(
                "early stopping and the best model need validation rows: --validation_split or --eval_data_path"
            )
        args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False


def refuse_flags_without_effect(model_args, data_args, args) -> None:
    """Raises UserError for a flag that would change nothing here, or not what its name says."""
    defaults = type(model_args)()
    for name in ("lora_r", "lora_alpha", "lora_dropout", "target_modules"):
        if not model_args.use_lora and getattr(model_args, name) != getattr(defaults, name):
            raise UserError(f"--{name} has no effect without --train_type use_lora.")
    if model_args.train_type != "none" and args.vision_learning_rate is not None:
        raise UserError("--vision_learning_rate has no effect without --train_type none, which trains the tower.")
    if model_args.train_type == "none" and data_args.feature_cache_gb != type(data_args).feature_cache_gb:
        raise UserError("--feature_cache_gb has no effect with --train_type none: the tower's features change.")
    if data_args.eval_data_path and data_args.validation_split is not None:
        raise UserError("--validation_split has no effect with --eval_data_path; give one of them.")
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        name = "num_train_epochs" if args.max_steps else "max_steps"
        raise UserError(f"--{name} {getattr(args, name):g}: nothing would be trained.")
    if data_args.packing and model_args.attn_implementation in PADDED_ATTENTION:
        raise UserError(f"--packing true has no effect with --attn_implementation {model_args.attn_implementation}.")
    if args.torch_compile:  # a row without padding has another shape at every step
        args.fast_path = False
    if data_args.packing and not args.fast_path:
        raise UserError(
            "--packing true needs the fast path, which --fast_path false or --torch_compile true leaves out."
        )
