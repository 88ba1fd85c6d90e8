"""Contrastive training of an image and a text encoder: one space in which pictures and captions find each other.

    bash train_ddp_text_image.sh                   the default: generated scenes and emojis, plain DDP
    DATA=my_pairs MODEL=OFA-Sys/chinese-clip-vit-base-patch16 bash train_ddp_text_image.sh
    bash train_zero2.sh --cross_embedding sigmoid  DeepSpeed ZeRO-2, SigLIP's loss
    bash train_ddp_ti_all.sh                       every way of --cross_embedding, one after the other
    python train.py config.yaml                    the same flags from a file

The way of the data: files -> data.load_splits (pictures checked, captions tokenised) -> batch (global batches, dealt to
the ranks; pixels) -> model (two towers) -> contrastive (the loss over all ranks) -> CLIPTrainer -> report.
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

from arguments import DECIDES_THE_NUMBERS, TrainingArguments, parse_arguments
from batch import PairCollator, Pixels
from callbacks import EarlyStopping
from checkpoint import (
    explain_write_errors,
    find_checkpoint,
    hash_model_files,
    lock_output_dir,
    share_weights,
    step_of,
)
from data import load_splits
from features import NoPixels, keep_features
from freeze import choose_trained
from model import (
    choose_max_length,
    join_towers,
    load_image_processor,
    load_model,
    load_text_tower,
    load_tokenizer,
    load_vision_tower,
)
from report import print_results, print_run_summary, save_report
from rows import UserError, find_files
from tiny import tiny_model_folder
from trainer import CLIPProgress, CLIPTrainer, start_logit_bias
from zero import without_zero3


def describe_run(model_args, data_args, args, summary: dict) -> dict:
    """What must be the same for a checkpoint to be continued bit for bit."""
    training_flags = args.to_dict()
    if isinstance(args.deepspeed, str):  # else it came from a YAML file
        training_flags["deepspeed"] = json.loads(Path(args.deepspeed).read_text())
    folders = [model_args.model_name_or_path, model_args.text_model_name_or_path, model_args.image_model_name_or_path]
    run = {
        **vars(model_args),
        "model's files": " ".join(map(hash_model_files, filter(None, folders))),
        "data": summary["content_hash"],
        "validation rows": summary["validation_rows"],
        "processes": args.world_size,
        **{name: training_flags[name] for name in DECIDES_THE_NUMBERS},
    }
    return json.loads(json.dumps(run))  # as it will be read again


def check_schedule(trainer) -> list[str]:
    """What there is to say about the planned steps and batches; a warm-up that would be all of them is left out.

    Raises:
        UserError: the learning rate would be 0 throughout, by a warm-up that was asked for; a batch is a single pair;
            the metric of the best model will never be measured.
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
    global_batch = args.per_device_train_batch_size * (1 if args.cross_embedding == "base" else args.world_size)
    if global_batch < 2:
        raise UserError("--per_device_train_batch_size 1: a pair alone has no negatives, and nothing to learn.")
    metric, galleries = args.metric_for_best_model, trainer.eval_dataset or {}
    if galleries and metric != "mean_recall" and metric.rpartition("/")[0] not in galleries:
        raise UserError(
            f"--metric_for_best_model {metric}: there is no such metric; give mean_recall, or one of a gallery, such "
            f"as {next(iter(galleries))}/i2t_r1."
        )
    return messages


def load_processors_of(model_args, data_args) -> tuple:
    """Tokenizer, which knows how long a caption may be, and image processor."""
    model = model_args.model_name_or_path
    tokenizer = load_tokenizer(model or model_args.text_model_name_or_path)
    length = choose_max_length(model or model_args.text_model_name_or_path, tokenizer, data_args.max_seq_length)
    tokenizer.model_max_length = data_args.max_seq_length = length
    return tokenizer, load_image_processor(model or model_args.image_model_name_or_path)


def load_any_model(model_args, args):
    """The model of --model_name_or_path, or one of two encoders; what isn't needed to be trained is frozen later."""
    if model_args.model_name_or_path:
        model = load_model(model_args.model_name_or_path)
    else:
        model = join_towers(
            load_vision_tower(model_args.image_model_name_or_path, model_args.vision_pooling),
            load_text_tower(model_args.text_model_name_or_path, model_args.text_pooling),
            model_args.vision_pooling,
            model_args.text_pooling,
            model_args.projection_dim,
        )
    if args.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise UserError(
            f"--gradient_checkpointing true: {type(model).__name__} has no activation checkpointing. Leave it out."
        )
    return model


def prepare_features(model, model_args, args, dataset, collator, accelerator) -> tuple[dict, list[str]]:
    """The kept features of a frozen tower, by the name under which the model takes them, and what there is to say."""
    tower = model_args.freeze
    if tower == "none" or model_args.unlocked_layers:
        return {}, []
    if args.image_augmentation != "none" and tower == "vision":
        return {}, ["the frozen vision encoder reads each image anew, since --image_augmentation changes it"]
    kept = keep_features(model, tower, dataset, collator, accelerator, args.per_device_eval_batch_size)
    if tower == "vision":
        collator.pixels = NoPixels()
    name = {"vision": "image_features", "text": "text_features"}[tower]
    return {name: kept}, [f"features of the frozen {tower} encoder: {len(kept.vectors):,}, kept in cache_data"]


def build_trainer(model_args, args, processors: tuple, collator: PairCollator, datasets: tuple) -> CLIPTrainer:
    """The trainer of a model that is the same on all ranks.

    Args:
        processors: tokenizer and image processor. datasets: training pairs, and the galleries by name.
    """
    set_seed(args.seed)  # for new projections
    with without_zero3(args):
        model = load_any_model(model_args, args)
        choose_trained(model, model_args, args.cross_embedding, collator.pixels.shape)
    start_logit_bias(model, args.cross_embedding, args.per_device_train_batch_size * args.world_size)
    return CLIPTrainer(
        model=model,
        args=args,
        train_dataset=datasets[0],
        eval_dataset=datasets[1] or None,
        data_collator=collator,
        processing_class=processors[0],
        image_processor=processors[1],
        pixels=collator.pixels,
    )


def main():
    model_args, data_args, args = parse_arguments()
    with explain_write_errors(args.output_dir):
        train(model_args, data_args, args)


def train(model_args, data_args, args) -> None:
    """The run, from the files to the report."""
    is_main_process = args.process_index == 0
    lock = lock_output_dir(args.output_dir) if is_main_process else None
    set_seed(args.seed)

    model_name = model_args.model_name_or_path or (
        f"{model_args.image_model_name_or_path} + {model_args.text_model_name_or_path}"
    )
    find_files(data_args.data_path)  # says that there are none before a hub is asked for a model
    if model_name == "tiny":
        model_args.model_name_or_path = tiny_model_folder(data_args.data_path, data_args.language)
    tokenizer, image_processor = load_processors_of(model_args, data_args)
    bad_rows_file = f"{args.output_dir}/bad_rows.jsonl" if is_main_process else None
    train_dataset, galleries, summary = load_splits(data_args, tokenizer, args.seed, bad_rows_file)
    found = [None, False, []]
    if is_main_process:
        run = describe_run(model_args, data_args, args, summary)
        found = list(find_checkpoint(args.output_dir, run, args.overwrite_output_dir))
    checkpoint, finished, messages = broadcast_object_list(found)
    if finished:
        return print(*messages) if is_main_process else None
    args.eval_on_start &= checkpoint is None  # a resumed run measured it before its first step

    pixels = Pixels(image_processor, data_args.image_cache_gb)
    collator = PairCollator(pixels, tokenizer.pad_token_id, args.image_augmentation, args.seed)
    datasets = train_dataset, galleries
    trainer = build_trainer(model_args, args, (tokenizer, image_processor), collator, datasets)
    accelerator = trainer.accelerator
    trainer.features, said = prepare_features(trainer.model, model_args, args, train_dataset, collator, accelerator)
    messages += said + check_schedule(trainer)
    decoded = [*galleries.values()] if "image_features" in trainer.features else [train_dataset, *galleries.values()]
    if decoded:
        messages.append(pixels.keep(*decoded))
    if not args.disable_tqdm:  # else the Trainer prints its log
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(CLIPProgress(len(train_dataset), "pairs"))
    if args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(args.early_stopping_patience))
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
    if is_main_process:
        share_weights(Path(args.output_dir))
        steps = trainer.state.global_step - (step_of(checkpoint) if checkpoint else 0)
        print_results(save_report(trainer, summary, seconds, steps))
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
