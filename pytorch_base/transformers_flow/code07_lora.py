"""LoRA by hand: a frozen weight, two thin trained matrices beside it, and merging them into one again.

y = W x + alpha / r * B A x, with A [r, in] and B [out, r] (Hu et al., "LoRA: Low-Rank Adaptation of Large Language
Models", 2021). B begins as zeros, so the model begins as it was; only A and B get gradients and optimizer state. In the
end W + alpha / r * B A is one matrix again and serving costs nothing more. All of it is held against PEFT.

python code07_lora.py
"""

import copy
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # PEFT asks transformers by the old name
TEXT = "老木匠教徒弟刨木头，先看纹理，再顺着纹理慢慢推"
TARGETS, RANK, ALPHA, STEPS, LEARNING_RATE = ["q_proj", "v_proj", "down_proj"], 4, 8, 20, 1e-2


class LoraLinear(nn.Module):
    """A linear layer that is left as it is, and a low-rank one beside it."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(RANK, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, RANK))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]; A first, so nothing of the size of W is ever made."""
        return self.base(states) + ALPHA / RANK * F.linear(F.linear(states, self.lora_A), self.lora_B)

    def merged(self) -> nn.Linear:
        """One plain layer that does the same."""
        layer = copy.deepcopy(self.base)
        layer.weight += ALPHA / RANK * self.lora_B @ self.lora_A
        return layer


def replace_layers(model: nn.Module, kind: type, make) -> None:
    """Puts make(layer) in the place of each layer of that kind that has one of the names in TARGETS."""
    for name, layer in list(model.named_modules()):
        if name.split(".")[-1] in TARGETS and isinstance(layer, kind):
            model.set_submodule(name, make(layer))


def train(model: nn.Module, input_ids: torch.Tensor) -> list[float]:
    """The loss before each of STEPS steps."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=input_ids, labels=input_ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


torch.manual_seed(0)
characters = sorted(set(TEXT))
input_ids = torch.tensor([[characters.index(character) for character in TEXT]])
config = Qwen2Config(
    vocab_size=len(characters),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.1,
)
base = Qwen2ForCausalLM(config).eval().requires_grad_(False)
before = base(input_ids).logits
ours = copy.deepcopy(base)
replace_layers(ours, nn.Linear, LoraLinear)
settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
theirs = get_peft_model(copy.deepcopy(base), settings).eval()
their_tensors = {
    name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
    for name, parameter in theirs.named_parameters()
    if "lora_" in name
}
ours.load_state_dict(their_tensors, strict=False)  # the same A, which is random
our_tensors = {name: parameter for name, parameter in ours.named_parameters() if "lora_" in name}
assert our_tensors.keys() == their_tensors.keys()
assert torch.equal(ours(input_ids).logits, before)  # B is zero

losses, their_losses = train(ours, input_ids), train(theirs, input_ids)
print("loss of ours:  ", *[f"{loss:.4f}" for loss in losses[:: STEPS // 5]])
print("loss of PEFT's:", *[f"{loss:.4f}" for loss in their_losses[:: STEPS // 5]])
trained, every = sum(map(torch.numel, our_tensors.values())), sum(map(torch.numel, ours.parameters()))
assert trained == theirs.get_nb_trainable_parameters()[0]
print(f"trained: {trained:,} of {every:,} numbers, r * (in + out) a layer; nothing else has a gradient")
assert all((parameter.grad is not None) == ("lora_" in name) for name, parameter in ours.named_parameters())

with torch.no_grad():
    gaps = {
        "logits": (ours(input_ids).logits - theirs(input_ids).logits).abs().max().item(),
        "gradients": max(
            (our_tensors[name].grad - their_tensors[name].grad).abs().max().item() for name in our_tensors
        ),
        "A and B": max((our_tensors[name] - their_tensors[name]).abs().max().item() for name in our_tensors),
    }
    after = ours(input_ids).logits
    replace_layers(ours, LoraLinear, LoraLinear.merged)
    gaps["merged - unmerged"] = (ours(input_ids).logits - after).abs().max().item()
    merged = theirs.merge_and_unload().state_dict()
    gaps["merged weights"] = max((ours.state_dict()[name] - merged[name]).abs().max().item() for name in merged)
moved = (after - before).abs().max().item()
assert max(gaps.values()) < 1e-5 and moved > 0.1 and losses[-1] < losses[0]
print(f"proof: training moved the logits by {moved:.2f}; differences:", end="")
print(*[f" {name} {gap:.1e}" for name, gap in gaps.items()], sep=",")
