"""Mixed precision: what 16 bits can't hold, master weights that hold it, and the loss scaling that fp16 needs.

fp16 has 5 bits of exponent: gradients below 3e-8 become 0. So the loss is multiplied by a large number before the
backward pass and the gradients are divided by it after; where one has become infinite, the step is left out and the
number halved (Micikevicius et al., "Mixed Precision Training", 2017). bf16 has the range of fp32 and needs no scale,
but only 2 to 3 digits: a small update is lost in a large weight, so the weights themselves stay fp32.

python code09_mixed_precision.py
"""

import copy

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

TEXT = "清早起来，先把水缸挑满，再去地里干活"


class DynamicScaler:
    """Halves the scale where a gradient is infinite or NaN, doubles it after some good steps in a row."""

    def __init__(self, scale: float, growth_interval: int):
        self.scale, self.growth_interval, self.good_steps = scale, growth_interval, 0

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Divides the gradients by the scale and takes the step, if all are finite. Returns whether it was taken."""
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        for gradient in gradients:
            gradient /= self.scale
        finite = all(gradient.isfinite().all() for gradient in gradients)
        if not finite:
            self.scale, self.good_steps = self.scale / 2, 0
            return False
        optimizer.step()
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.scale, self.good_steps = self.scale * 2, 0
        return True


print("largest, smallest above 0, next after 1:")
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    info = torch.finfo(dtype)
    print(f"  {str(dtype)[6:]:9} {info.max:.1e}  {info.smallest_normal * info.eps:.1e}  1 + {info.eps:.1e}")
gradient = torch.tensor(1e-8)
lost, kept = gradient.half().item(), ((gradient * 2**16).half().float() / 2**16).item()
print(f"a gradient of 1e-8 in fp16: {lost}; scaled by 2^16, in fp16, and back: {kept:.2e}")

weights = {"bf16 alone": torch.ones((), dtype=torch.bfloat16), "fp32 master": torch.ones(())}
for _ in range(100):
    for weight in weights.values():
        weight -= 1e-3
ends = {name: weight.item() for name, weight in weights.items()}
print(f"1 minus 100 updates of 0.001: {ends['bf16 alone']:.4f} in bf16, {ends['fp32 master']:.4f} in a master of fp32")
assert lost == 0 and abs(kept / 1e-8 - 1) < 1e-3 and ends["bf16 alone"] == 1 and abs(ends["fp32 master"] - 0.9) < 1e-5


def bf16_linear(layer: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """What autocast does in a linear layer: copies of 16 bits multiply, the master weights get the gradient."""
    bias = None if layer.bias is None else layer.bias.bfloat16()
    return nn.functional.linear(states.bfloat16(), layer.weight.bfloat16(), bias)


torch.manual_seed(0)
mlp = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 16)])
states = torch.randn(8, 16)
with torch.autocast("cpu", dtype=torch.bfloat16):
    expected = mlp[1](nn.functional.silu(mlp[0](states)))
result = bf16_linear(mlp[1], nn.functional.silu(bf16_linear(mlp[0], states)))
result.float().sum().backward()
assert torch.equal(result, expected) and result.dtype == torch.bfloat16 and mlp[0].weight.grad.dtype == torch.float32

characters = sorted(set(TEXT))
input_ids = torch.tensor([[characters.index(character) for character in TEXT]])
config = Qwen2Config(
    vocab_size=len(characters),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)
START, INTERVAL, STEPS = 2.0**18, 4, 30
models = [Qwen2ForCausalLM(config)]
models.append(copy.deepcopy(models[0]))
optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
ours, theirs = DynamicScaler(START, INTERVAL), torch.amp.GradScaler("cpu", init_scale=START, growth_interval=INTERVAL)
history = {"ours": [], "theirs": []}
for _ in range(STEPS):
    losses = []
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            losses.append(model(input_ids=input_ids, labels=input_ids).loss)
    (losses[0] * ours.scale).backward()
    history["ours"].append((losses[0].item(), ours.step(optimizers[0]), ours.scale))
    theirs.scale(losses[1]).backward()
    before = theirs.get_scale()
    theirs.step(optimizers[1])
    theirs.update()
    history["theirs"].append((losses[1].item(), theirs.get_scale() >= before, theirs.get_scale()))
print("scale after each step (x: left out):")
print(" ", *["x" * (not taken) + f"2^{int(torch.tensor(scale).log2())}" for _, taken, scale in history["ours"]])
weights = [torch.cat([parameter.flatten() for parameter in model.parameters()]) for model in models]
gap = (weights[0] - weights[1]).abs().max().item()
skipped = sum(not taken for _, taken, _ in history["ours"])
doubled = sum(after > before for (*_, before), (*_, after) in zip(history["ours"], history["ours"][1:], strict=False))
first, last = history["ours"][0][0], history["ours"][-1][0]
print(f"loss in fp16: {first:.4f} before the first step, {last:.4f} before the last")
assert history["ours"] == history["theirs"] and gap < 1e-6 and skipped > 1 and doubled > 1 and last < first
print(
    f"proof: of {STEPS} steps {skipped} were left out and {doubled} doubled the scale, the same as by GradScaler; "
    f"losses are equal, weights differ by {gap:.1e}"
)
