"""LoRA: one pass over the model finds the layers that can take an adapter; and an adapter that is trained on."""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import copy
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import get_gradient_edge
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from export import refuse_tied_targets
from rows import UserError

# Tokens of the trial pass: attention over compressed blocks (DeepSeek-V4's have 128 tokens) needs a full one.
TRIAL_TOKENS = 160

# PEFT takes no adapter on `out_proj` of these: Mamba's fused kernels read its weight without calling it (peft#2556).
MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")


def check_adapter(model_args, base: str) -> None:
    """Raises UserError unless the adapter can be trained on by LoRA, with the settings that it was made with."""
    from peft import PeftConfig

    path = model_args.model_name_or_path
    if not model_args.use_lora:
        raise UserError(
            f"{path}: is an adapter of {base}. Train the adapter on by --use_lora true, or all weights after "
            f"merging it: python export.py {path} merged, then MODEL=merged (--model_name_or_path merged)."
        )
    adapter = PeftConfig.from_pretrained(path)
    if adapter.peft_type != "LORA":
        raise UserError(f"{path}: an adapter of the kind {adapter.peft_type}; only LoRA's are trained on. Give {base}.")
    targets = adapter.target_modules
    own = {
        "lora_r": adapter.r,
        "lora_alpha": adapter.lora_alpha,
        "lora_dropout": adapter.lora_dropout,
        "target_modules": [targets] if isinstance(targets, str) else sorted(targets or []),
    }
    defaults = type(model_args)()
    for name, value in own.items():
        given = getattr(model_args, name)
        if given != getattr(defaults, name) and (sorted(given) if name == "target_modules" else given) != value:
            raise UserError(
                f"--{name} {given}: the adapter in {path} was made with {value}. Leave the flag out to train this "
                f"adapter on, or give its base model, {base}, to train a new one."
            )
        setattr(model_args, name, value)


def load_adapter(model: nn.Module, path: str) -> nn.Module:
    """The model with the adapter in folder `path`, to be trained on.

    Raises:
        UserError: the adapter is not one of this model, or changes weights that are one with others.
    """
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(model, path, is_trainable=True, torch_device="cpu")
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path}: the adapter can't be put on its base model: {one_line(error)}") from None
    refuse_tied_targets(adapted, path)
    return adapted


def add_lora(model: nn.Module, model_args, modules_to_save: list[str] | None = None) -> nn.Module:
    """The model with low-rank adapters; its own weights are frozen (Hu et al., "LoRA", 2021; library: PEFT).

    Args:
        modules_to_save: modules that are trained whole, and saved with the adapters.

    Raises:
        UserError: an adapter can't stand where --target_modules asks for one.
    """
    from peft import LoraConfig, get_peft_model

    layers, stacks = find_targets(model, model_args.target_modules)
    all_layers = [name for name, _ in model.named_modules()]
    all_weights = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    layers, stacks = shorten(layers, all_layers, parts=1), shorten(stacks, all_weights, parts=2)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=layers,
        target_parameters=stacks,
        modules_to_save=modules_to_save,
    )
    try:
        renamed = renamed_by_peft(config, model)
        config.target_modules -= renamed
        config.target_parameters = sorted([*stacks, *(f"{name}.weight" for name in renamed)]) or None
        if config.target_parameters:
            config.lora_dropout = 0.0  # PEFT adapts a stack of matrices by adding to it: no input to drop from
        adapted = get_peft_model(model, config)
    except (ValueError, TypeError, RuntimeError) as error:
        flag = f"--target_modules {' '.join(model_args.target_modules)}"
        raise UserError(f"{flag}: no adapters for {model_args.model_name_or_path}: {one_line(error)}") from None
    refuse_tied_targets(adapted, "--target_modules")
    return adapted


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def find_targets(model: nn.Module, targets: list[str]) -> tuple[list[str], list[str]]:
    """Names of the layers, and of the stacks of experts, that get an adapter; "all-linear" takes all that can.

    Raises:
        UserError: one of the targets is nothing that takes an adapter, or the model fails on a few tokens.
    """
    linear, stacks = linear_layers(model), expert_stacks(model)
    if is_deepspeed_zero3_enabled():  # the weights are in pieces, and a pass of the model would gather them all
        with torch.random.fork_rng(devices=[]):
            layers, stacks = [name for name, layer in linear.items() if is_plain_product(layer)], list(stacks)
    else:
        layers, stacks = find_trainable(model, linear, stacks)
    uses = Counter(layer.weight for layer in linear.values())  # merging would add several adapters to one weight
    layers = keep_loadable([name for name in layers if uses[linear[name].weight] == 1], model)
    if model.config.model_type in MAMBA:
        layers = [name for name in layers if not name.endswith(".out_proj")]
    if targets == ["all-linear"]:
        return layers, stacks

    def named(names: list[str], some: list[str]) -> list[str]:
        return [name for name in names if any(f".{name}".endswith(f".{target}") for target in some)]

    kinds = ", ".join(sorted({name.split(".")[-1] for name in [*layers, *stacks]}))
    head, modules = model.get_output_embeddings(), language_modules(model)
    layers += [name for name, layer in modules.items() if isinstance(layer, nn.Embedding) or layer is head]
    missing = [target for target in targets if not named([*layers, *stacks], [target])]
    if missing:
        problem = "takes no adapter" if named(modules, missing) else "no such module"
        raise UserError(f"--target_modules {' '.join(missing)}: {problem}; the linear ones are {kinds}")
    return named(layers, targets), named(stacks, targets)


def is_plain_product(layer: nn.Module) -> bool:
    """Whether a linear layer, made small, does nothing but multiply; a router of the same class may do more."""
    if type(layer) is Conv1D:
        return True
    probe, hidden_states = copy.copy(layer), torch.randn(2, 4)
    probe._parameters = {"weight": torch.randn(4, 4), "bias": None if layer.bias is None else torch.randn(4)}
    try:
        output = type(layer).forward(probe, hidden_states)
    except Exception:  # the model's code is anybody's
        return False
    product = F.linear(hidden_states, probe.weight, probe.bias)
    return isinstance(output, torch.Tensor) and output.shape == product.shape and torch.allclose(output, product)


def language_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by name; of a vision-language model those of the language model and its head alone."""
    if model.config.get_text_config() is model.config:
        return dict(model.named_modules())
    inside = {*model.get_decoder().modules(), model.get_output_embeddings()}
    return {name: module for name, module in model.named_modules() if module in inside}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers but the head."""
    head = model.get_output_embeddings()
    return {
        name: layer
        for name, layer in language_modules(model).items()
        if isinstance(layer, nn.Linear | Conv1D) and layer is not head
    }


def expert_stacks(model: nn.Module) -> dict[str, nn.Module]:
    """The tensors that hold the matrices of all experts of a mixture, each with the layer that owns it."""
    return {
        f"{name}.{weight_name}": layer
        for name, layer in language_modules(model).items()
        for weight_name, weight in layer.named_parameters(recurse=False)
        if is_expert_stack(name, layer, weight)
    }


def is_expert_stack(name: str, layer: nn.Module, weight: nn.Parameter) -> bool:
    return len(full_shape(weight)) == 3 and "expert" in f"{name} {type(layer).__name__}".lower()


def full_shape(weight: nn.Parameter) -> torch.Size:
    """The shape; under ZeRO-3 a parameter is an empty shell that knows it as ds_shape."""
    return getattr(weight, "ds_shape", weight.shape)


def find_trainable(model: nn.Module, linear: dict, stacks: dict) -> tuple[list[str], list[str]]:
    """Those of the linear layers and the stacks that an adapter can train, as a pass of a few tokens shows.

    They are called, and the logits come from them; a layer gives the product of its input and one matrix. An expert
    that no token chose counts as the others of its block do.
    """
    calls, reached = trial_pass(model, {*linear.values(), *stacks.values()})

    def multiplies(layer: nn.Module) -> bool:
        sizes = tuple(layer.weight.shape) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
        return any(
            node in reached and inputs and (inputs[0].shape[-1], output.shape[-1]) == sizes
            for inputs, output, node in calls[layer]
        )

    kinds = {experts_as_one(name) for name, layer in linear.items() if multiplies(layer)}
    layers = [name for name in linear if experts_as_one(name) in kinds]
    return layers, [
        name
        for name, layer in stacks.items()
        if calls[layer] and get_gradient_edge(layer.get_parameter(name.split(".")[-1])).node in reached
    ]


def trial_pass(model: nn.Module, layers: set[nn.Module]) -> tuple[dict[nn.Module, list], set]:
    """One pass of a few tokens, as in training but without the way back.

    Returns:
        for each layer its calls: inputs, output and, where that is one tensor, its node in autograd's graph;
        all nodes of the graph that the logits come from.

    Raises:
        UserError: the model fails.
    """
    calls = {layer: [] for layer in layers}

    def remember(layer, inputs, output):
        node = output.grad_fn if isinstance(output, torch.Tensor) else None
        calls[layer].append((inputs, output, node))

    config, training = model.config.get_text_config(), model.training
    limit = getattr(config, "max_position_embeddings", None) or -1  # recurrent models and ALiBi have none
    length = min(TRIAL_TOKENS, limit // 2) if limit > 0 else TRIAL_TOKENS
    tokens = (config.vocab_size // 2 + torch.arange(length, device=model.device)) % config.vocab_size
    hooks = [layer.register_forward_hook(remember) for layer in layers]
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            logits = model.train()(input_ids=tokens[None], use_cache=False).logits
    except Exception as error:  # the model's code is anybody's
        raise UserError(f"{model.name_or_path}: fails on {length} tokens: {one_line(error)}") from error
    for hook in hooks:
        hook.remove()
    model.train(training)

    reached, waiting = set(), [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in reached:
            reached.add(node)
            waiting += [source for source, _ in node.next_functions]
    return calls, reached


def experts_as_one(name: str) -> str:
    """A layer's name without numbers, except for the first, which is its block's."""
    parts = name.split(".")
    numbers = [position for position, part in enumerate(parts) if part.isdigit()]
    return ".".join(part for position, part in enumerate(parts) if position not in numbers[1:])


def shorten(names: list[str], all_names: list[str], parts: int) -> list[str]:
    """Names by their last parts only, where these mean the same ones: what an adapter's config lists."""
    ends = {name: ".".join(name.split(".")[-parts:]) for name in all_names}
    counts, all_counts = Counter(ends[name] for name in names), Counter(ends.values())
    return sorted({ends[name] if counts[ends[name]] == all_counts[ends[name]] else name for name in names})


def keep_loadable(layers: list[str], model: nn.Module) -> list[str]:
    """Those whose adapters PEFT finds again: of a few, it renames the tensors as if they came from an older file."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    keys = {name: f"base_model.model.{name}.lora_A.weight" for name in layers}
    saved = {key: torch.empty(0) for key in keys.values()}
    found = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), saved)
    return [name for name in layers if keys[name] in found]


def renamed_by_peft(config, model: nn.Module) -> set[str]:
    """Targets that PEFT takes for the experts of Transformers 4 in some mixtures, e.g. the dense layers' `gate_proj`.

    Named by their weights, they stay what they are.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    converted = copy.deepcopy(config)
    convert_peft_config_for_transformers(converted, model, get_model_conversion_mapping(model))
    return set(config.target_modules) - set(converted.target_modules)


def describe_adapters(model: nn.Module, model_args) -> list[str]:
    """What there is to say of the adapters before the first step: which layers have one, which don't; [] without any.

    Norms, biases, the embedding and the head are left unsaid.
    """
    from peft.tuners.lora import LoraLayer, ParamWrapper

    if not model_args.use_lora:
        return []
    adapted = set()
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            name = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
            adapted.add(layer.get_base_layer().get_parameter(name))
    linear, stacks, kinds_with, kinds_without = Counter(), Counter(), Counter(), Counter()
    for path, layer in language_modules(model).items():
        path = path.replace(".base_layer", "")
        for name, weight in layer.named_parameters(recurse=False):
            has_adapter, shape = weight in adapted, full_shape(weight)
            known = isinstance(layer, nn.Embedding) or layer is model.get_output_embeddings() or "bias" in name
            is_matrix = sum(size > 1 for size in shape) >= 2  # or a stack of them, or a convolution
            if weight.requires_grad or not (has_adapter or is_matrix and not known):
                continue
            if isinstance(layer, nn.Linear | Conv1D):
                linear[has_adapter] += 1
            elif is_expert_stack(path, layer, weight):
                stacks[has_adapter] += 1
            *_, owner, kind = (path if name == "weight" else f"{path}.{name}").split(".")
            if has_adapter and not kind.isdigit():
                kinds_with[kind] += 1
            else:
                (kinds_with if has_adapter else kinds_without)[f"{owner}.{kind}"] += 1
    counts = f"{linear[True]} of {linear.total()} linear layers"
    if stacks:
        counts += f" and {stacks[True]} of {stacks.total()} stacks of experts"
    messages = [f"adapters on {counts}: {', '.join(f'{kind} x{n}' for kind, n in kinds_with.items())}"]
    if kinds_without:
        kinds = ", ".join(f"{kind} x{n}" for kind, n in kinds_without.items())
        reasons = "no gradient gets there, it is no product with one matrix of its own, or PEFT takes none there"
        messages.append(f"no adapters on {kinds}: {reasons}")
    if model.peft_config["default"].lora_dropout != model_args.lora_dropout:
        messages.append(f"--lora_dropout {model_args.lora_dropout:g}: 0 is used, since stacks of experts can't have it")
    return messages
