"""Flags of a command line, or of a YAML file by the same rules."""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import argparse
import json
import sys
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from rows import UserError

# Flags of older versions that are still in many scripts.
RENAMED = {
    "evaluation_strategy": "--eval_strategy",
    "use_deepspeed": "--deepspeed ds_zero2_no_offload.json",
    "warmup_ratio": "--warmup_steps, which below 1 is a share of all steps (--warmup_steps 0.03)",
    "no_cuda": "--use_cpu true",
    "source_length": "--model_max_length, the tokens of a whole conversation",
    "target_length": "--model_max_length, the tokens of a whole conversation",
    "per_gpu_train_batch_size": "--per_device_train_batch_size",
    "per_gpu_eval_batch_size": "--per_device_eval_batch_size",
    "torch_dtype": "--bf16 true or --fp16 true",
    "fp16_opt_level": "--fp16 true",
}


def read_yaml(path: str) -> list[str]:
    """The words of a command line that has the flags of a YAML file, so that both are read by the same rules.

    Raises:
        UserError: there is no such file, or no mapping in it.
    """

    def with_numbers(value):
        if isinstance(value, dict):
            return {name: with_numbers(item) for name, item in value.items()}
        try:
            return json.loads(value)
        except ValueError:
            return value

    try:  # every value as it is written: YAML itself reads 1e-4 as text and the strategy "no" as false
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds no flags; write one a line, as in learning_rate: 1e-4")
    words = []
    for name, value in settings.items():
        if isinstance(value, list):
            words += [f"--{name}", *value]
        elif isinstance(value, dict):
            words.append(f"--{name}={json.dumps(with_numbers(value))}")
        elif value.lower() not in ("", "~", "null"):
            words.append(f"--{name}={value}")
    return words


def parse_flags(*dataclasses) -> tuple:
    """An instance of each dataclass by the words of the command line, of which the first may be a YAML file.

    Raises:
        UserError: a flag that is unknown (says its new name, if it has one), or a value of the wrong kind.
    """
    parser, words = HfArgumentParser(dataclasses, allow_abbrev=False, exit_on_error=False), sys.argv[1:]
    if words and words[0].endswith((".yaml", ".yml")):
        words = [*read_yaml(words[0]), *words[1:]]
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    except (ValueError, argparse.ArgumentError) as error:
        raise UserError(str(error)) from None
    if unknown:
        flags = [word.partition("=")[0] for word in unknown if word.startswith("--")] or unknown
        news = {flag: RENAMED.get(flag.removeprefix("--").replace("-", "_")) for flag in flags}
        reasons = [f"{flag}: is now {new}" if new else f"{flag}: no such flag" for flag, new in news.items()]
        raise UserError(f"{'; '.join(reasons)}. All flags: python train.py --help")
    return tuple(parsed)
