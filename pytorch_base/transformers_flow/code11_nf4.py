"""Weights in 4 bits by hand: NF4 with its 16 values, two codes in a byte, and scales that are quantised once more.

A block of 64 weights shares a scale, its largest number. Weights are nearly normal, so the 16 values that a code stands
for are quantiles of the normal distribution, each about as likely as the others. 32 bits of scale would add half a bit
to each weight; in 8 bits with a scale for 256 of them they add 0.127 (Dettmers et al., "QLoRA: Efficient Finetuning of
Quantized LLMs", 2023; appendix E has the 16 values; the scales are 8-bit floats there, and integers here).

python code11_nf4.py
"""

import copy

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

TEXT = "渔船天黑前回港，鱼贩子早就在码头上等着了"
BLOCK, SUPER_BLOCK = 64, 256  # weights that share a scale, scales that share a scale
PUBLISHED = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
PUBLISHED += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
PUBLISHED += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
PUBLISHED += [0.7229568362236023, 1.0]  # QLoRA, appendix E


def nf4_values() -> torch.Tensor:
    """[16]: quantiles of the normal distribution, 8 of them above 0, 7 below, and 0 itself; the largest is 1."""
    offset = 1 - (1 / 32 + 1 / 30) / 2
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([positive, negative, torch.zeros(1)]).sort().values
    return (values / values.max()).float()


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0 ... 15 [n] -> bytes [n / 2]."""
    high, low = codes.view(-1, 2).T
    return (high << 4 | low).to(torch.uint8)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [n / 2] -> codes 0 ... 15 [n]."""
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()


def quantise_scales(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[blocks] -> int8 [blocks], a scale for each SUPER_BLOCK of them, and the mean that was taken off before."""
    mean = scales.mean()
    rows = nn.functional.pad(scales - mean, (0, -len(scales) % SUPER_BLOCK)).view(-1, SUPER_BLOCK)
    outer = rows.abs().amax(dim=1, keepdim=True) / 127
    codes = (rows / outer).round().to(torch.int8)
    return codes.flatten()[: len(scales)], outer[:, 0], mean


def quantise_nf4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight of any shape with a multiple of BLOCK numbers -> what is stored for it."""
    blocks = weight.reshape(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    codes = ((blocks / scales[:, None])[..., None] - nf4_values()).abs().argmin(-1)
    scale_codes, outer, mean = quantise_scales(scales)
    return {"packed": pack(codes.flatten()), "scale_codes": scale_codes, "outer": outer, "mean": mean}


def dequantise_nf4(packed, scale_codes, outer, mean) -> torch.Tensor:
    """What quantise_nf4 stored -> weights [blocks, BLOCK]."""
    scales = scale_codes * outer.repeat_interleave(SUPER_BLOCK)[: len(scale_codes)] + mean
    return nf4_values()[unpack(packed)].view(-1, BLOCK) * scales[:, None]


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return ((result - exact).norm() / exact.norm()).item()


torch.manual_seed(0)
torch.set_grad_enabled(False)
table_gap = (nf4_values() - torch.tensor(PUBLISHED)).abs().max().item()
print("values:", *[f"{value:.4f}" for value in nf4_values()])
pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).flatten()
assert torch.equal(unpack(pack(pairs)), pairs) and len(set(pack(pairs).tolist())) == 256

weight = torch.randn(1024, 1024)
stored = quantise_nf4(weight)
num_bytes = {name: tensor.nbytes for name, tensor in stored.items()}
bits = 8 * sum(num_bytes.values()) / weight.numel()
print(f"a weight of {weight.nbytes:,} bytes:", ", ".join(f"{name} {count:,}" for name, count in num_bytes.items()))
nf4_error = relative_error(dequantise_nf4(**stored).view_as(weight), weight)
blocks = weight.view(-1, BLOCK)
scales = blocks.abs().amax(dim=1, keepdim=True) / 7
even_error = relative_error((blocks / scales).round() * scales, blocks)
print(f"error with 4 bits: {nf4_error:.2%} with NF4, {even_error:.2%} with evenly spaced values and exact scales")

characters = sorted(set(TEXT))
input_ids = torch.tensor([[characters.index(character) for character in TEXT]])
config = Qwen2Config(
    vocab_size=len(characters),
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = Qwen2ForCausalLM(config).eval()
small, before, after = copy.deepcopy(model), 0, 0
for module in small.model.layers.modules():
    if isinstance(module, nn.Linear):
        stored = quantise_nf4(module.weight)
        before, after = before + module.weight.nbytes, after + sum(tensor.nbytes for tensor in stored.values())
        module.weight.copy_(dequantise_nf4(**stored).view_as(module.weight))
error = relative_error(small(input_ids).logits, model(input_ids).logits)
print(f"linear layers of a Qwen2: {before:,} -> {after:,} bytes, logits are off by {error:.1%}")
assert table_gap < 1e-6 and bits < 4.13 and nf4_error < even_error and error < 0.25
print(f"proof: values differ from the published by {table_gap:.1e}; {bits:.3f} bits a weight, ", end="")
print(f"{before / after:.2f} times smaller; weights are off by {nf4_error:.1%}, a model's logits by {error:.1%}")
