"""What makes a step fast and leaves its numbers as they are; `--fast_path false` trains without this file.

SharedPromptEngine    a prompt is computed once for all of its completions, in the reference and in training
sample_completions    and in sampling; finished completions are dropped
PreallocatedLayer     a cache to which a token is added without a copy of those before it
SampledTokens         sampling by one random number a token instead of one for each word of the vocabulary
grouped_sdpa          query heads share keys and values without a copy
log_probs_of_labels   one call for all tokens
install               puts them in place, in the process that asks for it
"""

import contextlib
import copy

import torch
from transformers import AttentionInterface, DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from verl.utils import tensordict_utils as tu
from verl.utils import torch_functional
from verl.utils.device import get_device_id, get_device_name
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from rollout import unsharded

MODEL_TYPE = "language_model_shared_prompt"
PARTS = 4  # completions of like length make up a part of a micro-batch, which is padded to its own longest only
STRETCH = 16  # tokens between two looks at which completions are finished
SAMPLED_AT_ONCE = 8  # times the tokens of a training pass that are sampled at once, since sampling keeps no activations


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


class SharedPromptEngine(FSDPEngineWithLMHead):
    """verl's FSDP2 engine for rows that come in groups of `force_group_size` with the same prompt, one after the other.

    The same log-probabilities and gradients as verl's engine gives, since a causal model's prompt doesn't depend on
    what follows. With completions as long as their prompt and groups of 8 it computes 9/16 of the tokens.
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
        places = self.places_of_completions(micro_batch, lengths, said.shape[1])
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
    def places_of_completions(micro_batch, lengths, completion_length: int):
        """Where verl looks for what belongs to a completion's tokens: one place before the token, all rows in one line.

        Args:
            lengths: tokens of each completion [rows].

        Returns:
            [rows, completion_length]; of no meaning after a completion's end.
        """
        first = micro_batch["input_ids"].offsets()[1:] - lengths - 1
        return first[:, None] + torch.arange(completion_length, device=lengths.device)

    @staticmethod
    def at_their_places(values, places, micro_batch):
        """Values [tokens] at their places, zero elsewhere, in a nested tensor of rows of prompt and completion."""
        offsets = micro_batch["input_ids"].offsets()
        flat = torch.zeros(int(offsets[-1]), dtype=values.dtype, device=values.device).index_put((places,), values)
        return torch.nested.nested_tensor_from_jagged(flat, offsets)


@torch.no_grad()
def sample_completions(
    model, input_ids, attention_mask, n: int, completion_length: int, stop_tokens, pad: int, temperature
):
    """What `rollout.sample_completions` does, from the same probabilities by other random numbers.

    A prompt's keys and values are computed once and then shared by its completions. generate would go on with a
    finished completion until the last one is finished: it is called for STRETCH tokens at a time, and goes on with the
    unfinished ones.

    Args:
        temperature: a number, or one for each completion [prompts * n, 1].
    """
    cache = read_prompts(model, input_ids, attention_mask)
    cache.batch_repeat_interleave(n)
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = PreallocatedLayer(layer, STRETCH)
    sequences, mask = input_ids.repeat_interleave(n, 0), attention_mask.repeat_interleave(n, 0)
    temperature = torch.as_tensor(temperature, device=sequences.device).expand(len(sequences), 1)
    stops = torch.tensor(stop_tokens, device=sequences.device)
    responses = sequences.new_full((len(sequences), completion_length), pad)
    log_probs = torch.zeros(responses.shape, device=responses.device)
    unfinished = torch.arange(len(sequences), device=responses.device)
    recommended, model.generation_config = model.generation_config, GenerationConfig()
    for start in range(0, completion_length, STRETCH):
        sampled = SampledTokens(temperature)
        length = min(STRETCH, completion_length - start)
        sequences = model.generate(
            input_ids=sequences,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=GenerationConfig(max_new_tokens=length, eos_token_id=stop_tokens, pad_token_id=pad),
            logits_processor=LogitsProcessorList([sampled]),
            synced_gpus=False,  # the model is whole in every process, which goes on by itself
        )
        said = sequences[:, input_ids.shape[1] + start :]
        responses[unfinished, start : start + said.shape[1]] = said
        log_probs[unfinished, start : start + said.shape[1]] = torch.cat(sampled.log_probs, dim=1)
        goes_on = ~torch.isin(said, stops).any(1)
        if not goes_on.any():
            break
        unfinished, sequences, temperature = unfinished[goes_on], sequences[goes_on], temperature[goes_on]
        mask = torch.nn.functional.pad(mask[goes_on], (0, said.shape[1]), value=1)
        cache.batch_select_indices(goes_on)
    model.generation_config = recommended
    return responses, log_probs


class PreallocatedLayer(DynamicLayer):
    """Keys and values [rows, key heads, length, head size] of a layer, in buffers with capacity for what comes next.

    DynamicLayer would copy all of them for every new token.

    Args:
        layer: what it starts with.
        capacity: tokens that can be added before rows are selected again.
    """

    def __init__(self, layer: DynamicLayer, capacity: int):
        super().__init__()
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, True
        self.capacity = capacity
        self.allocate()

    def allocate(self) -> None:
        self.buffers = [
            torch.nn.functional.pad(states, (0, 0, 0, self.capacity)) for states in (self.keys, self.values)
        ]

    def update(self, key_states, value_states, *args, **kwargs):
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices) -> None:
        super().batch_select_indices(indices)
        self.allocate()


class SampledTokens(LogitsProcessor):
    """Samples the next token itself and keeps its log-probability; a greedy generate then takes what was sampled.

    By inverse transform: the token in whose share of the cumulated probabilities one uniform number falls.

    Args:
        temperature: a number, or one for each row [rows, 1].
    """

    def __init__(self, temperature):
        self.temperature, self.log_probs = temperature, []

    def __call__(self, input_ids, scores):
        log_probs = torch.log_softmax(scores.float() / self.temperature, dim=-1)
        cumulated = log_probs.exp().cumsum(-1, dtype=torch.float64)
        uniform = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device)
        sampled = torch.searchsorted(cumulated, cumulated[:, -1:] * uniform, right=True)
        self.log_probs.append(log_probs.gather(-1, sampled))
        return torch.zeros_like(scores).scatter(-1, sampled, 1)


def grouped_sdpa(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Transformers' sdpa, which copies keys and values for each query head that shares them, without that copy.

    The query heads of a key head stand in its rows instead, one after the other, and the mask is copied for each of
    them. Where that would be the larger copy, or there is no mask, it is left to Transformers.

    Args:
        query: [rows, query heads, length, head size].
        key, value: [rows, key heads, length so far, head size].
        attention_mask: [rows, 1, length, length so far], or None where nothing is hidden but what follows.

    Returns:
        [rows, length, query heads, head size], and None for the weights.
    """
    (rows, heads, length, size), key_heads = query.shape, key.shape[1]
    if attention_mask is None or heads == key_heads or length > 2 * key_heads * size:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    output = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(rows, key_heads, -1, size),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, heads // key_heads, 1),
        dropout_p=dropout,
        scale=scaling,
    )
    return output.view(query.shape).transpose(1, 2).contiguous(), None


def log_probs_of_labels(logits, labels):
    """Log-probabilities of the labels, for all tokens in one call: logits [tokens, vocabulary], labels [tokens].

    Where FlashAttention's cross-entropy isn't installed, verl takes one call, and one node of the graph, a token.
    """
    return -torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def install() -> None:
    """Registers the engine with verl, and gives verl and Transformers these log-probabilities and this attention."""
    EngineRegistry.register(model_type=MODEL_TYPE, backend="fsdp2", device=["cuda", "npu"])(SharedPromptEngine)
    torch_functional.logprobs_from_logits_v2 = log_probs_of_labels
    AttentionInterface.register("sdpa", grouped_sdpa)
