"""The flags of train.py beside those of arguments.py."""

from dataclasses import dataclass, field

import arguments
from arguments import DECIDES_THE_NUMBERS, refuse_flags_without_effect
from flags import parse_flags
from preference_loss import LOSS_TYPES, WITHOUT_REFERENCE
from rows import UserError
from tiny import SAMPLE_DATA

# With another value of these, too, a checkpoint is another run's; whether the reference is computed before is not.
DPO_DECIDES = (*DECIDES_THE_NUMBERS, "beta", "loss_type", "label_smoothing", "rpo_alpha", "simpo_gamma")


@dataclass
class ModelArguments(arguments.ModelArguments):
    lora_dropout: float = field(default=0.0, metadata={"help": "0: with dropout policy and reference would differ."})


@dataclass
class DataArguments(arguments.DataArguments):
    data_path: str = field(default=SAMPLE_DATA, metadata={"help": "A file or a folder of preference pairs."})
    model_max_length: int = field(
        default=2048,
        metadata={"help": "Tokens of a prompt and a reply; a longer reply is cut.", "aliases": ["--max_length"]},
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Tokens of a prompt; a longer one loses its oldest exchanges."}
    )


@dataclass
class DPOArguments(arguments.TrainingArguments):
    learning_rate: float = field(default=5e-6, metadata={"help": "5e-7 to 5e-6, for LoRA 5e-6 to 5e-5."})
    beta: float = field(default=0.1, metadata={"help": "How dear it is to leave the reference; simpo wants 2 to 10."})
    loss_type: str = field(default="sigmoid", metadata={"help": f"One of {', '.join(LOSS_TYPES)}."})
    label_smoothing: float = field(
        default=0.0, metadata={"help": "The share of pairs that may be the wrong way round (sigmoid, robust)."}
    )
    simpo_gamma: float = field(default=0.5, metadata={"help": "The margin that simpo asks for."})
    rpo_alpha: float = field(
        default=0.0, metadata={"help": "Weight of the chosen replies' cross-entropy, a mean over their tokens."}
    )
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={"help": "Before the first step, once for all; by default unless a new adapter sees each pair once."},
    )


def parse_arguments() -> tuple[ModelArguments, DataArguments, DPOArguments]:
    """Flags, or a YAML file of them, which flags may follow.

    Raises:
        UserError: a flag that is unknown, or that has no effect together with the others.
    """
    model_args, data_args, args = parse_flags(ModelArguments, DataArguments, DPOArguments)
    refuse_flags_without_effect(model_args, data_args, args)
    refuse_losses_that_mean_nothing(args)
    if model_args.lora_dropout:
        raise UserError("--lora_dropout: policy and reference would differ before the first step. Leave it at 0.")
    if data_args.packing:
        raise UserError("--packing has no effect: the pairs of a batch share a row. Raise the batch size.")
    if args.loss_type == "sft":
        args.rpo_alpha = 1.0
    if data_args.validation_split is None:
        data_args.validation_split = 0.05
    arguments.refuse_validation_without_rows(data_args, args)
    return model_args, data_args, args


def refuse_losses_that_mean_nothing(args: DPOArguments) -> None:
    """Raises UserError where a flag has no effect with this loss, or makes none of it."""
    loss = f"--loss_type {args.loss_type}"
    if args.loss_type not in LOSS_TYPES:
        raise UserError(f"{loss}: known are {', '.join(LOSS_TYPES)}.")
    if args.beta <= 0:
        raise UserError(f"--beta {args.beta:g}: must be above 0.")
    if args.label_smoothing and args.loss_type not in ("sigmoid", "robust"):
        raise UserError(f"--label_smoothing has no effect with {loss}; sigmoid and robust take it.")
    if not 0 <= args.label_smoothing < 0.5:
        raise UserError(f"--label_smoothing {args.label_smoothing:g}: from 0 to below 0.5, where nothing is preferred.")
    if args.simpo_gamma != DPOArguments.simpo_gamma and args.loss_type != "simpo":
        raise UserError(f"--simpo_gamma has no effect with {loss}.")
    if args.rpo_alpha and args.loss_type == "sft":
        raise UserError("--rpo_alpha has no effect with --loss_type sft, which is that term alone.")
    if args.precompute_ref_log_probs and args.loss_type in WITHOUT_REFERENCE:
        raise UserError(f"--precompute_ref_log_probs has no effect with {loss}, which has no reference.")


def decide_precomputing(args: DPOArguments, adapter_is_new: bool) -> None:
    """Sets `precompute_ref_log_probs` where it was not given.

    Raises:
        UserError: it was switched off where the reference is only to be had before the first step.
    """
    if args.precompute_ref_log_probs is None:
        args.precompute_ref_log_probs = not adapter_is_new or args.num_train_epochs > 1
    elif not args.precompute_ref_log_probs and not adapter_is_new and args.loss_type not in WITHOUT_REFERENCE:
        raise UserError(
            "--precompute_ref_log_probs false: the reference is the model before the first step, and later only a new "
            "adapter (--use_lora true) can be taken off again. Leave the flag out."
        )
