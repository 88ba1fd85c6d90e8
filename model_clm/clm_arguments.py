"""The flags of train.py: the model from scratch or a checkpoint, the prepared data, the training."""

from dataclasses import dataclass, field

from transformers import SchedulerType

import arguments
from arguments import DECIDES_THE_NUMBERS
from data import parse_mixture
from flags import RENAMED, parse_flags
from rows import UserError
from tiny import CONFIGS, SAMPLE_DATA, SCRATCH

WSD = SchedulerType.WARMUP_STABLE_DECAY

# With another value of these, too, a checkpoint is another run's.
CLM_DECIDES = (*DECIDES_THE_NUMBERS, "z_loss", "decay_steps", "embedding_learning_rate", "head_learning_rate")

# Flags of the older script.
RENAMED |= {
    "use_streaming": "left out: training always reads what prepare.py has written, in memory that doesn't grow",
    "data_num_limit": "prepare.py's --data_num_limit",
    "data_proc_num": "prepare.py's --data_proc_num",
    "eval_data_path": "part of --data_path: prepare.py splits the validation documents off",
    "validation_split": "prepare.py's: it splits by document",
    "preprocessing_num_workers": "prepare.py's --data_proc_num",
    "block_size": "--model_max_length",
    "config_overrides": "--hidden_size, --num_hidden_layers, --num_attention_heads ...",
}


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        default=SCRATCH,
        metadata={"help": f"Folder or hub id of a causal LM to go on with; '{SCRATCH}' builds one of the sizes below."},
    )
    config_name: str = field(default="qwen3", metadata={"help": f"Its class: {', '.join(CONFIGS)}."})
    hidden_size: int = field(default=192, metadata={"help": "Width of its stream."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Its blocks."})
    num_attention_heads: int = field(default=6, metadata={"help": "Its heads, which share the width."})
    num_key_value_heads: int | None = field(default=None, metadata={"help": "Fewer than the heads: GQA."})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "Width of its MLPs; 8/3 of the width with a gate, else 4 times it."}
    )
    tie_word_embeddings: bool = field(default=False, metadata={"help": "One matrix for table and head."})
    bigram_start: bool | None = field(
        default=None, metadata={"help": "Begin as a bigram model of the corpus; by default where the head is untied."}
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
    data_path: str = field(default=SAMPLE_DATA, metadata={"help": "A folder that prepare.py has written."})
    mixture: str | None = field(
        default=None, metadata={"help": "Shares of the rows by source, news=0.8,idioms=0.2; by default by their sizes."}
    )
    model_max_length: int = field(default=1024, metadata={"help": "Tokens of a row."})
    document_mask: bool = field(
        default=False, metadata={"help": "Attention ends where a document does; else a row is read as one text."}
    )


@dataclass
class CLMArguments(arguments.TrainingArguments):
    learning_rate: float = field(default=1e-3, metadata={"help": "About 3e-3 for 5 million weights, 3e-4 for 1e9."})
    embedding_learning_rate: float | None = field(default=None, metadata={"help": "Another rate for the table."})
    head_learning_rate: float | None = field(default=None, metadata={"help": "Another rate for the head."})
    weight_decay: float = field(default=0.1, metadata={"help": "Of matrices; vectors have none."})
    adam_beta2: float = field(default=0.95, metadata={"help": "How long the optimizer remembers a gradient's size."})
    decay_steps: float | None = field(
        default=None,
        metadata={"help": "Steps, or below 1 the share, in which warmup_stable_decay falls to 0; 0: it stays stable."},
    )
    decay_from: str | None = field(
        default=None, metadata={"help": "A checkpoint of a stable run: takes --decay_steps from there in a new folder."}
    )
    z_loss: float = field(default=0.0, metadata={"help": "Weight of log(Z)^2, which holds the logits near 0; 1e-4."})
    eval_stride: int | None = field(
        default=None, metadata={"help": "New tokens of a validation row, the rest is context; by default all."}
    )
    eval_strategy: str = field(
        default="no", metadata={"help": "When the validation is measured, besides the start and the end."}
    )
    save_strategy: str = field(default="steps", metadata={"help": "When a checkpoint is written."})
    samples: int = field(default=4, metadata={"help": "Continuations of validation texts in the report."})


def parse_arguments() -> tuple[ModelArguments, DataArguments, CLMArguments]:
    """Flags, or a YAML file of them, which flags may follow; `data_args.mixture` is then a dictionary or None.

    Raises:
        UserError: a flag that is unknown, or that has no effect together with the others.
    """
    model_args, data_args, args = parse_flags(ModelArguments, DataArguments, CLMArguments)
    check_model_flags(model_args)
    check_schedule_flags(args)
    if data_args.mixture is not None:
        data_args.mixture = parse_mixture(data_args.mixture)
    if data_args.model_max_length < 2:
        raise UserError(f"--model_max_length {data_args.model_max_length}: a row needs a token and one to predict.")
    if args.eval_stride is not None and not 0 < args.eval_stride < data_args.model_max_length:
        raise UserError(f"--eval_stride {args.eval_stride}: from 1 to --model_max_length - 1.")
    if args.z_loss < 0:
        raise UserError(f"--z_loss {args.z_loss:g}: 0 or more, such as 1e-4.")
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        name = "num_train_epochs" if args.max_steps else "max_steps"
        raise UserError(f"--{name} {getattr(args, name):g}: nothing would be trained.")
    if args.torch_compile:  # a row without padding has another shape at every step
        args.fast_path = False
    return model_args, data_args, args


def check_model_flags(model_args: ModelArguments) -> None:
    """Raises UserError for sizes that a checkpoint brings along, or that fit no model."""
    if model_args.model_name_or_path != SCRATCH:
        defaults = ModelArguments()
        for name in (*SIZES, "config_name", "tie_word_embeddings", "bigram_start"):
            if getattr(model_args, name) != getattr(defaults, name):
                raise UserError(f"--{name} has no effect with --model_name_or_path: the checkpoint decides.")
        return
    if model_args.config_name not in CONFIGS:
        raise UserError(f"--config_name {model_args.config_name}: known are {', '.join(CONFIGS)}.")
    if model_args.hidden_size % (2 * model_args.num_attention_heads):
        raise UserError(
            f"--hidden_size {model_args.hidden_size}: must be a multiple of 2 x --num_attention_heads "
            f"{model_args.num_attention_heads}."
        )
    if model_args.config_name in ("gpt2", "bloom") and model_args.num_key_value_heads is not None:
        raise UserError(f"--num_key_value_heads has no effect with --config_name {model_args.config_name}.")
    if model_args.config_name == "bloom" and model_args.intermediate_size is not None:
        raise UserError("--intermediate_size has no effect with --config_name bloom, whose MLPs are 4 times as wide.")
    if model_args.bigram_start and model_args.tie_word_embeddings:
        raise UserError(
            "--bigram_start true: one matrix for table and head (--tie_word_embeddings true) makes what follows a "
            "token look like the token itself. Leave one of the two out."
        )
    if model_args.bigram_start is None:
        model_args.bigram_start = not model_args.tie_word_embeddings


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def check_schedule_flags(args: CLMArguments) -> None:
    """Raises UserError where the flags of the decay contradict each other; sets the steps of a decay run."""
    for name in ("decay_steps", "decay_from"):
        if getattr(args, name) is not None and args.lr_scheduler_type != WSD:
            raise UserError(f"--{name} has no effect without --lr_scheduler_type warmup_stable_decay.")
    if args.lr_scheduler_type != WSD:
        return
    if args.decay_steps is None:
        args.decay_steps = 0.2
    if args.decay_from is not None:
        if args.decay_steps < 1 or args.decay_steps % 1:
            raise UserError(f"--decay_steps {args.decay_steps:g}: with --decay_from, the number of its steps.")
        if args.max_steps > 0:
            raise UserError("--max_steps has no effect with --decay_from: the run ends after --decay_steps.")
