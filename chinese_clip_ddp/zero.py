"""What DeepSpeed's ZeRO needs to be told of a dual encoder: its scalars and its batch norms are no matrices."""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config


@contextlib.contextmanager
def without_zero3(args) -> Iterator[None]:
    """Encoders are small: each rank reads them whole, and DeepSpeed shares them out when the training begins.

    Transformers would share them out while it reads them, and fail at CLIP's scalars (DeepSpeed 0.19.8).
    """
    unset_hf_deepspeed_config()
    yield
    if args.deepspeed:
        set_hf_deepspeed_config(args.hf_deepspeed_config)


def scalars_as_vectors(model: nn.Module) -> dict[str, torch.Size]:
    """Makes scalars vectors of length 1, which DeepSpeed can send to the other ranks; returns the shapes they had."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(recurse=False)}
    for name in shapes:
        getattr(model, name).data = getattr(model, name).data.reshape(1)
    return shapes


def batch_norms_in_fp32(model: nn.Module) -> None:
    """DeepSpeed casts weights to bf16 or fp16 and leaves a batch norm's statistics in fp32, with which it can't run."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = partial(batch_norm_in_fp32, module)


def batch_norm_in_fp32(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    weight, bias, statistics = norm.weight.float(), norm.bias.float(), (norm.running_mean, norm.running_var)
    if norm.training:
        norm.num_batches_tracked += 1
    found = F.batch_norm(hidden.float(), *statistics, weight, bias, norm.training, norm.momentum, norm.eps)
    return found.to(hidden.dtype)


@contextlib.contextmanager
def whole(parameter: nn.Parameter, modify: bool = False) -> Iterator[None]:
    """The whole of a parameter, of which under ZeRO-3 each rank has a part."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if modify else None):
        yield


def clamp_master(parameter: nn.Parameter, largest: float) -> None:
    """Bounds the optimizer's fp32 copy, from which the parameter would be restored at the next step."""
    from deepspeed import utils

    if is_deepspeed_zero3_enabled():  # a scalar's whole can't be set there: ranks after the first have only padding
        utils.safe_set_local_fp32_param(parameter, utils.safe_get_local_fp32_param(parameter).clamp(max=largest))
    else:
        utils.safe_set_full_fp32_param(parameter, utils.safe_get_full_fp32_param(parameter).clamp(max=largest))
