"""Weights in 8 bits by hand: absmax int8 a row at a time, integer products, and the few large inputs apart.

Each row of a weight is divided by its largest number and rounded to -127 ... 127; one scale a row is kept. Inputs are
treated alike, a token at a time, so the product is one of integers. Large models have a few inputs that are much larger
than all others; these set every token's scale and leave the rest a handful of steps, so their columns are multiplied in
full precision (Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", 2022).

python code11_quantisation.py
"""

import copy

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

TEXT = "山里的人把柿子一个个削了皮，挂在屋檐下晒"
THRESHOLD = 6.0  # LLM.int8()'s: an input beyond it is an outlier


def quantise(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] -> int8 of the same shape, and a scale [rows, 1]; codes * scale is nearly what it was."""
    scale = rows.abs().amax(dim=1, keepdim=True) / 127
    return (rows / scale).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer whose weight is kept as int8 and one scale a row."""

    def __init__(self, layer: nn.Linear, threshold: float = torch.inf):
        super().__init__()
        codes, scale = quantise(layer.weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.bias, self.threshold = layer.bias, threshold

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        rows = states.flatten(0, -2)  # [tokens, in_features]
        outlier = rows.abs().amax(dim=0) > self.threshold  # by column
        codes, scale = quantise(rows[:, ~outlier])
        product = (codes.int() @ self.codes[:, ~outlier].int().T) * scale * self.scale.T  # sums need more than 8 bits
        product += rows[:, outlier] @ (self.codes[:, outlier] * self.scale).T
        product = product if self.bias is None else product + self.bias
        return product.unflatten(0, states.shape[:-1])


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return ((result - exact).norm() / exact.norm()).item()


def count_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


torch.manual_seed(0)
torch.set_grad_enabled(False)
layer = nn.Linear(128, 64)
codes, scale = quantise(layer.weight)
theirs = torch.fake_quantize_per_channel_affine(
    layer.weight, scale[:, 0], torch.zeros(64, dtype=torch.int32), axis=0, quant_min=-127, quant_max=127
)
gap = (codes * scale - theirs).abs().max().item()
largest = ((layer.weight - codes * scale).abs() / scale).max().item()
print(f"weight [64, 128]: {layer.weight.nbytes:,} bytes -> {codes.nbytes + scale.nbytes:,}; ", end="")
print(f"no number moved by more than {largest:.3f} steps of its row")

states = torch.randn(32, 128)
errors = {"no large inputs": relative_error(Int8Linear(layer)(states), layer(states))}
states[:, 5] *= 100
errors["one large input"] = relative_error(Int8Linear(layer)(states), layer(states))
errors["large input apart"] = relative_error(Int8Linear(layer, THRESHOLD)(states), layer(states))
for name, error in errors.items():
    print(f"  {name:18} error {error:.2%}")

characters = sorted(set(TEXT))
input_ids = torch.tensor([[characters.index(character) for character in TEXT]])
config = Qwen2Config(
    vocab_size=len(characters),
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.1,
)
model = Qwen2ForCausalLM(config).eval()
small = copy.deepcopy(model)
for name, module in list(small.model.named_modules()):
    if isinstance(module, nn.Linear):
        small.model.set_submodule(name, Int8Linear(module, THRESHOLD))
exact, logits = model(input_ids).logits, small(input_ids).logits
error, same = relative_error(logits, exact), (logits.argmax(-1) == exact.argmax(-1)).float().mean().item()
sizes = count_bytes(model.model.layers), count_bytes(small.model.layers)
print(f"layers of a Qwen2: {sizes[0]:,} -> {sizes[1]:,} bytes; of its likeliest tokens {same:.0%} stay so")
assert gap < 1e-6 and largest < 0.501 and error < 0.05 and sizes[0] / sizes[1] > 3.5
assert errors["large input apart"] < errors["no large inputs"] * 1.2 < errors["one large input"]
print(
    f"proof: int8 weights differ from torch's by {gap:.1e}; {sizes[0] / sizes[1]:.2f} times smaller, logits off by "
    f"{error:.2%}; with a large input {errors['one large input']:.2%} off, {errors['large input apart']:.2%} if apart"
)
