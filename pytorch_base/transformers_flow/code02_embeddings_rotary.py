"""Embeddings and rotary positions: a row of a table for each token, then a rotation for each place.

An embedding is a one-hot product that nobody computes: row `id` of the table. It says nothing of the order; in Qwen2
the order enters as a rotation of queries and keys (Su et al., "RoFormer", 2021): pair i of a head's numbers turns by
position * theta^(-2i/dim), so the score of two tokens depends on their distance alone. To read further than the model
was trained for, all pairs turn slower (position interpolation: Chen et al., 2023), or only the slow ones do (YaRN:
Peng et al., 2023).

python code02_embeddings_rotary.py
"""

import math

import torch
from transformers import Qwen2Config, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

TEXT = "雨后的山路上，一只小猫跟着另一只小猫慢慢地走"
THETA, HEAD_DIM, TRAINED_LENGTH = 10_000.0, 16, 64


def inverse_frequencies() -> torch.Tensor:
    """[head_dim / 2]: the angle of each pair for one step, from 1 down to nearly 1 / theta."""
    return THETA ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)


def yarn_frequencies(factor: float, fast: float = 32, slow: float = 1) -> tuple[torch.Tensor, float]:
    """Pairs that turn more than `fast` times within the trained length stay, below `slow` turns they are interpolated.

    Returns:
        Frequencies [head_dim / 2], and the factor of cos and sin that makes up for flatter attention.
    """

    def pair_of(turns: float) -> float:
        return HEAD_DIM * math.log(TRAINED_LENGTH / (turns * 2 * math.pi)) / (2 * math.log(THETA))

    first = max(math.floor(pair_of(fast)), 0)
    last = min(math.ceil(pair_of(slow)), HEAD_DIM - 1)
    share = ((torch.arange(HEAD_DIM // 2) - first) / (last - first)).clamp(0, 1)  # 0: as it was, 1: interpolated
    frequencies = inverse_frequencies()
    return frequencies * (1 - share) + frequencies / factor * share, 0.1 * math.log(factor) + 1


def rotate(states: torch.Tensor, position_ids: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Numbers i and i + dim / 2 of a head are one complex number, and turn by position * frequency i.

    Args:
        states: [batch, heads, length, head_dim], queries or keys.
        position_ids: [batch, length].
        frequencies: [head_dim / 2].
    """
    angles = position_ids[:, None, :, None] * frequencies  # [batch, 1, length, head_dim / 2]
    pairs = torch.complex(*states.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def library_rotary(parameters: dict) -> Qwen2RotaryEmbedding:
    config = Qwen2Config(hidden_size=4 * HEAD_DIM, num_attention_heads=4, max_position_embeddings=TRAINED_LENGTH)
    config.rope_parameters = {"rope_theta": THETA, **parameters}
    return Qwen2RotaryEmbedding(config)


torch.manual_seed(0)
vocabulary = sorted(set(TEXT))
input_ids = torch.tensor([[vocabulary.index(character) for character in TEXT]])  # [1, length]
config = Qwen2Config(
    vocab_size=len(vocabulary),
    hidden_size=4 * HEAD_DIM,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
)
embed_tokens = Qwen2Model(config).get_input_embeddings()
table = embed_tokens.weight  # [vocabulary, hidden_size]
rows = table[input_ids]
one_hot = torch.nn.functional.one_hot(input_ids, len(vocabulary)).float()
lookup = max((embed_tokens(input_ids) - other).abs().max().item() for other in (rows, one_hot @ table))
first, second = TEXT.index("猫"), TEXT.rindex("猫")
print(f"{len(TEXT)} characters, {len(vocabulary)} rows; 猫 at {first} and at {second} has the same row:", end=" ")
print(torch.equal(rows[0, first], rows[0, second]))
embed_tokens(input_ids[:, :4]).sum().backward()
print(f"rows with a gradient after {TEXT[:4]}: {''.join(vocabulary[i] for i in table.grad.any(1).nonzero())}")

query, key = torch.randn(2, 1, 4, len(TEXT), HEAD_DIM)
position_ids = torch.arange(len(TEXT))[None]
rotary = library_rotary({"rope_type": "default"})
expected = apply_rotary_pos_emb(query, key, *rotary(query, position_ids))
frequencies = inverse_frequencies()
rotated = [rotate(states, position_ids, frequencies) for states in (query, key)]
rotation = max((ours - theirs).abs().max().item() for ours, theirs in zip(rotated, expected, strict=True))

print("\nscore of one query and one key at places (m, n):")
scores = {}
for m, n in ((5, 2), (15, 12), (1005, 1002), (5, 3), (15, 13)):
    turned = rotate(query[:, :1, :1], torch.tensor([[m]]), frequencies)
    scores[m, n] = (turned * rotate(key[:, :1, :1], torch.tensor([[n]]), frequencies)).sum().item()
    print(f"  {(m, n)}, distance {m - n}: {scores[m, n]:.3f}")
drift = max(
    abs(scores[5, 2] - scores[15, 12]), abs(scores[5, 2] - scores[1005, 1002]), abs(scores[5, 3] - scores[15, 13])
)

yarn, attention_factor = yarn_frequencies(4.0)
pairs = {
    "default": (frequencies, rotary),
    "linear": (frequencies / 4, library_rotary({"rope_type": "linear", "factor": 4.0})),
    "yarn": (yarn, library_rotary({"rope_type": "yarn", "factor": 4.0})),
}
print("\nangle by which each pair turns at one step, for 4 times the trained length:")
for name in pairs:
    print(f"  {name:8}", *[f"{frequency:.5f}" for frequency in pairs[name][0]])
scaling = max((ours - theirs.inv_freq).abs().max().item() for ours, theirs in pairs.values())
scaling = max(scaling, abs(attention_factor - pairs["yarn"][1].attention_scaling))

assert max(lookup, rotation, scaling) < 1e-6 and drift < 1e-4 and abs(scores[5, 2] - scores[5, 3]) > 0.1
print(f"\nproof: differences from the library: lookup {lookup:.1e}, rotation {rotation:.1e}, ", end="")
print(f"linear and YaRN {scaling:.1e}; at one distance scores differ by {drift:.1e}")
