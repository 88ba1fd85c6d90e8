"""The tokenizer and the model: loaded, given a chat template or adapters."""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_flash_attn_2_available

from data import IGNORE_INDEX, encode_conversation
from rows import UserError

# For tokenizers that bring no template: plain role names, and the end of a turn is the tokenizer's own EOS.
PLAIN_TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


def load_tokenizer(model_args):
    """The model's tokenizer, with a chat template, and with the token that ends a turn as its EOS.

    The EOS matters when the tuned model is served: base models often come with another one and would never stop.

    Raises:
        UserError: there is no such model, or its tokenizer can't tell where in a text a token stands.
    """
    path = model_args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model_args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: no model could be read there ({str(error).splitlines()[0]}). Give a folder that holds "
            "config.json, tokenizer and weights, or a hub id; the readme says how to download one through a mirror."
        ) from None
    if not tokenizer.is_fast:
        raise UserError(f"{path}: its tokenizer has no fast version (tokenizer.json), which finding the labels needs.")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好"}]
    _, labels = encode_conversation(turns, tokenizer)
    end_of_turn = [label for label in labels if label != IGNORE_INDEX][-1]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_of_turn)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(model_args, args) -> nn.Module:
    """The causal LM in the precision that suits how it is trained, with adapters where they are asked for.

    Frozen weights and DeepSpeed's working copy are kept in half precision; weights that the optimizer updates itself
    stay in fp32, and so do the adapters (PEFT), since fp16 gradients could not be unscaled otherwise.

    Raises:
        UserError: the weights can't be read, or `target_modules` match nothing.
    """
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    attention = model_args.attn_implementation
    if attention is None and half != torch.float32 and is_flash_attn_2_available():
        attention = "flash_attention_2"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path,
            dtype=half if model_args.use_lora or args.deepspeed else torch.float32,
            attn_implementation=attention,
            trust_remote_code=model_args.trust_remote_code,
        )
    except OSError as error:
        raise UserError(f"{model_args.model_name_or_path}: {str(error).splitlines()[0]}") from None
    if model_args.use_lora:
        model = add_lora(model, model_args)
    return model


def add_lora(model: nn.Module, model_args) -> nn.Module:
    """The model with low-rank adapters; its own weights are frozen (Hu et al., "LoRA", 2021; library: PEFT)."""
    from peft import LoraConfig, get_peft_model

    names = [name for name, _ in model.named_modules()]
    targets = model_args.target_modules
    missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if targets != ["all-linear"] and missing:
        linear = sorted(
            {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        )
        raise UserError(
            f"--target_modules {' '.join(missing)}: no such module; the linear ones are {', '.join(linear)}"
        )
    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=model_args.lora_r,
            lora_alpha=model_args.lora_alpha,
            lora_dropout=model_args.lora_dropout,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
        ),
    )
