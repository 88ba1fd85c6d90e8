"""Prompts -> completions by Transformers' generate, over a model whose parts are gathered for it."""

import contextlib

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig


@contextlib.contextmanager
def unsharded(model):
    """All of FSDP2's units gathered once, for as many passes as each rank needs; gradients are sharded as ever.

    Meanwhile a rank holds all parameters, as under ZeRO-2.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.set_reshard_after_backward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)
            unit.set_reshard_after_backward(True, recurse=False)


@torch.no_grad()
def sample_completions(
    model, input_ids, attention_mask, n: int, length: int, stop_tokens: list[int], pad: int, temperature: float
):
    """n completions to each prompt, sampled from all tokens by Transformers' generate.

    It would take what isn't said here from what the model's folder recommends for chatting (top_p, repetition_penalty),
    so that is put aside.

    Args:
        input_ids, attention_mask: [prompts, prompt length], padded on the left.

    Returns:
        Tokens [prompts * n, length], padded after a completion's end, and their log-probabilities at that temperature,
        of no meaning there; a prompt's completions follow one another.
    """
    settings = {"do_sample": True, "top_k": 0, "temperature": temperature, "num_return_sequences": n}
    settings |= {"max_new_tokens": length, "eos_token_id": stop_tokens, "pad_token_id": pad}
    recommended, model.generation_config = model.generation_config, GenerationConfig()
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        generation_config=GenerationConfig(**settings, output_logits=True, return_dict_in_generate=True),
        synced_gpus=False,  # the model is whole in every process, which goes on by itself
    )
    model.generation_config = recommended
    responses = output.sequences[:, input_ids.shape[1] :]
    log_probs = [
        torch.log_softmax(logits.float() / temperature, dim=-1).gather(-1, token[:, None])
        for logits, token in zip(output.logits, responses.T, strict=True)
    ]
    missing = length - responses.shape[1]
    responses = torch.nn.functional.pad(responses, (0, missing), value=pad)
    return responses, torch.nn.functional.pad(torch.cat(log_probs, dim=1), (0, missing))
