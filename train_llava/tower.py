"""Which vision towers a LLaVA can have, and what can be known of one without its weights: its shapes, its unused parts.

Every question is asked of the tower's own class on PyTorch's meta device, where tensors have shapes and no numbers.
"""

import copy
from math import isqrt

import torch
from PIL import Image
from torch import nn
from transformers import MODEL_MAPPING, LlavaConfig, LlavaProcessor

from files import UserError

# Vision towers, and whether what they give begins with a class token, which is no part of the picture.
CLASS_TOKEN = {
    "clip_vision_model": True,
    "chinese_clip_vision_model": True,
    "siglip_vision_model": False,
    "vit": True,
    "dinov2": True,
    "swin": False,
    "focalnet": False,
    "levit": False,
}


def feature_layers(config: LlavaConfig) -> list[int]:
    layers = config.vision_feature_layer
    return [layers] if isinstance(layers, int) else list(layers)


def empty_tower(config: LlavaConfig) -> nn.Module:
    """The vision tower without numbers (on PyTorch's meta device), for asking what it would do."""
    with torch.device("meta"):  # LeViT's class changes the config that it is given
        return MODEL_MAPPING[type(config.vision_config)](copy.deepcopy(config.vision_config))


def feature_shape(config: LlavaConfig, pixel_shape: tuple[int, int, int], path: str) -> tuple[int, int]:
    """(positions, width) of a feature layer for a picture of (3, height, width), class token included.

    Raises:
        UserError: the tower doesn't take such pictures, or has no such layer, or its layers don't fit together.
    """
    pixel_values, layers = torch.zeros(1, *pixel_shape, device="meta"), feature_layers(config)
    try:
        hidden_states = empty_tower(config).eval()(pixel_values, output_hidden_states=True).hidden_states
    except (ValueError, RuntimeError) as error:
        size = getattr(config.vision_config, "image_size", "?")
        raise UserError(
            f"{path}: the image processor gives pictures of {pixel_shape[1]} x {pixel_shape[2]}, the vision tower's "
            f"config says {size}: {str(error).splitlines()[0]}"
        ) from None
    count = len(hidden_states)
    if not all(-count <= layer < count for layer in layers):
        raise UserError(
            f"{path}: vision_feature_layer {layers}: the tower gives {count}, from {-count} to {count - 1}."
        )
    shapes = {tuple(hidden_states[layer].shape[1:]) for layer in layers}
    if len(shapes) > 1:
        raise UserError(f"{path}: vision_feature_layer {layers}: they are of different shapes, {sorted(shapes)}.")
    return shapes.pop()


def unused_in_tower(config: LlavaConfig) -> set[str]:
    """Names of the tower's parameters that no chosen feature depends on: later layers, poolers, mask tokens."""
    tower, side = empty_tower(config).train(), config.vision_config.image_size
    side = (side, side) if isinstance(side, int) else side
    hidden_states = tower(torch.zeros(2, 3, *side, device="meta"), output_hidden_states=True).hidden_states
    features = torch.cat([hidden_states[layer] for layer in feature_layers(config)], dim=-1)
    features[:, int(config.vision_feature_select_strategy == "default") :].sum().backward()
    return {name for name, parameter in tower.named_parameters() if parameter.grad is None}


def keep_in_eval(module: nn.Module) -> None:
    module.eval()
    module.train = lambda mode=True: module


def fit_processor(processor: LlavaProcessor, config: LlavaConfig, path: str) -> int:
    """Makes the processor set as many image tokens as the model has features for a picture; returns that number.

    What the processor's file says of it is not trusted: it is often missing or another tower's (LLaVA's most frequent
    error), and it knows nothing of towers that make a picture smaller in several stages.

    Raises:
        UserError: the tower doesn't take pictures of the processor's size.
    """
    pixels = processor.image_processor(Image.new("RGB", (64, 48)), return_tensors="pt")["pixel_values"]
    height, width = pixels.shape[-2:]
    positions, _ = feature_shape(config, tuple(pixels.shape[1:]), path)
    side = height // isqrt(positions)
    processor.patch_size, processor.num_additional_image_tokens = side, positions - (height // side) * (width // side)
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    return positions - (config.vision_feature_select_strategy == "default")
