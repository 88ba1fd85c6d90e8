"""Supervised fine-tuning of a Qwen chat model (or any other with a chat template), full or by LoRA.

    bash train.sh                                  one process
    bash train_zero2.sh                            DeepSpeed ZeRO-2 on all GPUs, or on 2 CPU processes
    MODEL=Qwen/Qwen2.5-7B-Instruct DATA=my_data bash train_zero2.sh --num_train_epochs 1
    python train.py config.yaml                    the same flags from a file

The way of the data: files -> data.load_splits (labels on the assistant's words only) -> batch (assigned to
the ranks, padding-free) -> model (attention within a sequence, head on supervised tokens) -> SFTTrainer -> report.
"""

import json
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from accelerate.utils import broadcast_object_list
from transformers import IntervalStrategy, ProgressCallback, set_seed

from callbacks import EarlyStopping, SpeedProgress
from checkpoint import (
    explain_write_errors,
    find_checkpoint,
    hash_model_files,
    lock_output_dir,
    share_weights,
    step_of,
)
from data import load_splits
from flags import parse_flags
from infer import find_base_model
from model import check_model, check_vocabulary, load_model, load_tokenizer, mend_generation_config
from report import print_run_summary, save_report
from rows import UserError
from tiny import tiny_model_folder
from trainer import SFTTrainer

# Attention that sees only what its mask lets it see: it needs padded batches.
PADDED_ATTENTION = ("eager", "sdpa", "flex_attention")

# Transformers' flags that would change nothing here, or not what their names say.
NOT_TAKEN = {
    "label_smoothing_factor": "the loss is the plain cross-entropy",
    "data_seed": "--seed decides the order of the rows too",
    "dataloader_drop_last": "every row is trained on",
    "resume_from_checkpoint": "a run in an --output_dir that holds its checkpoints goes on by itself",
    "auto_find_batch_size": "set --per_device_train_batch_size, and --gradient_accumulation_steps to make up for it",
    "average_tokens_across_devices": "the loss is always the mean over the tokens of all processes",
    "train_sampling_strategy": "examples are assigned by their tokens",
    "prediction_loss_only": "the validation loss is all that is measured",
    "save_only_model": "a run can't go on from such a checkpoint; the model is saved at the end",
    "restore_callback_states_from_checkpoint": "early stopping goes on counting by itself",
    "dataloader_persistent_workers": "--dataloader_num_workers alone is handed on",
    "dataloader_prefetch_factor": "--dataloader_num_workers alone is handed on",
}

# Steps x learning rate from which LoRA takes over a new identity out of 100 rows, measured on small models.
LORA_TAKES_HOLD = 0.05


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        default="tiny", metadata={"help": "Folder or hub id of a causal LM; 'tiny' builds a small one on the spot."}
    )
    use_lora: bool = field(
        default=False, metadata={"help": "Train low-rank adapters and leave the model's own weights as they are."}
    )
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
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code that comes with the model. Only if you have read it."}
    )


@dataclass
class DataArguments:
    data_path: str = field(default="data/custom_data001", metadata={"help": "A file or a folder of conversations."})
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


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    output_dir: str = field(default="output", metadata={"help": "Checkpoints, the model and the report."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start afresh where output_dir holds checkpoints, which are removed."}
    )
    bf16: bool | None = field(default=None, metadata={"help": "bf16; by default where the GPU has it."})
    learning_rate: float = field(default=1e-4, metadata={"help": "1e-4 to 4e-4 for LoRA, about 1e-5 for all weights."})
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
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "All parameters are used here."})
    report_to: str = field(default="none", metadata={"help": "tensorboard, wandb, swanlab ... where installed."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Left to the collator here."})

    # >>> hardware
    def __post_init__(self):
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
    if not data_args.eval_data_path and not data_args.validation_split:
        if args.early_stopping_patience is not None or args.load_best_model_at_end:
            raise UserError(
                "early stopping and the best model need validation rows: --validation_split or --eval_data_path"
            )
        args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False
    return model_args, data_args, args


def refuse_flags_without_effect(model_args, data_args, args) -> None:
    """Raises UserError for a flag that would change nothing here, or not what its name says."""
    defaults = ModelArguments()
    for name in ("lora_r", "lora_alpha", "lora_dropout", "target_modules"):
        if not model_args.use_lora and getattr(model_args, name) != getattr(defaults, name):
            raise UserError(f"--{name} has no effect without --use_lora true.")
    for name, reason in NOT_TAKEN.items():
        if getattr(args, name) != TrainingArguments.__dataclass_fields__[name].default:
            raise UserError(f"--{name} is not taken: {reason}.")
    if data_args.eval_data_path and data_args.validation_split is not None:
        raise UserError("--validation_split has no effect with --eval_data_path; give one of them.")
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        name = "num_train_epochs" if args.max_steps else "max_steps"
        raise UserError(f"--{name} {getattr(args, name):g}: nothing would be trained.")
    if data_args.packing and model_args.attn_implementation in PADDED_ATTENTION:
        raise UserError(f"--packing true has no effect with --attn_implementation {model_args.attn_implementation}.")


def describe_run(model_args, data_args, args, summary: dict) -> dict:
    """What must be the same for a checkpoint to be continued bit for bit."""
    model_flags = ("use_lora", "lora_r", "lora_alpha", "lora_dropout", "target_modules", "attn_implementation")
    training_flags = (
        *("seed", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
        *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "optim"),
        *("optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16", "tf32"),
        *("neftune_noise_alpha", "use_liger_kernel", "full_determinism"),
    )
    model, deepspeed = model_args.model_name_or_path, args.deepspeed or None
    if isinstance(deepspeed, str):  # else it came from a YAML file
        deepspeed = json.loads(Path(deepspeed).read_text())
    run = {
        "model": model,
        "model's files": " ".join(map(hash_model_files, filter(None, (model, find_base_model(model))))),
        "data": summary["content_hash"],
        "validation rows": summary["validation_rows"],
        "processes": args.world_size,
        "deepspeed": deepspeed,
        "packing": data_args.packing,
        **{name: getattr(model_args, name) for name in model_flags},
        **{name: getattr(args, name) for name in training_flags},
    }
    return json.loads(json.dumps(run))  # as it will be read again


def check_schedule(trainer, use_lora: bool) -> list[str]:
    """What there is to say about the planned steps; a warm-up that would be all of them is left out.

    Raises:
        UserError: the learning rate would be 0 throughout, by a warm-up that was asked for.
    """
    args, messages = trainer.args, []
    *_, steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    if steps == 1 and args.get_warmup_steps(steps) > 0 and args.lr_scheduler_type != "constant":
        if args.warmup_steps != TrainingArguments.warmup_steps:
            raise UserError(
                f"--warmup_steps {args.warmup_steps:g}: the run has a single step, and the learning rate of the first "
                "step of a warm-up is 0. Leave it out."
            )
        args.warmup_steps = 0
        messages.append("no warm-up: the run has a single step, whose learning rate it would make 0")
    if use_lora and steps * args.learning_rate < LORA_TAKES_HOLD:
        messages.append(
            f"LoRA may hardly change the answers: steps x learning rate is {steps * args.learning_rate:.2g}, small "
            f"models needed {LORA_TAKES_HOLD} for a new identity. Raise --num_train_epochs or --learning_rate"
        )
    return messages


def main():
    model_args, data_args, args = parse_arguments()
    with explain_write_errors(args.output_dir):
        train(model_args, data_args, args)


def train(model_args, data_args, args) -> None:
    """The run, from the files to the report."""
    is_main_process = args.process_index == 0
    lock = lock_output_dir(args.output_dir) if is_main_process else None
    set_seed(args.seed)

    model_name = model_args.model_name_or_path
    if model_name == "tiny":
        model_args.model_name_or_path = tiny_model_folder(data_args.data_path)
    config = check_model(model_args, data_args.model_max_length)
    tokenizer = load_tokenizer(model_args)
    check_vocabulary(model_args.model_name_or_path, tokenizer, config)
    bad_rows_file = f"{args.output_dir}/bad_rows.jsonl" if is_main_process else None
    train_dataset, eval_dataset, summary = load_splits(data_args, tokenizer, args.seed, bad_rows_file)
    found = [None, False, []]
    if is_main_process:
        run = describe_run(model_args, data_args, args, summary)
        found = list(find_checkpoint(args.output_dir, run, args.overwrite_output_dir))
    checkpoint, finished, messages = broadcast_object_list(found)
    if finished:
        return print(*messages) if is_main_process else None
    args.eval_on_start &= checkpoint is None  # a resumed run measured it before its first step
    model = load_model(model_args, args)
    if not model_args.use_lora:  # an adapter is saved without it
        messages += mend_generation_config(model)

    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        packing=data_args.model_max_length if data_args.packing else None,
        pad=model_args.attn_implementation in PADDED_ATTENTION,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(SpeedProgress(summary["tokens"]))
    if args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(args.early_stopping_patience))
    messages += check_schedule(trainer, model_args.use_lora)
    if is_main_process:
        print_run_summary(trainer, tokenizer, model_name, summary, messages)

    transformers.utils.logging.disable_progress_bar()  # of each checkpoint's files, in the midst of the one that counts
    warnings.filterwarnings("ignore", message=".torch.distributed.* is deprecated")  # DeepSpeed's, at every save
    output = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.evaluate_at_the_end()
    trainer.save_model()
    trainer.save_state()
    if is_main_process:
        share_weights(Path(args.output_dir))
        steps = trainer.state.global_step - (step_of(checkpoint) if checkpoint else 0)
        print(json.dumps(save_report(trainer, summary, output.metrics, steps), indent=2))
        lock.close()
    # >>> end
    # A process that exits while gloo still holds its last tensors can abort (pytorch#190489), and torchrun would
    # then stop the first process in the midst of its report: all wait for it and end together.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)
# <<< end
