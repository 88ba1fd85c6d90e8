"""verl's FSDP2 engine, with a prompt computed once for all of its replies instead of once for each."""

import contextlib
import copy

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache
from verl.utils import tensordict_utils as tu
from verl.utils import torch_functional
from verl.utils.device import get_device_id, get_device_name
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from layers import log_probs_of_labels

MODEL_TYPE = "language_model_shared_prompt"
PARTS = 4  # replies of like length make up a part of a micro-batch, which is padded to its own longest only


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


def read_prompts(model, input_ids, attention_mask) -> DynamicCache:
    """Keys and values of all but the last token of each prompt; gradients go through.

    Args:
        input_ids, attention_mask: [prompts, prompt length], padded on the left.
    """
    cache = DynamicCache(config=model.config)
    model(
        input_ids=input_ids[:, :-1],
        attention_mask=attention_mask[:, :-1],
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0)[:, :-1],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return cache


def select_rows(cache: DynamicCache, rows) -> DynamicCache:
    """A cache of these rows of another one, which stays as it is."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(rows)
    return selected


@EngineRegistry.register(model_type=MODEL_TYPE, backend="fsdp2", device=["cuda", "npu"])
class SharedPromptEngine(FSDPEngineWithLMHead):
    """Rows come in groups of `force_group_size` with the same prompt, one after the other.

    The same log-probabilities and gradients as verl's engine gives, since a causal model's prompt doesn't depend on
    what follows. With replies as long as their prompt and groups of 8 it computes 9/16 of the tokens.
    """

    def __init__(self, model_config, **configs):
        model_config.model_type = "language_model"
        super().__init__(model_config=model_config, **configs)

    def forward_backward_batch(self, data, loss_function, forward_only=False):
        # A prompt's gradient comes by way of its keys and values, past the hooks by which FSDP2 gathers a layer anew.
        with unsharded(self.module):
            return super().forward_backward_batch(data, loss_function, forward_only)

    def forward_step(self, micro_batch, loss_function, forward_only):
        micro_batch = micro_batch.to(get_device_id())
        n = tu.get_non_tensor_data(micro_batch, "force_group_size", default=1)
        temperature = tu.get_non_tensor_data(micro_batch, "temperature", default=1.0)
        prompts, responses, mask = (micro_batch[name] for name in ("prompts", "responses", "attention_mask"))
        width = prompts.shape[1]
        said = mask[:, width:].bool()
        lengths = said.sum(1)
        places = self.places_of_replies(micro_batch, lengths, said.shape[1])
        calculate_entropy = tu.get_non_tensor_data(micro_batch, "calculate_entropy", default=False)
        half = self._autocast_dtype
        precision = contextlib.nullcontext() if half == torch.float32 else torch.autocast(get_device_name(), dtype=half)
        found = {"log_probs": [], "entropy": [], "places": []}
        with precision:
            cache = read_prompts(self.module, prompts[::n], mask[::n, :width])
            for rows in lengths.argsort().chunk(PARTS):
                longest = int(lengths[rows].max())
                here, labels = said[rows, :longest], responses[rows, :longest]
                mask_here = mask[rows, : width + longest - 1]
                logits = self.module(
                    input_ids=torch.cat([prompts[rows, -1:], labels[:, :-1]], dim=1),
                    attention_mask=mask_here,
                    position_ids=(mask_here.cumsum(1) - 1)[:, width - 1 :],
                    past_key_values=select_rows(cache, rows // n),
                    use_cache=True,
                ).logits[here]
                logits = logits.float() / temperature
                found["log_probs"].append(log_probs_of_labels(logits, labels[here]))
                if calculate_entropy:
                    found["entropy"].append(torch_functional.entropy_from_logits(logits))
                found["places"].append(places[rows, :longest][here])
            places = torch.cat(found.pop("places"))
            model_output = {
                name: self.at_their_places(torch.cat(values), places, micro_batch)
                for name, values in found.items()
                if values
            }
            loss, metrics = torch.ones((), device=logits.device), {}
            if loss_function is not None:
                group = self.get_data_parallel_group()
                loss, metrics = loss_function(model_output=model_output, data=micro_batch, dp_group=group)
        outputs = {name: values.detach() for name, values in model_output.items()}
        return loss, {"model_output": outputs, "loss": loss.detach().item(), "metrics": metrics}

    @staticmethod
    def places_of_replies(micro_batch, lengths, reply_length: int):
        """Where verl looks for what belongs to a reply's tokens: one place before the token, all rows in one line.

        Args:
            lengths: tokens of each reply [rows].

        Returns:
            [rows, reply_length]; of no meaning after a reply's end.
        """
        first = micro_batch["input_ids"].offsets()[1:] - lengths - 1
        return first[:, None] + torch.arange(reply_length, device=lengths.device)

    @staticmethod
    def at_their_places(values, places, micro_batch):
        """Values [tokens] at their places, zero elsewhere: a nested tensor as long as prompt and reply of each row."""
        offsets = micro_batch["input_ids"].offsets()
        flat = torch.zeros(int(offsets[-1]), dtype=values.dtype, device=values.device).index_put((places,), values)
        return torch.nested.nested_tensor_from_jagged(flat, offsets)
