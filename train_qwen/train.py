"""Supervised fine-tuning of a Qwen chat model (or any other with a chat template), full or by LoRA.

    bash train.sh                                  one process
    bash train_zero2.sh                            DeepSpeed ZeRO-2 on all GPUs, or on 2 CPU processes
    MODEL=Qwen/Qwen2.5-7B-Instruct DATA=my_data bash train_zero2.sh --num_train_epochs 1
    python train.py config.yaml                    the same flags from a file

The way of the data: files -> data.load_splits (labels on the assistant's words only) -> batch (assigned to the ranks by
tokens) -> model -> SFTTrainer (the plain step, which fast_path.py makes fast where the loss stays the same) -> report.
"""

import gc
import json
import os
import sys
import warnings
from pathlib import Path

import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import ProgressCallback, set_seed

from arguments import DECIDES_THE_NUMBERS, PADDED_ATTENTION, TrainingArguments, parse_arguments
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
from infer import find_base_model
from lora import describe_adapters
from model import check_model, check_vocabulary, load_model, load_tokenizer, mend_generation_config
from report import print_run_summary, save_report
from rows import UserError
from tiny import tiny_model_folder
from trainer import SFTTrainer

# Steps x learning rate from which LoRA takes over a new identity out of 100 rows, measured on small models.
LORA_TAKES_HOLD = 0.05


def describe_run(model_args, data_args, args, summary: dict) -> dict:
    """What must be the same for a checkpoint to be continued bit for bit."""
    model_flags = ("use_lora", "lora_r", "lora_alpha", "lora_dropout", "target_modules", "attn_implementation")
    model, training_flags = model_args.model_name_or_path, args.to_dict()
    if isinstance(args.deepspeed, str):  # else it came from a YAML file
        training_flags["deepspeed"] = json.loads(Path(args.deepspeed).read_text())
    run = {
        "model": model,
        "model's files": " ".join(map(hash_model_files, filter(None, (model, find_base_model(model))))),
        "data": summary["content_hash"],
        "validation rows": summary["validation_rows"],
        "processes": args.world_size,
        "packing": data_args.packing,
        **{name: getattr(model_args, name) for name in model_flags},
        **{name: training_flags[name] for name in DECIDES_THE_NUMBERS},
    }
    return json.loads(json.dumps(run))  # as it will be read again


def check_schedule(trainer, use_lora: bool) -> list[str]:
    """What there is to say about the planned steps; a warm-up that would be all of them is left out.

    Raises:
        UserError: the learning rate would be 0 throughout, by a warm-up that was asked for.
    """
    args, messages = trainer.args, []
    if args.torch_compile:
        messages.append("compiled: the plain step, without the fast path")
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


def add_callbacks(trainer, remove_padding: bool, tokens_per_epoch: int) -> None:
    """What the Trainer calls on its way: the fast path, the progress, early stopping."""
    args = trainer.args
    if args.fast_path:
        from fast_path import FastPath

        trainer.add_callback(FastPath(trainer, remove_padding))
    if not args.disable_tqdm:  # else the Trainer prints its log
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(SpeedProgress(tokens_per_epoch))
    if args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(args.early_stopping_patience))


def estimate_memory(config, train_dataset, model_args, data_args, args) -> None:
    """What --estimate true prints."""
    from estimate import make_plan, print_estimate

    path_class = None
    if args.fast_path:
        from fast_path import FastPath as path_class
    print_estimate(config, train_dataset, make_plan(model_args, data_args, args), path_class)


def train(model_args, data_args, args) -> None:
    """The run, from the files to the report."""
    is_main_process = args.process_index == 0
    writes = is_main_process and not model_args.estimate  # which may be asked for beside a run
    lock = lock_output_dir(args.output_dir) if writes else None
    set_seed(args.seed)

    model_name = model_args.model_name_or_path
    if model_name == "tiny":
        model_args.model_name_or_path = tiny_model_folder(data_args.data_path)
    config = check_model(model_args, data_args.model_max_length)
    tokenizer = load_tokenizer(model_args)
    check_vocabulary(model_args.model_name_or_path, tokenizer, config)
    bad_rows_file = f"{args.output_dir}/bad_rows.jsonl" if writes else None
    train_dataset, eval_dataset, summary = load_splits(data_args, tokenizer, args.seed, bad_rows_file)
    if model_args.estimate:
        return estimate_memory(config, train_dataset, model_args, data_args, args) if is_main_process else None
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
    messages += describe_adapters(model, model_args)

    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        packing=data_args.model_max_length if data_args.packing else None,
    )
    add_callbacks(trainer, model_args.attn_implementation not in PADDED_ATTENTION, summary["tokens"])
    messages += check_schedule(trainer, model_args.use_lora)
    if is_main_process:
        print_run_summary(trainer, tokenizer, model_name, summary, messages)

    transformers.utils.logging.disable_progress_bar()  # of each checkpoint's files, in the midst of the one that counts
    # DeepSpeed's, at every save (pytorch#186124, accelerate#4269)
    warnings.filterwarnings("ignore", message=".torch.distributed.* is deprecated")
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
