"""The tokenizer and the classifier: any encoder that Transformers classifies with, for full fine-tuning or LoRA."""

import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations import is_deepspeed_zero3_enabled

from rows import UserError


def no_model_there(path: str, error: Exception) -> UserError:
    return UserError(
        f"{path}: no model could be read there ({str(error).splitlines()[0]}). Give a folder that holds "
        "config.json, tokenizer and weights, or a hub id; the readme says how to download one through a mirror."
    )


def load_tokenizer(model_args):
    """The model's tokenizer; raises UserError where there is none, or it can't pad."""
    path = model_args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model_args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise no_model_there(path, error) from None
    if len(tokenizer("你好，世界").input_ids) < 3:
        raise UserError(f"{path}: its tokenizer makes almost nothing of 你好，世界; is its vocabulary file missing?")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise UserError(f"{path}: its tokenizer has no token to pad with.")
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True  # texts are tokenised once, padded later
    return tokenizer


def count_positions(config) -> int:
    """Tokens of a text that the model has positions for; sys.maxsize where it sets no limit."""
    positions = getattr(config, "max_position_embeddings", sys.maxsize)
    if positions < 1:  # XLNet's way to say so
        return sys.maxsize
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):  # their positions begin after the padding's
        positions -= config.pad_token_id + 1
    return positions


def name_classes(config, id2label: dict[int, str]) -> None:
    """Names a model's classes in the order of their ids; `label2id` follows, whatever the file said."""
    config.id2label = dict(sorted(id2label.items()))
    config.label2id = {label: index for index, label in config.id2label.items()}


def load_model(model_args, args, id2label: dict[int, str]) -> nn.Module:
    """The encoder with a new head for these classes, or with its own head, and order, where it knows the same ones.

    Frozen weights and DeepSpeed's working copy are kept in half precision; weights that the optimizer updates itself
    stay in fp32, and so do the adapters (PEFT), since fp16 gradients could not be unscaled otherwise.

    Raises:
        UserError: the weights can't be read, are an adapter's, or `target_modules` match nothing.
    """
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    path = model_args.model_name_or_path
    if Path(path, "adapter_config.json").is_file():
        raise UserError(f"{path}: is a LoRA adapter. Merge it first (python export.py {path} merged) and give merged.")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=model_args.trust_remote_code)
        has_other_classes = sorted(config.id2label.values()) != sorted(id2label.values())
        name_classes(config, id2label if has_other_classes else config.id2label)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            path,
            config=config,
            dtype=half if model_args.use_lora or args.deepspeed else torch.float32,
            attn_implementation=model_args.attn_implementation,
            ignore_mismatched_sizes=has_other_classes,
            output_loading_info=True,
            trust_remote_code=model_args.trust_remote_code,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise no_model_there(path, error) from None
    class_layers = find_class_layers(model)
    for name in class_layers if has_other_classes else ():
        draw_layer(model.get_submodule(name), getattr(config, "initializer_range", 0.02))
    model.config.problem_type = "single_label_classification"
    if model_args.use_lora:
        heads = {name.split(".")[0] for name in class_layers}
        new = loading["missing_keys"] | {name for name, *_ in loading["mismatched_keys"]}
        modules = {name.rpartition(".")[0] for name in new if name.split(".")[0] not in heads}
        model = add_lora(model, model_args, sorted(heads | modules), sorted(modules))
        for parameter in model.parameters() if not args.deepspeed else ():  # which keeps fp32 copies by itself
            if parameter.requires_grad:  # PEFT casts the adapters, but not the head
                parameter.data = parameter.data.float()
    return model


def find_class_layers(model: nn.Module) -> list[str]:
    """Names of the layers whose size follows from the number of classes; all of Transformers' are nn.Linear."""
    shapes = []
    for more in (1, 2):
        config = copy.deepcopy(model.config)
        config.num_labels += more
        with torch.device("meta"):
            shapes.append({name: weight.shape for name, weight in type(model)(config).state_dict().items()})
    return sorted({name.rpartition(".")[0] for name in shapes[0] if shapes[0][name] != shapes[1][name]})


def draw_layer(layer: nn.Linear, std: float) -> None:
    """Draws a layer of the classes anew: one that was trained for others would mislead, or be of another size."""
    gathered = nullcontext()
    if is_deepspeed_zero3_enabled():
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(layer.parameters()), modifier_rank=0)
    with gathered:
        nn.init.normal_(layer.weight, std=std)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def add_lora(model: nn.Module, model_args, trained: list[str], without_weights: list[str]) -> nn.Module:
    """The model with low-rank adapters; the rest is frozen.

    Source: Hu et al., "LoRA" (2021); library: PEFT.

    Args:
        trained: modules that are trained in full and saved with the adapters: the head, and `without_weights`.
        without_weights: those that the checkpoint has no weights for (a pooler).
    """
    from peft import LoraConfig, get_peft_model

    names = [name for name, _ in model.named_modules()]
    targets = model_args.target_modules
    missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if targets != ["all-linear"] and missing:
        linear = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        raise UserError(
            f"--target_modules {' '.join(missing)}: no such module; the linear ones are {', '.join(sorted(linear))}"
        )
    return get_peft_model(
        model,
        LoraConfig(
            task_type="SEQ_CLS",
            modules_to_save=trained,
            exclude_modules=without_weights or None,
            r=model_args.lora_r,
            lora_alpha=model_args.lora_alpha,
            lora_dropout=model_args.lora_dropout,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
        ),
    )
