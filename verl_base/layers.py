"""What makes a step fast. The first two are put in place when this is imported.

log_probs_of_labels  one call for all tokens
grouped_sdpa         query heads share keys and values without a copy
PreallocatedLayer    a cache to which a token is added without a copy of those before it
SampledTokens        sampling by one random number a token instead of one for each word of the vocabulary
"""

import torch
from transformers import AttentionInterface, LogitsProcessor
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from verl.utils import torch_functional


def log_probs_of_labels(logits, labels):
    """Log-probabilities of the labels, for all tokens in one call: logits [tokens, vocabulary], labels [tokens].

    Where FlashAttention's cross-entropy isn't installed, verl takes one call, and one node of the graph, a token.
    """
    return -torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")


torch_functional.logprobs_from_logits_v2 = log_probs_of_labels


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


AttentionInterface.register("sdpa", grouped_sdpa)


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
