"""The loss without the logits: head and cross-entropy a chunk of tokens at a time, equal in loss and gradient.

The logits [tokens, vocabulary] are by far the largest tensor of a model with many words: 2.5 GB for 4096 tokens of
Qwen2.5, and as much again for softmax and gradient each. Taken in chunks, with the gradient made at once, since
softmax - one_hot is at hand then, they never exist as a whole (Hsu et al., "Liger Kernel", 2024).

python code06_chunked_loss.py
"""

import weakref

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM

TEXT = "老人每天清早到湖边打拳，打完拳再慢慢走回家，路上买两个包子。" * 4
IGNORED, CHUNK, VOCABULARY = -100, 16, 4096


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside: those alive now, and the most that were alive at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = 0, 0

    def release(self, size: int) -> None:
        self.alive -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and id(storage := leaf.untyped_storage()) not in given:
                self.alive += storage.nbytes()  # a new one: views and results in place have the storage of an argument
                weakref.finalize(storage, self.release, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result


class ChunkedLoss(torch.autograd.Function):
    """Mean of -log p over the labels. states: [tokens, hidden], weight: [vocabulary, hidden], labels: [tokens]."""

    @staticmethod
    def forward(ctx, states, weight, labels):
        loss, states_grad, weight_grad = 0.0, torch.empty_like(states), torch.zeros_like(weight)
        share = (labels != IGNORED).float() / (labels != IGNORED).sum()  # of each token in the mean
        for start in range(0, len(states), CHUNK):
            rows = slice(start, start + CHUNK)
            targets = labels[rows, None].clamp(min=0)
            log_probs = F.linear(states[rows], weight).log_softmax(-1)
            loss -= (log_probs.gather(1, targets)[:, 0] * share[rows]).sum()
            logits_grad = log_probs.exp_()  # becomes softmax - one_hot in place
            logits_grad.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=weight.dtype))
            logits_grad *= share[rows, None]
            states_grad[rows] = logits_grad @ weight
            weight_grad += logits_grad.T @ states[rows]
        ctx.save_for_backward(states_grad, weight_grad)
        return loss

    @staticmethod
    def backward(ctx, scale):
        states_grad, weight_grad = ctx.saved_tensors
        return scale * states_grad, scale * weight_grad, None


def library_loss(model, states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What model(labels=...) computes behind its last norm; the shift has been made."""
    logits = F.linear(states, weight)
    return model.loss_function(logits=logits, labels=None, shift_labels=labels, vocab_size=len(weight))


torch.manual_seed(0)
characters = sorted(set(TEXT))
input_ids = torch.tensor([[characters.index(character) for character in TEXT]])
config = Qwen2Config(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = Qwen2ForCausalLM(config)
labels = input_ids.clone()
labels[:, :20] = IGNORED
expected = model(input_ids=input_ids, labels=labels).loss.item()

states = model.model(input_ids).last_hidden_state[0, :-1].detach()
labels, weight = labels[0, 1:], model.lm_head.weight.detach()
results, peaks = {}, {}
methods = {"whole": lambda *tensors: library_loss(model, *tensors), "in chunks": ChunkedLoss.apply}
for name, method in methods.items():
    leaves = states.clone().requires_grad_(), weight.clone().requires_grad_()
    with PeakMemory() as memory:
        loss = method(*leaves, labels)
        loss.backward()
    results[name] = loss.item(), *(leaf.grad for leaf in leaves)
    peaks[name] = memory.peak
    print(f"{name:9}: loss {loss:.6f}, at most {memory.peak:,} bytes alive")

loss_gap = max(abs(loss - expected) for loss, *_ in results.values())
pairs = zip(results["whole"][1:], results["in chunks"][1:], strict=True)
gradient_gap = max((theirs - ours).abs().max().item() for theirs, ours in pairs)
times = peaks["whole"] / peaks["in chunks"]
print(f"the logits alone have {states.shape[0] * VOCABULARY * 4:,} bytes, a chunk of them {CHUNK * VOCABULARY * 4:,}")
assert loss_gap < 1e-5 and gradient_gap < 1e-5 and times > 3
print(f"proof: in chunks of {CHUNK} tokens the loss differs from model(labels=...).loss by {loss_gap:.1e}, ", end="")
print(f"gradients by {gradient_gap:.1e}, with {times:.1f} times less memory at the peak")
