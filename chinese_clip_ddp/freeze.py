"""What of a model is trained: frozen towers, their unlocked last layers, and what a step doesn't use at all."""

import torch
from torch import nn

from model import embed_pairs, has_bias, prepare_forward
from rows import UserError


def choose_trained(model, model_args, mode: str, pixel_shape: tuple[int, int, int]) -> None:
    """Sets requires_grad of all parameters.

    A frozen encoder of a model that is whole takes its projection along, so that its embeddings stay what they were;
    one that was joined with another has a new projection, which must be trained, as must what stands behind unlocked
    layers.

    Args:
        mode: of contrastive.MODES.
        pixel_shape: (3, height, width) of what the image processor gives.

    Raises:
        UserError: the parts don't fit together, or the mode needs what the model doesn't have.
    """
    if mode == "sigmoid" and not has_bias(model):
        raise UserError(
            f"--cross_embedding sigmoid needs a bias, and {type(model).__name__} has none. Give another mode, or a "
            "SigLIP, or two encoders by --text_model_name_or_path and --image_model_name_or_path."
        )
    unused = find_unused(model, pixel_shape)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in unused and (name != "logit_bias" or mode == "sigmoid"))
    if model_args.freeze != "none":
        tower = getattr(model, f"{model_args.freeze}_model")
        trained = [parameter for parameter in last_layers(tower, model_args) if parameter.requires_grad]
        tower.requires_grad_(False)
        if model_args.model_name_or_path and not model_args.unlocked_layers:
            (model.visual_projection if model_args.freeze == "vision" else model.text_projection).requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def last_layers(tower: nn.Module, model_args) -> list[nn.Parameter]:
    """The parameters of the last --unlocked_layers layers of a tower, and of all that comes behind them.

    A layer is an entry of a list of modules that holds no other such list: a block of a transformer, in Swin a block of
    a stage, in LeViT an attention or an MLP.
    """
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    holds_lists = [any(isinstance(module, nn.ModuleList) for module in list(each.modules())[1:]) for each in lists]
    layers = [layer for each, outer in zip(lists, holds_lists, strict=True) if not outer for layer in each]
    count = model_args.unlocked_layers
    if count > len(layers):
        raise UserError(f"--unlocked_layers {count}: the {model_args.freeze} encoder has {len(layers)} layers.")
    if not count:
        return []
    parameters = list(tower.parameters())
    first = next(layers[-count].parameters())
    return parameters[next(place for place, parameter in enumerate(parameters) if parameter is first) :]


def find_unused(model, pixel_shape: tuple[int, int, int]) -> set[str]:
    """Names of the parameters that get no gradient in a step: a pooler where another pooling is asked for, mask tokens.

    DDP would wait for them. They are found by a step of a copy without numbers (on PyTorch's meta device).

    Raises:
        UserError: the image processor's size isn't the vision encoder's, or an encoder can't be called as one.
    """
    with torch.device("meta"):
        copy = prepare_forward(type(model)(model.config)).train()
        pixel_values, input_ids = torch.zeros(2, *pixel_shape), torch.zeros(2, 4, dtype=torch.long)
    try:
        outputs = embed_pairs(copy, pixel_values=pixel_values, input_ids=input_ids)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"the two encoders can't be called with images of {pixel_shape[1]} x {pixel_shape[2]} and captions: "
            f"{str(error).splitlines()[0]}"
        ) from error
    sum(output.sum() for output in outputs if output is not None).backward()
    return {name for name, parameter in copy.named_parameters() if parameter.grad is None}


def frozen_modules(model) -> list[nn.Module]:
    """The outermost modules none of whose parameters is trained: they stay in eval mode."""
    found = []
    for child in model.children():
        parameters = list(child.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            found.append(child)
        else:
            found += frozen_modules(child)
    return found


def describe_trained(model) -> list[str]:
    """One line for each part of the model: its parameters, and how many of them are trained."""
    parts = {}
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        total, trained = parts.get(name.split(".")[0], (0, 0))
        parts[name.split(".")[0]] = total + size, trained + size * parameter.requires_grad
    return [f"{name:18} {total:12,} parameters, {trained:12,} trained" for name, (total, trained) in parts.items()]
