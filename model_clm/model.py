"""The prepared data's tokenizer; the model is looked at before it is trained, then loaded."""

from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
)
from transformers.utils import is_flash_attn_2_available

from data import hash_file, read_manifest
from infer import read_tokenizer
from rows import UserError
from tiny import SCRATCH

LFS_POINTER = b"version https://git-lfs"


def load_tokenizer(data_path: str):
    """The tokenizer of a prepared folder, with which its shards were encoded.

    Raises:
        UserError: it is no such folder, or its tokenizer is no longer the one that the shards were encoded with.
    """
    folder = Path(data_path)
    if not (folder / "train").is_dir():
        raise UserError(
            f"{data_path}: is no prepared folder. Prepare the texts first, and give what that writes:\n"
            f"  python train_tokenizer.py {data_path} my_tokenizer\n"
            f"  python prepare.py {data_path} my_prepared --tokenizer my_tokenizer"
        )
    manifest = read_manifest(folder / "train")
    tokenizer_file = folder / "tokenizer" / "tokenizer.json"
    if not tokenizer_file.is_file() or hash_file(tokenizer_file) != manifest["tokenizer_hash"]:
        raise UserError(f"{tokenizer_file}: is not what the shards were encoded with. Prepare the corpus again.")
    tokenizer = read_tokenizer(str(folder / "tokenizer"))
    if tokenizer.eos_token_id != manifest["eos_token_id"]:
        raise UserError(
            f"{folder}: its tokenizer ends a text by id {tokenizer.eos_token_id}, the shards by "
            f"{manifest['eos_token_id']}. Prepare the corpus again."
        )
    return tokenizer


def check_model(model_args, data_path: str, tokenizer, model_max_length: int) -> None:
    """Looks at a checkpoint's files, its config and its tokenizer before it is loaded.

    Raises:
        UserError: it can't be trained here, or not on this data.
    """
    path = model_args.model_name_or_path
    refuse_lfs_pointers(path)
    config = read_config(path, model_args.trust_remote_code)
    check_positions(path, config.get_text_config(), model_max_length)
    check_tokenizer(path, data_path, tokenizer, model_args.trust_remote_code)
    check_vocabulary(path, tokenizer, config)


def unreadable_model(path: str, error: Exception) -> UserError:
    return UserError(
        f"{path}: no model could be read there ({str(error).splitlines()[0]}). Give a folder that holds "
        f"config.json, tokenizer and weights, a hub id, or {SCRATCH} for a model from scratch."
    )


def refuse_lfs_pointers(path: str) -> None:
    """Raises UserError where git, without its LFS extension, has left a few words in the place of a file."""
    for file in sorted(Path(path).glob("*")):
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(LFS_POINTER):
            raise UserError(
                f"{file}: is a Git LFS pointer, not the file itself. Fetch it: git -C {path} lfs pull "
                "(after git lfs install)."
            )


def read_config(path: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of a causal LM; raises UserError where there is none, or one of another kind."""
    try:
        settings, _ = PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError) as error:
        raise unreadable_model(path, error) from None
    model_type, own_code = settings.get("model_type"), "auto_map" in settings
    if "peft_type" in settings or Path(path, "adapter_config.json").is_file():
        raise UserError(f"{path}: is an adapter. Merge it into its model first; continued pre-training trains it all.")
    if own_code and not trust_remote_code and model_type not in CONFIG_MAPPING:
        raise UserError(f"{path}: the model brings code of its own. Read it, then add --trust_remote_code true.")
    if not own_code and model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{path}/config.json: model_type {model_type!r} is unknown to Transformers {transformers.__version__}. "
            "If the model is newer, so must Transformers be: pip install -U transformers."
        )
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in settings.get("auto_map", {}):
        raise UserError(f"{path}: model_type {model_type!r} is no causal language model that Transformers knows.")
    return config


def check_positions(path: str, config: PreTrainedConfig, model_max_length: int) -> None:
    """Raises UserError where a row could be longer than the model's positions, and these end or change there."""
    limit, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None)
    if limit is None or model_max_length <= limit:
        return
    if rope is None:  # ALiBi and recurrent models that have no limit don't name one
        reason = f"the model has {limit} positions, and none beyond them"
    elif rope.get("rope_type") == "dynamic":
        reason = f"beyond {limit} tokens, dynamic NTK rotates a row by the longest one of its batch"
    else:
        return
    raise UserError(f"--model_max_length {model_max_length}: {reason} ({path}). The largest that works is {limit}.")


def check_tokenizer(path: str, data_path: str, tokenizer, trust_remote_code: bool) -> None:
    """Raises UserError where a checkpoint's tokenizer is not the one that the data was encoded with."""
    try:
        own = read_tokenizer(path, trust_remote_code)
    except (OSError, ValueError) as error:
        raise unreadable_model(path, error) from None
    if not own.is_fast or own.backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str():
        raise UserError(
            f"{data_path}: was encoded with another tokenizer than that of {path}, so the model would read other "
            f"words. Prepare the texts with the model's own: python prepare.py my_corpus my_prepared --tokenizer {path}"
        )


def check_vocabulary(path: str, tokenizer, config: PreTrainedConfig) -> None:
    """Raises UserError where the tokenizer has ids for which the model has no embedding."""
    ids, rows = max(tokenizer.get_vocab().values()) + 1, config.get_text_config().vocab_size
    if ids > rows:
        raise UserError(
            f"{path}: the tokenizer has {ids} ids, the model's embedding {rows} rows. Give the tokenizer that belongs "
            "to the model, or enlarge the model: python grow_vocabulary.py --help says how."
        )


def load_model(model_args, args) -> nn.Module:
    """The causal LM in fp32, which the optimizer updates; under DeepSpeed in the precision of its working copy.

    Raises:
        UserError: the weights can't be read or are not the model's, or it has no activation checkpointing.
    """
    path = model_args.model_name_or_path
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    attention = model_args.attn_implementation
    if attention is None and half != torch.float32 and is_flash_attn_2_available():
        attention = "flash_attention_2"
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=half if args.deepspeed else torch.float32,
            attn_implementation=attention,
            trust_remote_code=model_args.trust_remote_code,
            ignore_mismatched_sizes=True,  # they are refused below
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    except RuntimeError as error:  # under ZeRO-3
        if "size mismatch" not in str(error):
            raise
        raise UserError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    refuse_other_weights(path, loading)
    model.get_input_embeddings().padding_idx = None  # an EOS that pads as well would have no gradient
    if args.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise UserError(
            f"--gradient_checkpointing true: {type(model).__name__} has no activation checkpointing. Leave it out."
        )
    return model


def refuse_other_weights(path: str, loading: dict) -> None:
    """Raises UserError where a part of the model was in no file, or of another size, and so is random."""
    wrong_sizes = [f"{name} ({list(found)} for {list(own)})" for name, found, own in loading["mismatched_keys"]]
    wrong = [*sorted(loading["missing_keys"]), *wrong_sizes]
    if wrong:
        raise UserError(
            f"{path}: {len(wrong)} of the model's tensors are missing or of another size: {', '.join(wrong[:3])}. "
            "These would be trained from random numbers. Download the model again."
        )
