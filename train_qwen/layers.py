"""What makes a training step fast and small, and leaves the loss as it is.

packed_sdpa          attention within each sequence of a padding-free batch: no cross-contamination
SupervisedHead       the LM head on supervised tokens only, in chunks
remember_less        RMSNorm and gated MLP that keep fewer activations for the backward pass, the last MLP on
                     supervised tokens only
"""

# The same in every recipe that has it: python tests/copies.py --fix FILE

from types import MethodType

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.activations import SiLUActivation

from data import IGNORE_INDEX


def packed_sdpa(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Causal attention over a padding-free batch, in which no sequence sees its neighbour.

    One call of FlashAttention's kernel that PyTorch brings (`torch.nn.attention.varlen`) where it takes the tensors,
    else one SDPA call a sequence.

    Args:
        query, key, value: shape (1, heads, tokens, head_dim); key and value may have fewer heads (GQA).
        kwargs: `sequence_lengths` (list of the tokens of each sequence), `cu_seq_lens_q` (int32, (sequences + 1,)),
            `max_length_q`, `sliding_window` (tokens, or None).

    Returns:
        Attention output of shape (1, tokens, heads, head_dim), and None for the weights.

    Raises:
        NotImplementedError: the model wants capped scores or attention sinks, which SDPA does not have.
    """
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise NotImplementedError("SDPA has neither capped scores nor attention sinks")
    lengths, window = kwargs["sequence_lengths"], kwargs.get("sliding_window")
    if torch.is_autocast_enabled(query.device.type):  # rotary positions have made fp32 of query and key
        half = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(half), key.to(half), value.to(half)
    if varlen_takes(query, value, dropout):
        ends, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
        flat = [states[0].transpose(0, 1) for states in (query, key, value)]
        behind = -1 if window is None else window - 1
        settings = {"scale": scaling, "window_size": (behind, 0), "enable_gqa": query.shape[1] != key.shape[1]}
        return varlen_attn(*flat, ends, ends, longest, longest, **settings)[None], None
    outputs = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        length, mask = q.shape[2], None
        if window is not None and length > window:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def varlen_takes(query: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether `varlen_attn` computes this: on a GPU of Ampere's kind or newer, in half precision, without dropout."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and dropout == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


AttentionInterface.register("packed_sdpa", packed_sdpa)
# cuDNN's attention builds a plan for each new length, 0.16 s a time on an H100; FlashAttention's kernel needs none.
torch.backends.cuda.enable_cudnn_sdp(False)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of a linear head, some tokens at a time: the logits of all tokens never exist at once.

    The gradients are taken in the same pass, while a chunk's probabilities are still in the cache, so the backward
    pass only scales them. Source of the method: Hsu et al., "Liger Kernel" (2024).
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, targets, needs_gradient):
        """hidden_states: (tokens, hidden); weight: (vocabulary, hidden); targets: (tokens,). Returns a scalar, fp32."""
        if torch.is_autocast_enabled(hidden_states.device.type):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(hidden_states.device.type))
        head = weight.to(hidden_states.dtype)
        logits_at_once = 1 << (21 if hidden_states.device.type == "cpu" else 27)
        chunk = max(64, logits_at_once // len(head))
        loss = hidden_states.new_zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden_states) if needs_gradient else None
        weight_gradient = torch.zeros_like(head) if needs_gradient and ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), chunk):
            hidden, target = hidden_states[start : start + chunk], targets[start : start + chunk, None]
            log_probabilities = torch.log_softmax((hidden @ head.T).float(), dim=1)
            loss -= log_probabilities.gather(1, target).sum()
            if needs_gradient:
                gradient = log_probabilities.exp_()
                gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1.0))
                gradient = gradient.to(head.dtype)
                torch.mm(gradient, head, out=hidden_gradient[start : start + chunk])
                if weight_gradient is not None:
                    weight_gradient.addmm_(gradient.T, hidden)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, gradient):
        hidden_gradient, weight_gradient = ctx.saved_tensors
        if weight_gradient is not None:
            weight_gradient = weight_gradient.mul_(gradient).to(ctx.weight_dtype)
        return hidden_gradient.mul_(gradient), weight_gradient, None, None


class SupervisedHead(nn.Linear):
    """An LM head that, while it has `targets`, returns their summed cross-entropy in place of logits.

    It works inside its own forward because only there ZeRO-3 has gathered its weight.
    """

    targets: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: (batch, tokens, hidden); targets: (batch, tokens), -100 where nothing is supervised."""
        if self.targets is None:
            return super().forward(hidden_states)
        supervised = self.targets != IGNORE_INDEX
        return ChunkedCrossEntropy.apply(
            hidden_states[supervised], self.weight, self.targets[supervised], torch.is_grad_enabled()
        )


class RMSNormFunction(torch.autograd.Function):
    """RMSNorm that keeps its input and one number a token, where autograd would keep four tensors.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, eps):
        """hidden_states: (..., hidden); weight: (hidden,). The mean is taken in fp32, whatever the input's dtype."""
        scale = hidden_states.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden_states, weight, scale)
        return weight * (hidden_states * scale).to(hidden_states.dtype)

    @staticmethod
    def backward(ctx, gradient):
        hidden_states, weight, scale = ctx.saved_tensors
        normalized = hidden_states * scale
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = (gradient * normalized).flatten(0, -2).sum(0).to(weight.dtype)
        gradient = gradient * weight
        along = (gradient * normalized).mean(-1, keepdim=True)
        return ((gradient - normalized.mul_(along)) * scale).to(hidden_states.dtype), weight_gradient, None


def rms_norm_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
    return RMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping gate and up only (Shazeer, "GLU Variants Improve Transformer", 2020)."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        ctx.activation = None
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        activation = F.silu(gate) if ctx.activation is None else ctx.activation
        ctx.activation = None
        return torch.ops.aten.silu_backward(gradient * up, gate), gradient * activation


def project_down(down_proj: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """down(silu(gate) * up); the product is not kept for down's backward pass but made again from gate and up."""
    product = SwiGLU.apply(gate, up)
    node, address = product.grad_fn, product.data_ptr()

    def pack(tensor):
        return tensor.shape if node is not None and tensor.data_ptr() == address else tensor

    def unpack(packed):
        if isinstance(packed, torch.Tensor):
            return packed
        gate, up = node.saved_tensors
        node.activation = F.silu(gate)  # which the node itself needs next
        return (node.activation * up).view(packed)

    with saved_tensors_hooks(pack, unpack):
        return down_proj(product)


def gated_mlp_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
    return project_down(self.down_proj, self.gate_proj(hidden_states), self.up_proj(hidden_states))


def packed_mlp_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
    """The same where gate and up are one matrix (GLM)."""
    return project_down(self.down_proj, *self.gate_up_proj(hidden_states).chunk(2, dim=-1))


def supervised_mlp(mlp: nn.Module, head: SupervisedHead):
    """A forward for the last layer's MLP: nobody reads its output at tokens that are not supervised."""
    forward = mlp.forward

    def supervised_forward(hidden_states: torch.Tensor) -> torch.Tensor:
        if head.targets is None:
            return forward(hidden_states)
        supervised = head.targets != IGNORE_INDEX
        output = torch.zeros_like(hidden_states)
        output[supervised] = forward(hidden_states[supervised]).to(output.dtype)
        return output

    return supervised_forward


def layers_attend_only(config) -> bool:
    """Whether tokens meet in attention that `packed_sdpa` and FlashAttention keep within a sequence, and nowhere else.

    Convolutions and recurrences (LFM2, Qwen3-Next, Mamba) run on over the border of two sequences; chunked attention
    (Llama 4) counts its chunks from the start of the batch.
    """
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    return set(kinds) <= {"full_attention", "sliding_attention"}


def install_supervised_head(model: nn.Module) -> SupervisedHead | None:
    """Turns the model's LM head into a SupervisedHead, in place; None where the head is not a plain linear layer."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return None
    head.__class__ = SupervisedHead
    return head


def remember_less(model: nn.Module, head: SupervisedHead | None) -> None:
    """Gives the model's RMSNorms and SiLU-gated MLPs the forwards above, in place."""
    last_mlp = None
    for module in model.modules():
        name = type(module).__name__
        if name in ("Qwen2RMSNorm", "Qwen3RMSNorm", "LlamaRMSNorm", "MistralRMSNorm", "GlmRMSNorm", "Glm4RMSNorm"):
            module.forward = MethodType(rms_norm_forward, module)
        if name in ("Qwen2MLP", "Qwen3MLP", "LlamaMLP", "MistralMLP") and isinstance(module.act_fn, SiLUActivation):
            module.forward, last_mlp = MethodType(gated_mlp_forward, module), module
        if name in ("GlmMLP", "Glm4MLP") and isinstance(module.activation_fn, SiLUActivation):
            module.forward, last_mlp = MethodType(packed_mlp_forward, module), module
    if head is not None and last_mlp is not None:
        last_mlp.forward = supervised_mlp(last_mlp, head)
