"""ChatGLM-6B, the first one, is a prefix LM: the prompt is read in both directions, the reply is written left to right.

    python code04_prefix_lm.py

Where it differs from GLM-4, ChatGLM2 and ChatGLM3 (so `convert_to_glm.py` refuses it):
- attention: tokens of the prompt see the whole prompt, tokens of the reply see all before them;
- two positions a token: where it stands in the prompt (of a reply: where [gMASK], which it fills, stands), and how far
  it is into the reply; half of each head is rotated by the one, half by the other;
- LayerNorm, GELU, and residuals scaled by alpha = sqrt(2 layers) of the norm's output.
Sources: Du et al., "GLM" (2022); `modeling_chatglm.py` of ChatGLM-6B (https://github.com/THUDM/ChatGLM-6B).
"""

import torch
import torch.nn.functional as F

PROMPT = ["北", "京", "在", "哪", "？", "[gMASK]"]
REPLY = ["<sop>", "在", "华", "北", "。"]
LAYERS, HIDDEN, HEADS, VOCABULARY = 2, 64, 4, 32


def prefix_mask(prompt_length: int, length: int) -> torch.Tensor:
    """Who sees whom: True at [query, key]; shape [length, length]."""
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[:, :prompt_length] = True
    return mask


def positions_2d(prompt_length: int, mask_position: int, length: int) -> torch.Tensor:
    """Position and block position of each token, shape [2, length]."""
    position = torch.arange(length)
    block_position = (position - prompt_length + 1).clamp(min=0)
    position = torch.where(position < prompt_length, position, mask_position)
    return torch.stack([position, block_position])


def rotate(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Rotary embedding whose pairs are (i, i + half): x [tokens, heads, size], position [tokens]."""
    half = x.shape[-1] // 2
    angles = torch.outer(position, 10000.0 ** (-torch.arange(half) / half))[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def rotate_2d(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The first half of a head by the position, the second by the block position."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([rotate(first, positions[0]), rotate(second, positions[1])], -1)


def forward(weights: dict, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache=None) -> torch.Tensor:
    """Logits [tokens, vocabulary] of the tokens `ids`; `cache` (layer -> keys, values) holds those before them."""
    alpha = (2 * LAYERS) ** 0.5
    x = weights["embedding"][ids]
    for layer in range(LAYERS):
        norm = F.layer_norm(x, [HIDDEN])
        q, k, v = (norm @ weights["qkv", layer]).view(len(ids), HEADS, -1).chunk(3, dim=-1)  # packed head by head
        q, k = rotate_2d(q, positions), rotate_2d(k, positions)
        if cache is not None:
            k, v = (torch.cat([old, new]) for old, new in zip(cache.get(layer, (k[:0], v[:0])), (k, v), strict=True))
            cache[layer] = k, v
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v).flatten(1)
        x = norm * alpha + mixed @ weights["out", layer]
        norm = F.layer_norm(x, [HIDDEN])
        x = norm * alpha + F.gelu(norm @ weights["up", layer], approximate="tanh") @ weights["down", layer]
    return F.layer_norm(x, [HIDDEN]) @ weights["embedding"].T


if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = {"qkv": (HIDDEN, 3 * HIDDEN), "out": (HIDDEN, HIDDEN), "up": (HIDDEN, 256), "down": (256, HIDDEN)}
    weights = {(name, layer): 0.1 * torch.randn(size) for name, size in sizes.items() for layer in range(LAYERS)}
    weights["embedding"] = torch.randn(VOCABULARY, HIDDEN)

    tokens, prompt_length = PROMPT + REPLY, len(PROMPT)
    mask = prefix_mask(prompt_length, len(tokens))
    positions = positions_2d(prompt_length, PROMPT.index("[gMASK]"), len(tokens))
    print("token      position  block  sees")
    for row, token in enumerate(tokens):
        width = 10 - sum(ord(character) > 255 for character in token)
        seen = "".join("■" if sees else "·" for sees in mask[row])
        print(f"{token:{width}} {positions[0, row]:8} {positions[1, row]:6}  {seen}")

    ids = torch.arange(len(tokens))
    logits = forward(weights, ids, mask, positions)

    changed = ids.clone()
    changed[prompt_length - 2] = 20  # the question mark, in the prompt
    moved = (forward(weights, changed, mask, positions) - logits).abs().amax(-1)
    print(f"\nanother last word of the prompt moves its first token's logits by {moved[0]:.3f} (causal attention: 0)")
    changed = ids.clone()
    changed[-1] = 20
    unmoved = (forward(weights, changed, mask, positions) - logits).abs().amax(-1)[:-1].max()
    print(f"another last word of the reply moves those before it by {unmoved:.1e}")

    cache = {}
    parts = [
        forward(weights, ids[:prompt_length], mask[:prompt_length, :prompt_length], positions[:, :prompt_length], cache)
    ]
    for step in range(prompt_length, len(ids)):
        now = slice(step, step + 1)
        parts.append(forward(weights, ids[now], mask[now, : step + 1], positions[:, now], cache))
    step_by_step = (torch.cat(parts) - logits).abs().max()
    print(f"the prompt at once, then token by token with a cache: differs by {step_by_step:.1e}")

    shifted = (forward(weights, ids, mask, positions + torch.tensor([[7], [3]])) - logits).abs().max()
    print(f"all positions moved by 7, all block positions by 3: differs by {shifted:.1e}, only distances count")
    causal = (forward(weights, ids, mask.tril(), positions) - logits).abs().max()
    print(f"\nproof: {moved[0]:.3f} > 0, {unmoved:.1e}, {step_by_step:.1e} and {shifted:.1e} are 0 but for rounding; "
          f"a causal mask would change the logits by {causal:.3f}")  # fmt: skip
    assert moved[0] > 1e-3 and causal > 1e-3 and unmoved == 0 and step_by_step < 1e-5 and shifted < 1e-5
