"""What makes a step fast: log-probabilities in one call, attention without copies. An import puts both in place."""

import torch
from transformers import AttentionInterface
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
