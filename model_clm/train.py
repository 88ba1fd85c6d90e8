"""Pre-training of a causal language model, from scratch or from a checkpoint, on what prepare.py has written.

    bash train_zero2.sh                                the default corpus, a small Qwen3 from scratch, two processes
    DATA=my_prepared bash train_zero2.sh --config_name llama --hidden_size 512 --num_attention_heads 8
    MODEL=my_model DATA=my_prepared bash train_zero2.sh          goes on with a checkpoint of the same tokenizer
    python train.py config.yaml                        the same flags from a file

The way of the data: shards -> data.Windows (row n is decided by the seed and n) -> windows.WindowSampler (dealt to the
ranks) -> model (tiny.py from scratch, bigram.py its start) -> CLMTrainer (the step, made fast by fast_path.py, measured
in bits per byte) -> report.
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
from transformers import IntervalStrategy, ProgressCallback, set_seed

from arguments import PADDED_ATTENTION
from callbacks import EarlyStopping, SpeedProgress
from checkpoint import (
    RUN_FILE,
    explain_write_errors,
    find_checkpoint,
    hash_model_files,
    is_complete,
    lock_output_dir,
    share_weights,
    step_of,
)
from clm_arguments import CLM_DECIDES, CLMArguments, parse_arguments
from clm_trainer import CLMFastPath, CLMTrainer, continue_texts
from data import Windows, verify
from model import check_model, load_model, load_tokenizer
from report import measure_use, print_run_summary, save_report
from rows import UserError
from tiny import SCRATCH, START, scratch_model_folder
from windows import TrainingRows, validation_rows

# What a decay run may have otherwise than the stable run that it goes on from.
DECAY_MAY_CHANGE = ("max_steps", "num_train_epochs", "decay_steps", "decay_from")


def describe_run(model_args, data_args, args, windows) -> dict:
    """What must be the same for a checkpoint to be continued bit for bit."""
    training_flags = args.to_dict()
    if isinstance(args.deepspeed, str):  # else it came from a YAML file
        training_flags["deepspeed"] = json.loads(Path(args.deepspeed).read_text())
    run = {
        "model": model_args.model_name_or_path,
        "model's files": hash_model_files(model_args.model_name_or_path),
        "data": [shard["sha256"] for source in windows.manifest["sources"].values() for shard in source["shards"]],
        "processes": args.world_size,
        "attn_implementation": model_args.attn_implementation,
        **{name: getattr(data_args, name) for name in ("mixture", "model_max_length", "document_mask")},
        **{name: training_flags[name] for name in (*CLM_DECIDES, "decay_from")},
    }
    return json.loads(json.dumps(run))  # as it will be read again


def start_of_decay(args, run: dict) -> str:
    """The checkpoint of a stable run from which this run decays.

    Raises:
        UserError: it is none, or of a run that differs from this one in more than the decay.
    """
    checkpoint = Path(args.decay_from)
    if not is_complete(checkpoint):
        raise UserError(f"--decay_from {checkpoint}: is no complete checkpoint. Give one of a stable run's folder.")
    stable = json.loads((checkpoint.parent / RUN_FILE).read_text())
    changed = [
        f"{name} was {stable.get(name)}, is {value}"
        for name, value in run.items()
        if name not in DECAY_MAY_CHANGE and stable.get(name) != value
    ]
    if changed:
        raise UserError(f"--decay_from {checkpoint}: is of another run: {'; '.join(changed)}. Give the flags of that.")
    return str(checkpoint)


def open_data(data_args, args) -> tuple[Windows, dict]:
    """The windows to train on and the validation rows by source; without any, the validation is left out.

    Raises:
        UserError: a shard changed since it was prepared, or a flag needs a validation that is not there.
    """
    folders = [f"{data_args.data_path}/{split}" for split in ("train", "validation")]
    for folder in folders if args.local_process_index == 0 else []:  # each machine has a copy of its own
        verify(folder)
    windows = Windows(folders[0], data_args.model_max_length, args.seed, data_args.mixture)
    validation = validation_rows(folders[1], data_args.model_max_length, args.eval_stride)
    if not validation:
        if args.early_stopping_patience is not None or args.load_best_model_at_end:
            raise UserError(
                "early stopping and the best model need held-out texts: prepare.py --validation_split or "
                "--validation_path"
            )
        args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False
    return windows, validation


def check_schedule(trainer) -> list[str]:
    """What there is to say about the planned steps; a warm-up that would be all of them is left out.

    Raises:
        UserError: the learning rate would be 0 throughout, by a warm-up that was asked for.
    """
    args, messages = trainer.args, []
    *_, steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    if steps == 1 and args.get_warmup_steps(steps) > 0 and args.lr_scheduler_type != "constant":
        if args.warmup_steps != CLMArguments.warmup_steps:
            raise UserError(
                f"--warmup_steps {args.warmup_steps:g}: the run has a single step, and the learning rate of the first "
                "step of a warm-up is 0. Leave it out."
            )
        args.warmup_steps = 0
        messages.append("no warm-up: the run has a single step, whose learning rate it would make 0")
    return messages


def add_callbacks(trainer, remove_padding: bool, tokens_per_epoch: int) -> None:
    """What the Trainer calls on its way: the fast path, the progress, early stopping."""
    args = trainer.args
    if args.fast_path:
        trainer.add_callback(CLMFastPath(trainer, remove_padding))
    if not args.disable_tqdm:  # else the Trainer prints its log
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(SpeedProgress(tokens_per_epoch))
    if args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(args.early_stopping_patience))


def prepare_model(model_args, data_args, tokenizer, args) -> tuple[float, list[str]]:
    """Checks the model's folder, or builds it; the seconds of its bigram start, and what there is to say of it."""
    if model_args.model_name_or_path != SCRATCH:
        check_model(model_args, data_args.data_path, tokenizer, data_args.model_max_length)
        return 0.0, []
    model_args.model_name_or_path = scratch_model_folder(model_args, data_args, tokenizer, args.seed, args.device)
    seconds = json.loads(Path(model_args.model_name_or_path, START).read_text())["bigram_seconds"]
    said = f"starts as a bigram model of the corpus, fitted in {seconds:.1f} s" if seconds else "starts at random"
    return seconds, [said]


def finish(trainer, tokenizer, summary: dict, seconds: float, first_step: int) -> None:
    """Samples of what the model writes, and the report; all ranks take part."""
    steps = trainer.state.global_step - first_step
    tokens = summary["tokens"] * trainer.state.epoch * steps / trainer.state.global_step
    texts = []
    if trainer.eval_dataset is not None:
        texts = continue_texts(trainer, tokenizer, trainer.args.samples, trainer.train_dataset.windows.length)
    mfu = measure_use(trainer, tokens / seconds)
    if trainer.args.process_index == 0:
        share_weights(Path(trainer.args.output_dir))
        print(json.dumps(save_report(trainer, summary, seconds, steps, mfu, texts), indent=2))
        for text in texts:
            print(f"{text['prompt']}⟦{text['continuation']}⟧")


def main():
    model_args, data_args, args = parse_arguments()
    with explain_write_errors(args.output_dir):
        train(model_args, data_args, args)


def train(model_args, data_args, args) -> None:
    """The run, from the shards to the report."""
    is_main_process = args.process_index == 0
    lock = lock_output_dir(args.output_dir) if is_main_process else None
    set_seed(args.seed)

    tokenizer = load_tokenizer(data_args.data_path)
    windows, validation = open_data(data_args, args)
    model_name = model_args.model_name_or_path
    bigram_seconds, said_of_it = prepare_model(model_args, data_args, tokenizer, args)
    if args.decay_from is not None:
        args.max_steps = step_of(args.decay_from.rstrip("/")) + int(args.decay_steps)
    found = [None, False, []]
    if is_main_process:
        run = describe_run(model_args, data_args, args, windows)
        found = list(find_checkpoint(args.output_dir, run, args.overwrite_output_dir))
        if found[0] is None and not found[1] and args.decay_from is not None:
            found[0] = start_of_decay(args, run)
    checkpoint, finished, messages = broadcast_object_list(found)
    if finished:
        return print(*messages) if is_main_process else None
    args.eval_on_start &= checkpoint is None  # a resumed run measured it before its first step
    model = load_model(model_args, args)
    messages += said_of_it
    if args.torch_compile:
        messages.append("compiled: the plain step, without the fast path")

    trainer = CLMTrainer(
        model=model,
        args=args,
        train_dataset=TrainingRows(windows),
        eval_dataset=validation or None,
        processing_class=tokenizer,
        document_mask=data_args.document_mask,
    )
    tokens = sum(source["tokens"] - 1 for source in windows.manifest["sources"].values())
    summary = {"tokens": tokens, "validation": validation, "mixture": data_args.mixture}
    summary["bigram_seconds"] = bigram_seconds
    add_callbacks(trainer, model_args.attn_implementation not in PADDED_ATTENTION, tokens)
    messages += check_schedule(trainer)
    if is_main_process:
        print_run_summary(trainer, tokenizer, model_name, summary, messages)

    transformers.utils.logging.disable_progress_bar()  # of each checkpoint's files, in the midst of the one that counts
    # DeepSpeed's, at every save (pytorch#186124, accelerate#4269)
    warnings.filterwarnings("ignore", message=".torch.distributed.* is deprecated")
    output = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = output.metrics["train_runtime"] - trainer.evaluation_seconds
    trainer.evaluate_at_the_end()
    trainer.save_model()
    trainer.save_state()
    finish(trainer, tokenizer, summary, seconds, step_of(checkpoint) if checkpoint else 0)
    if is_main_process:
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
