"""The model is looked at before it is trained; then tokenizer and model are loaded, given a chat template, adapters."""

# The same in every recipe that has it: python tests/copies.py --fix FILE

from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_flash_attn_2_available

from export import repair_generation_config
from infer import find_base_model
from lora import add_lora, check_adapter, load_adapter
from rows import UserError
from template import encode_conversation, read_tokenizer

# For tokenizers that bring no template: plain role names, and the end of a turn is the tokenizer's own EOS.
PLAIN_TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""

LFS_POINTER = b"version https://git-lfs"


def check_model(model_args, model_max_length: int) -> PreTrainedConfig:
    """Looks at a model's files and its config, before anything is tokenised or loaded.

    Where the model is an adapter to be trained on, `model_args` gets the adapter's own rank, scale and layers.

    Returns:
        The config of the model, or of the adapter's base model.

    Raises:
        UserError: it can't be trained here, or not as the flags say.
    """
    path = model_args.model_name_or_path
    base = find_base_model(path)
    refuse_lfs_pointers(path)
    if base is not None:
        refuse_lfs_pointers(base)
        check_adapter(model_args, base)
    config = read_config(base or path, model_args.trust_remote_code)
    check_positions(base or path, config.get_text_config(), model_max_length)
    return config


# >>> model-files
def unreadable_model(path: str, error: Exception) -> UserError:
    return UserError(
        f"{path}: no model could be read there ({str(error).splitlines()[0]}). Give a folder that holds "
        "config.json, tokenizer and weights, or a hub id; the readme says how to download one through a mirror."
    )


def refuse_lfs_pointers(path: str) -> None:
    """Raises UserError where git, without its LFS extension, has left a few words in the place of a file."""
    for file in sorted(Path(path).glob("*")):
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(LFS_POINTER):
            raise UserError(
                f"{file}: is a Git LFS pointer, not the file itself. Fetch it: git -C {path} lfs pull "
                "(after git lfs install)."
            )


# <<< model-files


def read_config(path: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of a causal LM; raises UserError where there is none, or one of another kind."""
    try:
        settings, _ = PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError) as error:
        raise unreadable_model(path, error) from None
    model_type, own_code = settings.get("model_type"), "auto_map" in settings
    if own_code and not trust_remote_code and model_type not in CONFIG_MAPPING:
        raise UserError(f"{path}: the model brings code of its own. Read it, then add --trust_remote_code true.")
    if not own_code and model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{path}/config.json: model_type {model_type!r} is unknown to Transformers {transformers.__version__}. "
            "If the model is newer, so must Transformers be: pip install -U transformers."
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise unreadable_model(path, error) from None
    reads_both_ways = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not settings.get("is_decoder", False)
    if "vision_config" in settings and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = "a vision-language model, which the recipe train_llava trains"
    elif config.is_encoder_decoder or reads_both_ways:
        kind = f"an {'encoder-decoder' if config.is_encoder_decoder else 'encoder'} model"
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in settings.get("auto_map", {}):
        return config
    else:
        kind = "no causal language model that Transformers knows"
    raise UserError(f"{path}: model_type {model_type!r} is {kind}. Give a causal language model, such as Qwen2.5.")


# >>> model-limits
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


def check_vocabulary(path: str, tokenizer, config: PreTrainedConfig) -> None:
    """Raises UserError where the tokenizer has ids for which the model has no embedding."""
    ids, rows = max(tokenizer.get_vocab().values()) + 1, config.get_text_config().vocab_size
    if ids > rows:
        raise UserError(
            f"{path}: the tokenizer has {ids} ids, the model's embedding {rows} rows. Give the tokenizer that belongs "
            "to the model, or enlarge the model by model.resize_token_embeddings and save both."
        )


# <<< model-limits


def load_tokenizer(model_args):
    """The model's tokenizer, with a chat template, and with the token that ends a turn as its EOS.

    The EOS matters when the tuned model is served: base models often come with another one and would never stop.

    Raises:
        UserError: there is no such model, or its tokenizer can't tell where in a text a token stands, or where a reply
            ends.
    """
    path = model_args.model_name_or_path
    try:
        tokenizer = read_tokenizer(path, model_args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise unreadable_model(path, error) from None
    return prepare_tokenizer(tokenizer, path)


# >>> chat-tokenizer
def prepare_tokenizer(tokenizer, path: str):
    """The tokenizer of the model at `path` as `load_tokenizer` promises it; see there."""
    if not tokenizer.is_fast:
        raise UserError(f"{path}: its tokenizer has no fast version (tokenizer.json), which finding the labels needs.")
    if tokenizer.chat_template is None:
        if tokenizer.eos_token is None:
            raise UserError(f"{path}: its tokenizer has neither a chat template nor an EOS to end a reply with.")
        adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + PLAIN_TEMPLATE
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好"}]
    end_of_turn = encode_conversation(turns, tokenizer)[-1]["labels"][-1]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_of_turn)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# <<< chat-tokenizer


def load_model(model_args, args) -> nn.Module:
    """The causal LM in the precision that suits how it is trained, with adapters where they are asked for.

    Frozen weights and DeepSpeed's working copy are kept in half precision; weights that the optimizer updates itself
    stay in fp32, and so do the adapters (PEFT), since fp16 gradients could not be unscaled otherwise.

    Raises:
        UserError: the weights can't be read or are not the model's, it has no activation checkpointing, or an adapter
            can't stand where it should.
    """
    path = model_args.model_name_or_path
    base = find_base_model(path)
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    attention = model_args.attn_implementation
    if attention is None and half != torch.float32 and is_flash_attn_2_available():
        attention = "flash_attention_2"
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            base or path,
            dtype=half if model_args.use_lora or args.deepspeed else torch.float32,
            attn_implementation=attention,
            trust_remote_code=model_args.trust_remote_code,
            ignore_mismatched_sizes=True,  # they are refused below
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{base or path}: {str(error).splitlines()[0]}") from None
    except RuntimeError as error:  # under ZeRO-3
        if "size mismatch" not in str(error):
            raise
        raise UserError(f"{base or path}: {' '.join(str(error).split())[:300]}") from None
    refuse_other_weights(base or path, loading)
    if args.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise UserError(
            f"--gradient_checkpointing true: {type(model).__name__} has no activation checkpointing. Leave it out."
        )
    if base is not None:
        return load_adapter(model, path)
    if not model_args.use_lora:
        return model
    if not is_deepspeed_zero3_enabled():  # where it will be trained, the trial pass runs the same kernels
        model.to(args.device)
    return add_lora(model, model_args)


# >>> loading-info
def refuse_other_weights(path: str, loading: dict) -> None:
    """Raises UserError where a part of the model was in no file, or of another size, and so is random.

    Args:
        loading: Transformers' `loading_info`; under ZeRO-3 it doesn't tell what else was in the files.
    """
    wrong_sizes = [f"{name} ({list(found)} for {list(own)})" for name, found, own in loading["mismatched_keys"]]
    problems = []
    for names, problem in (
        (loading["missing_keys"], "lacks {} of the model's tensors"),
        (wrong_sizes, "has {} of another size"),
        (loading["unexpected_keys"], "has {} that the model doesn't know"),
    ):
        if names:
            first = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            problems.append(f"{problem.format(len(names))}: {first}")
    if loading["missing_keys"] or wrong_sizes:
        raise UserError(
            f"{path}: {'; '.join(problems)}. These would be trained from random numbers. Download the model again, "
            "or rename the tensors as its config.json asks for."
        )


def mend_generation_config(model: nn.Module) -> list[str]:
    """Makes the settings for sampling such that Transformers will save them with the model; returns what to say of it.

    Raises:
        UserError: they contradict each other in another way.
    """
    config = model.generation_config
    try:
        config.validate(strict=True)
        return []
    except ValueError:
        repair_generation_config(config, model.name_or_path)
    return [f"generation_config.json has settings that need do_sample; it is saved with do_sample={config.do_sample}"]


# <<< loading-info
