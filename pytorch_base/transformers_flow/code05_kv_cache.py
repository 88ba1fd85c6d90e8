"""The KV cache: what has been computed for earlier tokens is kept, so each new token is one step and not a new text.

Keys and values of a token depend on it and what came before, never on what comes later, so they can be kept. Each step
then works on one token: 2 * layers * kv_heads * head_dim numbers a token of memory buy time that grows with the length
alone instead of its square (Pope et al., "Efficiently Scaling Transformer Inference", 2022).

python code05_kv_cache.py
"""

import time

import torch
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

TEXT = "夜里下了一场大雪，早上推开门，院子里一片白"
LAYERS, HEADS, KV_HEADS, HEAD_DIM, NEW_TOKENS = 2, 4, 2, 32, 128


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions. states: [1, heads, length, head_dim]; cos, sin: [length, head_dim]."""
    left, right = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-right, left], dim=-1) * sin


def attend(module, states: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
    """One layer's attention, for the tokens that are not in the cache yet.

    Args:
        module: Qwen2Attention, of which only the weights are used.
        states: [1, new, hidden].
        kept: keys and values [1, kv_heads, past, head_dim] of this layer; the new ones are added to it.
    """
    past, new = kept[0].shape[2], states.shape[1]
    projections = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = [layer(states).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for layer in projections]
    place = torch.arange(past, past + new)  # a new token's place is counted from the start of the text
    angles = (place[:, None] * 10_000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)).repeat(1, 2)
    query, key = rotate(query, angles.cos(), angles.sin()), rotate(key, angles.cos(), angles.sin())
    kept[0], kept[1] = torch.cat([kept[0], key], dim=2), torch.cat([kept[1], value], dim=2)  # keys are kept rotated
    mask = torch.arange(past + new) <= place[:, None]
    mixed = F.scaled_dot_product_attention(query, *kept, attn_mask=mask, enable_gqa=True)
    return module.o_proj(mixed.transpose(1, 2).flatten(2))


def empty_cache() -> list[list[torch.Tensor]]:
    """Of each layer keys and values, [1, kv_heads, 0, head_dim] each."""
    return [[torch.empty(1, KV_HEADS, 0, HEAD_DIM) for _ in range(2)] for _ in range(LAYERS)]


def forward(model, input_ids: torch.Tensor, cache: list[list[torch.Tensor]]) -> torch.Tensor:
    """Ids [1, new] that come after what the cache holds -> logits [1, new, vocabulary]. The cache grows by them."""
    states = model.model.embed_tokens(input_ids)
    for layer, kept in zip(model.model.layers, cache, strict=True):
        states = states + attend(layer.self_attn, layer.input_layernorm(states), kept)
        states = states + layer.mlp(layer.post_attention_layernorm(states))
    return model.lm_head(model.model.norm(states))


def generate(model, input_ids: torch.Tensor, use_cache: bool) -> tuple[torch.Tensor, list, float]:
    """Greedy. Returns the ids [1, length + NEW_TOKENS], the cache, and the seconds it took."""
    begin, cache, unseen = time.perf_counter(), empty_cache(), input_ids
    for _ in range(NEW_TOKENS):
        token = forward(model, unseen, cache)[:, -1].argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, token], dim=1)
        cache, unseen = (cache, token) if use_cache else (empty_cache(), input_ids)
    return input_ids, cache, time.perf_counter() - begin


torch.manual_seed(0)
torch.set_grad_enabled(False)
characters = sorted(set(TEXT))
prompt = torch.tensor([[characters.index(character) for character in TEXT]])
config = Qwen2Config(
    vocab_size=len(characters),
    hidden_size=HEADS * HEAD_DIM,
    intermediate_size=256,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    initializer_range=0.1,
)
model = Qwen2ForCausalLM(config).eval()
with_cache, cache, short = generate(model, prompt, use_cache=True)
without, _, long = generate(model, prompt, use_cache=False)
settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
theirs = model.generate(prompt, **settings)
assert torch.equal(with_cache, without) and torch.equal(with_cache, theirs.sequences)
print(TEXT, "->", "".join(characters[i] for i in with_cache[0, len(TEXT) :][:40]))

gap = 0.0
for kept, layer in zip(cache, theirs.past_key_values.layers, strict=True):
    gap = max(gap, (kept[0] - layer.keys).abs().max().item(), (kept[1] - layer.values).abs().max().item())
held = cache[0][0].shape[2]  # the last token was never fed
measured = sum(tensor.numel() * tensor.element_size() for kept in cache for tensor in kept)
formula = 2 * LAYERS * KV_HEADS * HEAD_DIM * held * 4
print(f"cache of {held} tokens: {measured:,} bytes; 2 * layers * kv_heads * head_dim * length * 4 = {formula:,}")
print(f"{NEW_TOKENS} tokens in {short:.2f} s with the cache, {long:.2f} s without it")
assert measured == formula and held == len(TEXT) + NEW_TOKENS - 1 and gap < 1e-5
print(
    f"proof: {NEW_TOKENS} ids with and without the cache equal the library's, keys and values differ from its by "
    f"{gap:.1e}; {measured:,} bytes as by the formula, {long / short:.1f} times as fast here"
)
