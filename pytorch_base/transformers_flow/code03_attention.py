"""Attention: each token asks (query), all tokens up to it answer (key), and what they say (value) is mixed.

softmax(query keyᵀ / sqrt(head_dim) + mask) value (Vaswani et al., "Attention Is All You Need", 2017). With grouped
queries several query heads share one key and value head (Ainslie et al., "GQA", 2023), which is what makes the KV cache
small. A mask says who may hear whom: no one the future (causal), no one the padding, and in a layer with a sliding
window no one what lies further back (Beltagy et al., "Longformer", 2020). All of it is held against Qwen2Attention.

python code03_attention.py
"""

import math
from itertools import product

import torch
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2Model

TEXTS = ["小船顺着河水慢慢漂向远方", "月亮升起来了"]
HEADS, HEAD_DIM, WINDOW = 4, 16, 4


def build_mask(attention_mask: torch.Tensor, window: int | None) -> torch.Tensor:
    """Who may hear whom.

    Args:
        attention_mask: [batch, length], 1 for tokens and 0 for padding.
        window: how many places a token hears, its own among them; None for all.

    Returns:
        [batch, 1, length, length], True where the query (row) hears the key (column).
    """
    place = torch.arange(attention_mask.shape[1])
    distance = place[:, None] - place
    hears = (distance >= 0) & (distance < (window or math.inf))
    return hears & attention_mask.bool()[:, None, None, :]


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions. states: [batch, heads, length, head_dim]; cos, sin: [batch, length, head_dim]."""
    left, right = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat([-right, left], dim=-1) * sin[:, None]


def project(weights: dict, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> list[torch.Tensor]:
    """[batch, length, hidden] -> query [batch, heads, length, head_dim], key and value with their own, fewer heads."""
    flat = [F.linear(hidden_states, weights[f"{name}_proj.weight"], weights[f"{name}_proj.bias"]) for name in "qkv"]
    query, key, value = [states.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for states in flat]
    return [rotate(query, cos, sin), rotate(key, cos, sin), value]


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Each key and value head answers heads / kv_heads query heads. Returns [batch, heads, length, head_dim]."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.transpose(2, 3) / HEAD_DIM**0.5
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # -inf would make NaN of a row without any key
    return scores.softmax(dim=-1) @ value


def run_library(implementation: str, kv_heads: int, window: int | None, inputs: dict) -> tuple[dict, dict]:
    """A random Qwen2Model of one layer.

    Returns:
        Weights of its attention, and what went in (`hidden_states`, `position_embeddings`, `attention_mask`) and came
        out (`output`) there.
    """
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        use_sliding_window=window is not None,
        sliding_window=window,
        max_window_layers=0,
        initializer_range=0.2,
        attn_implementation=implementation,
    )
    model, seen = Qwen2Model(config), {}
    attention = model.layers[0].self_attn
    attention.register_forward_hook(lambda _, args, kwargs, out: seen.update(kwargs, output=out[0]), with_kwargs=True)
    with torch.no_grad():
        model(**inputs, use_cache=False)
    return attention.state_dict(), seen


characters = sorted({character for text in TEXTS for character in text})
length = max(map(len, TEXTS))
rows = [[0] * (length - len(text)) + [1 + characters.index(character) for character in text] for text in TEXTS]
input_ids = torch.tensor(rows)  # [batch, length], padded on the left
attention_mask = (input_ids > 0).long()

for window in (None, WINDOW):
    print(f"who hears whom, window {window}:")
    for character, first, second in zip(TEXTS[0], *build_mask(attention_mask, window)[:, 0], strict=True):
        print("  " + character, *["".join("■" if hears else "·" for hears in row) for row in (first, second)])

differences = {"eager": 0.0, "sdpa": 0.0, "F.scaled_dot_product_attention": 0.0}
inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": torch.arange(length)[None]}
is_token = attention_mask.bool()  # what padding hears matters to nobody
for implementation, kv_heads, window in product(("eager", "sdpa"), (4, 2, 1), (None, WINDOW)):
    weights, seen = run_library(implementation, kv_heads, window, inputs)
    mask = build_mask(attention_mask, window)
    query, key, value = project(weights, seen["hidden_states"], *seen["position_embeddings"])
    mixed = attend(query, key, value, mask).transpose(1, 2)
    fused = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    output = F.linear(mixed.flatten(2), weights["o_proj.weight"])
    pairs = {implementation: (output, seen["output"]), "F.scaled_dot_product_attention": (mixed, fused)}
    for name, (ours, theirs) in pairs.items():
        differences[name] = max(differences[name], (ours - theirs)[is_token].abs().max().item())
    if implementation == "sdpa":
        their_mask = seen["attention_mask"].transpose(1, 2)[is_token]
        assert torch.equal(mask.transpose(1, 2)[is_token], their_mask)
    if implementation == "sdpa" and window is None:
        print(f"{kv_heads} of {HEADS} heads have a key and value: {(key.numel() + value.numel()) * 4:,} bytes to keep")
assert max(differences.values()) < 1e-5
print("proof: 12 cases differ by at most", *[f"{value:.1e} ({name})" for name, value in differences.items()])
