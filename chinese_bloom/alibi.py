"""Rows without padding for BLOOM and Falcon, whose attention is code of their own that fast_path.py can't exchange.

BLOOM knows of positions only by a bias that is added to each score and grows with the distance between two tokens
(ALiBi; Press et al., "Train Short, Test Long", 2021). It depends on nothing else, so one tensor for the longest
example serves all examples, layers and batches. Falcon has rotary positions, or (falcon-rw) a bias of its own.
"""

import math
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.bloom import modeling_bloom as bloom
from transformers.models.falcon import modeling_falcon as falcon

from fast_path import FastPath, packed_sdpa


def bloom_bias(heads: int, head_dim: int, length: int, device) -> torch.Tensor:
    """Shape (heads, length, length), fp32: slope x (key - query), which is 0 for a token and itself.

    The model itself adds slope x key, which is the same for a softmax over the keys; the distance keeps its digits in
    half precision, where far positions lose theirs.
    """
    (slopes,) = bloom.build_alibi_tensor(torch.ones(1, 2, device=device), heads, torch.float32)[..., 1].T
    positions = torch.arange(length, device=device)
    return slopes[:, None, None] * (positions[None] - positions[:, None])


def falcon_bias(heads: int, head_dim: int, length: int, device) -> torch.Tensor:
    """Shape (heads, length, length), fp32: falcon-rw's, which it rounds to bf16 and scales like the scores."""
    bias = falcon.build_alibi_tensor(torch.ones(1, length, dtype=torch.long, device=device), heads, torch.float32)
    return bias.expand(heads, length, length) / math.sqrt(head_dim)


class Rows(SimpleNamespace):
    """What the attention of all layers must know of a batch; the layers between hand it no arguments.

    It stays until the next forward pass, since activation checkpointing computes the layers again in the backward pass.
    """

    def bias(self, build, attention: nn.Module, query: torch.Tensor) -> torch.Tensor:
        """Shape (1, heads, longest, longest), in the query's dtype, minus infinity where a key comes after a query."""
        longest, kept = max(self.sequence_lengths), self.kept_bias
        if kept is None or kept.shape[-1] < longest or kept.dtype != query.dtype or kept.device != query.device:
            kept = build(attention.num_heads, attention.head_dim, longest, query.device)
            later = torch.ones(longest, longest, dtype=torch.bool, device=query.device).triu(1)
            self.kept_bias = kept = kept.masked_fill(later, -math.inf)[None].to(query.dtype)
        return kept


def attend_apart(query, key, value, lengths: list[int], bias: torch.Tensor) -> torch.Tensor:
    """Attention within each example of a row; query, key, value: (1, heads, tokens, head_dim), returned alike."""
    outputs = []
    for q, k, v in zip(*(states.split(lengths, 2) for states in (query, key, value)), strict=True):
        length = q.shape[2]
        outputs.append(F.scaled_dot_product_attention(q, k, v, bias[:, :, :length, :length]))
    return torch.cat(outputs, 2)


def bloom_attention(attention: nn.Module, rows: Rows, hidden_states, residual, **unused):
    """BloomAttention.forward for a row of examples one after the other; hidden_states: (1, tokens, hidden)."""
    query, key, value = attention._reshape(attention.query_key_value(hidden_states))
    bias = rows.bias(bloom_bias, attention, query)
    context = attend_apart(query, key, value, rows.sequence_lengths, bias).transpose(1, 2).flatten(2)
    dropout = attention.hidden_dropout
    return bloom.dropout_add(attention.dense(context), residual, dropout, attention.training), None


def falcon_attention(attention: nn.Module, rows: Rows, hidden_states, alibi, position_embeddings=None, **unused):
    """FalconAttention.forward for a row of examples one after the other; hidden_states: (1, tokens, hidden)."""
    split = attention._split_heads(attention.query_key_value(hidden_states))
    query, key, value = (states.transpose(1, 2) for states in split)
    if alibi is None:
        query, key = falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
        context, _ = packed_sdpa(attention, query, key, value, None, **rows.packed)
    else:
        key, value = key.expand_as(query), value.expand_as(query)
        bias = rows.bias(falcon_bias, attention, query)
        context = attend_apart(query, key, value, rows.sequence_lengths, bias).transpose(1, 2)
    return attention.dense(context.flatten(2)), None


PADDING_FREE = {bloom.BloomAttention: bloom_attention, falcon.FalconAttention: falcon_attention}


class AlibiFastPath(FastPath):
    """FastPath that also knows the attention of BLOOM and Falcon."""

    def keep_examples_apart(self, undo: ExitStack) -> None:
        model = self.trainer.model
        layers = [module for module in model.modules() if type(module) in PADDING_FREE]
        if not layers:
            return super().keep_examples_apart(undo)
        if model.config.attention_dropout:
            raise ValueError("attention_dropout is above 0, which is not rebuilt")
        if getattr(model.config, "slow_but_exact", False):
            raise ValueError("slow_but_exact is not rebuilt")
        rows = Rows(sequence_lengths=None, kept_bias=None, packed=None)

        def take_lengths(module, args, kwargs):
            packed = ("sequence_lengths", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
            rows.packed = {name: kwargs.pop(name) for name in packed}
            rows.sequence_lengths = rows.packed["sequence_lengths"]
            return args, kwargs

        hook = model.register_forward_pre_hook(take_lengths, with_kwargs=True)
        undo.callback(hook.remove)
        for layer in layers:
            self.replace_forward(undo, layer, partial(PADDING_FREE[type(layer)], layer, rows))
        # There is no mask of that name, so none is built, which would be as large as the whole batch squared.
        undo.callback(setattr, model.config, "_attn_implementation", model.config._attn_implementation)
        model.config._attn_implementation = "packed_sdpa"
        undo.callback(setattr, self, "padding_free", False)
        self.padding_free = True
