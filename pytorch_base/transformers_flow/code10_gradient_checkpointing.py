"""Gradient checkpointing by hand: what the backward pass needs is thrown away and computed again, dropout included.

Training keeps every layer's intermediate results until its backward pass. Checkpointing keeps only what went into a
block and runs the block a second time when its turn comes: memory falls from all layers' intermediates to one's, for
one more forward pass (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016). The second run must be the
first one again, so the state of the random numbers is put back before it. Bytes are counted by the hooks through which
autograd saves tensors.

python code10_gradient_checkpointing.py
"""

import copy
from functools import partial

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2ForCausalLM

TEXT = "雨停了，屋檐上的水一滴一滴落下来，孩子们踩着水坑回家" * 4
LAYERS = 6


class Checkpoint(torch.autograd.Function):
    """block(states), of which only `states` are kept. The block's weights get their gradients in the inner backward."""

    @staticmethod
    def forward(ctx, block, states):
        ctx.block, ctx.random_state = block, torch.get_rng_state()
        ctx.save_for_backward(states)
        return block(states)  # inside of forward nothing is recorded

    @staticmethod
    def backward(ctx, gradient):
        states = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(ctx.random_state)
            output = ctx.block(states)
        output.backward(gradient)
        return None, states.grad


class SavedBytes(saved_tensors_hooks):
    """Counts what autograd keeps: each storage once, weights not, since they are there anyway."""

    def __init__(self, model: torch.nn.Module):
        self.storages = {}
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                self.storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        super().__init__(keep, lambda tensor: tensor)

    def total(self) -> int:
        return sum(self.storages.values())


METHODS = {
    "by hand": Checkpoint.apply,
    "torch": partial(checkpoint, use_reentrant=False),
    "torch, other dropout": partial(checkpoint, use_reentrant=False, preserve_rng_state=False),
}


def wrap(block, method):
    """A layer's forward, run by one of METHODS; the arguments besides `states` stay as they are."""
    return lambda states, **kwargs: method(lambda states: block(states, **kwargs), states)


def run(model, how: str, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """One forward and backward pass in training mode: loss, gradients as one vector, bytes kept between the two."""
    model = copy.deepcopy(model).train()
    if how == "library":
        model.activation_checkpointing_enable()
    if how in METHODS:
        for layer in model.model.layers:
            layer.forward = wrap(layer.forward, METHODS[how])
    torch.manual_seed(1)  # the same dropout for all
    saved = SavedBytes(model)
    with saved:
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), saved.total()


torch.manual_seed(0)
characters = sorted(set(TEXT))
input_ids = torch.tensor([[characters.index(character) for character in TEXT]])
config = Qwen2Config(
    vocab_size=len(characters),
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_dropout=0.1,
)
model = Qwen2ForCausalLM(config)
loss, gradient, kept = run(model, "plain", input_ids)
print(f"{'plain':20} loss {loss:.6f}, {kept:,} bytes kept for the backward pass")
gaps, bytes_kept = {}, {}
for how in ("by hand", "torch", "library", "torch, other dropout"):
    other_loss, other_gradient, bytes_kept[how] = run(model, how, input_ids)
    gaps[how] = (other_gradient - gradient).abs().max().item()
    print(f"{how:20} loss {other_loss:.6f}, {bytes_kept[how]:,} bytes, gradients differ by {gaps[how]:.1e}")
    assert abs(other_loss - loss) < 1e-6
wrong = gaps.pop("torch, other dropout")
times = kept / bytes_kept["by hand"]
assert max(gaps.values()) < 1e-5 < wrong and bytes_kept["by hand"] == bytes_kept["library"] and times > 10
print(
    f"proof: gradients differ by at most {max(gaps.values()):.1e}, by {wrong:.1e} where dropout is drawn anew; "
    f"{times:.1f} times fewer bytes kept, as many as by the library"
)
