"""What makes a training step fast and small, and leaves its loss as it is. Without this file the recipe trains as well.

packed_sdpa            attention within each example of a row without padding: no cross-contamination
ChunkedCrossEntropy    the LM head on supervised tokens only, whose logits never exist at once
RMSNormFunction,
GatedProduct           normalization and gated MLP that keep fewer activations for the backward pass
FastPath               tries each of these against the model as it is, and keeps what has the same loss and gradients
"""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import copy
import inspect
import itertools
import re
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, TrainerCallback

from data import IGNORE_INDEX
from rows import UserError
from trainer import SFTTrainer


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
# cuDNN's attention builds a plan for each new length, 0.16 s a time on an H100; FlashAttention's needs none
# (pytorch#155958).
torch.backends.cuda.enable_cudnn_sdp(False)

LOGITS_AT_ONCE = defaultdict(lambda: 1 << 27, cpu=1 << 21)  # by the kind of device


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
        chunk = max(64, LOGITS_AT_ONCE[hidden_states.device.type] // len(head))
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


class RMSNormFunction(torch.autograd.Function):
    """RMSNorm that keeps its input and one number a token, where autograd would keep four tensors.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, eps, offset, rounds_first):
        """hidden_states: (..., hidden); weight: (hidden,). The mean is taken in fp32, whatever the input's dtype.

        Args:
            offset: what is added to the weight (Gemma's is kept as its distance from 1).
            rounds_first: whether it is rounded to the input's dtype before the weight is applied (Llama), or after.
        """
        scale = hidden_states.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden_states, weight, scale)
        ctx.offset = offset
        normalized = hidden_states * scale
        if rounds_first:
            return (weight + offset if offset else weight) * normalized.to(hidden_states.dtype)
        return normalized.mul_(weight.float() + offset).to(hidden_states.dtype)

    @staticmethod
    def backward(ctx, gradient):
        hidden_states, weight, scale = ctx.saved_tensors
        normalized = hidden_states * scale
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = (gradient * normalized).flatten(0, -2).sum(0).to(weight.dtype)
        gradient = gradient * (weight + ctx.offset if ctx.offset else weight)
        along = (gradient * normalized).mean(-1, keepdim=True)
        gradient = ((gradient - normalized.mul_(along)) * scale).to(hidden_states.dtype)
        return gradient, weight_gradient, None, None, None


class GatedProduct(torch.autograd.Function):
    """activation(gate) * up, keeping gate and up only (Shazeer, "GLU Variants Improve Transformer", 2020)."""

    @staticmethod
    def forward(ctx, activation, gate, up):
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.activated = activation, None
        return activation(gate) * up

    @staticmethod
    def activate_again(ctx) -> torch.Tensor:
        ctx.gate = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.activated = ctx.activation(ctx.gate)
        return ctx.activated.detach()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.activated is None:
            GatedProduct.activate_again(ctx)
        (gate_gradient,) = torch.autograd.grad(ctx.activated, ctx.gate, gradient * ctx.saved_tensors[1])
        up_gradient = gradient * ctx.activated.detach()
        ctx.activated = ctx.gate = None
        return None, gate_gradient, up_gradient


def project_down(down_proj: nn.Module, activation: Callable, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """down(activation(gate) * up); the product is not kept for down's backward pass but made again from gate and up.

    `activation` is a module's forward: ZeRO-3 would take note of a module called then, on some ranks and not on others.
    """
    product = GatedProduct.apply(activation, gate, up)
    node, address = product.grad_fn, product.data_ptr()

    def pack(tensor):
        return tensor.shape if node is not None and tensor.data_ptr() == address else tensor

    def unpack(packed):
        if isinstance(packed, torch.Tensor):
            return packed
        return (GatedProduct.activate_again(node) * node.saved_tensors[1]).view(packed)

    with saved_tensors_hooks(pack, unpack):
        return down_proj(product)


def norm_candidates(norm: nn.Module) -> list[tuple[Callable, dict]]:
    """Forwards that a module with one vector for its weight may have, if it is an RMSNorm."""
    if list(norm._parameters) != ["weight"] or norm.weight is None or norm._modules:
        return []

    def forward(self, hidden_states, *, settings):
        return RMSNormFunction.apply(hidden_states, self.weight, *settings)

    numbers = [value for value in vars(norm).values() if isinstance(value, float)]
    return [
        (partial(forward, settings=settings), {}) for settings in itertools.product(numbers, (0.0, 1.0), (True, False))
    ]


def mlp_candidates(mlp: nn.Module) -> list[tuple[Callable, dict]]:
    """Forwards that a module of linear layers and an activation may have, each with small layers to try it with."""
    linear = [name for name, child in mlp.named_children() if "in_features" in vars(child)]
    others = [name for name in mlp._modules if name not in linear]

    def separate(self, hidden_states, *, gate, up, down, activation):
        """Gate and up are matrices of their own (Llama, Qwen, Gemma)."""
        gate, up = getattr(self, gate)(hidden_states), getattr(self, up)(hidden_states)
        return project_down(getattr(self, down), getattr(self, activation).forward, gate, up)

    def joined(self, hidden_states, *, gate_up, down, activation):
        """Gate and up are one matrix (GLM, Phi-3)."""
        gate, up = getattr(self, gate_up)(hidden_states).chunk(2, dim=-1)
        return project_down(getattr(self, down), getattr(self, activation).forward, gate, up)

    if len(others) != 1 or len(linear) not in (2, 3):
        return []
    forward, shapes = {
        3: (separate, {"gate": (8, 16), "up": (8, 16), "down": (16, 8)}),
        2: (joined, {"gate_up": (8, 32), "down": (16, 8)}),
    }[len(linear)]
    return [
        (
            partial(forward, activation=others[0], **dict(zip(shapes, names, strict=True))),
            {name: nn.Linear(*shape) for name, shape in zip(names, shapes.values(), strict=True)},
        )
        for names in itertools.permutations(linear)
    ]


def computes_the_same(module: nn.Module, forward: Callable, layers: dict[str, nn.Module]) -> bool:
    """Whether `forward` has the output and the gradients of a small copy of the module, in fp32 and rounded to bf16."""
    probe = copy.copy(module)
    probe._parameters = {name: nn.Parameter(torch.randn(8)) for name in module._parameters}
    probe._modules = module._modules | layers
    for dtype in (torch.float32, torch.bfloat16):
        probe.to(dtype)
        hidden_states = torch.randn(3, 5, 8, dtype=dtype, requires_grad=True)
        wanted, found = (
            [output, *torch.autograd.grad(output.float().square().sum(), [hidden_states, *probe.parameters()])]
            for output in (type(module).forward(probe, hidden_states), forward(probe, hidden_states))
        )
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
        if dtype == torch.bfloat16 and not torch.equal(wanted[0], found[0]):
            return False
        if not all(
            w.dtype == f.dtype and torch.allclose(w, f, **tolerance) for w, f in zip(wanted, found, strict=True)
        ):
            return False
    return True


def find_smaller_forward(module: nn.Module) -> Callable | None:
    """A forward that keeps fewer activations and computes what the module computes, whatever its class is called."""
    if len(inspect.signature(module.forward).parameters) != 1:
        return None
    for forward, layers in norm_candidates(module) + mlp_candidates(module):
        try:
            if computes_the_same(module, forward, layers):
                return forward
        except (AssertionError, RuntimeError, TypeError, ValueError):  # of another shape, or it takes no bf16
            continue
    return None


def remove_padding(inputs: dict, targets: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """Examples padded to (examples, longest) -> one after the other, (1, tokens), with positions from 0 in each.

    Returns:
        What has no padding, as it is; `input_ids`, `position_ids`, what FlashAttention needs (`cu_seq_lens_q`,
        `cu_seq_lens_k` of shape (examples + 1,), `max_length_q`, `max_length_k`), `sequence_lengths`; and the targets.
    """
    mask = inputs.pop("attention_mask").bool()
    lengths = mask.sum(1)
    ends = F.pad(lengths.cumsum(0), (1, 0)).int()
    positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    flat = inputs | {"input_ids": inputs["input_ids"][mask][None], "position_ids": positions[mask][None]}
    lengths = lengths.tolist()
    flat |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths), "max_length_k": max(lengths)}
    return flat | {"sequence_lengths": lengths}, targets[mask][None]


def layers_attend_only(config) -> bool:
    """Whether tokens meet in attention that `packed_sdpa` and FlashAttention keep within an example, and nowhere else.

    Convolutions and recurrences (LFM2, Qwen3-Next, Mamba) run on over the border of two examples; chunked attention
    (Llama 4) counts its chunks from the start of the row, which short examples don't show.
    """
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    return set(kinds) <= {"full_attention", "sliding_attention"}


def first_and_last_of_each_kind(model: nn.Module) -> list[nn.Parameter]:
    """Of the trainable tensors that have one name but for the layer's number, the first and the last."""
    kinds = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds.setdefault(re.sub(r"\d+", "", name), []).append(parameter)
    return [parameter for same in kinds.values() for parameter in {id(same[i]): same[i] for i in (0, -1)}.values()]


class FastPath(TrainerCallback):
    """The trainer's step, made fast in the ways that are safe for its model.

    Before the first step a few short examples are computed one by one by the model as it is. The ways are tried
    together, and where that goes wrong each by itself: one that raises anything, or has another loss or other
    gradients, is left out. At the end of the training the model is as it was.

    Raises:
        UserError: packing, and this model's examples can't be kept apart in a bin.
    """

    def __init__(self, trainer: SFTTrainer, remove_padding: bool = True):
        """remove_padding: False leaves the model's attention as it is, and the padding that it needs."""
        self.trainer, self.may_remove_padding = trainer, remove_padding
        self.padding_free = self.head_is_chunked = False
        self.smaller_layers, self.last_mlp, self.targets = 0, None, None
        self.undo = ExitStack()

    def on_train_begin(self, args, state, control, **kwargs):
        self.undo.close()
        notes = self.choose_ways()
        if state.is_world_process_zero:
            print(*(f"note        {note}" for note in notes), sep="\n", end="\n" if notes else "", flush=True)
        if self.trainer.packing and not self.padding_free:
            raise UserError("--packing true: this model's examples can't be kept apart in a bin; leave it out")

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.evaluate_at_the_end()
        self.undo.close()

    def summed_loss(self, model, batch: dict) -> torch.Tensor:
        """What SFTTrainer.summed_loss computes."""
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        if self.padding_free:
            inputs, targets = remove_padding(inputs, targets)
        self.targets = targets
        try:
            output = model(**inputs, use_cache=False).logits
        finally:
            self.targets = None
        return output if self.head_is_chunked else self.trainer.loss_of_logits(output, targets)

    def choose_ways(self) -> list[str]:
        """Takes the ways that are safe; returns what is to be said of the others."""
        trainer, model = self.trainer, self.trainer.model
        model.eval()
        self.batch = trainer._prepare_inputs(trainer.data_collator(self.short_examples()))
        self.compared = first_and_last_of_each_kind(model)
        self.own_loss, self.own_gradients = self.measure(trainer.summed_loss, trainer.rows_apart(self.batch))
        trainer.summed_loss = self.summed_loss
        self.undo.callback(delattr, trainer, "summed_loss")
        ways = {self.chunk_head: "logits of whole batches"}
        if not trainer.args.activation_checkpointing:  # which keeps less still
            ways |= {self.take_smaller_layers: "all activations kept", self.skip_in_last_mlp: "last MLP on all tokens"}
        if self.may_remove_padding:
            ways[self.keep_examples_apart] = "padded batches"
        notes = []
        if self.problem_of(*ways):
            problems = {otherwise: self.problem_of(take) for take, otherwise in ways.items()}
            notes = [f"{otherwise}: {problem}" for otherwise, problem in problems.items() if problem]
        del self.batch, self.compared, self.own_gradients
        return notes

    def problem_of(self, *ways: Callable) -> str | None:
        """Takes these ways; what goes wrong, if anything does, and they are left again."""
        with ExitStack() as undo:
            try:
                for take in ways:
                    take(undo)
                self.refuse_other_results()
                if self.padding_free:
                    self.refuse_contamination()
            except Exception as error:  # a model's own code may raise anything
                return " ".join(str(error).split()) or type(error).__name__
            self.undo.push(undo.pop_all().__exit__)

    def short_examples(self) -> list[dict]:
        """Supervised at both ends, where they meet, and not in their middle, which the last MLP may then skip."""
        examples = self.trainer.short_examples()
        for example in examples:
            labels, third = example["labels"], len(example["labels"]) // 3
            example["labels"] = labels[:third] + [IGNORE_INDEX] * third + labels[2 * third :]
        return examples

    def measure(self, summed_loss: Callable, batches) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The loss, and of each tensor to compare a million numbers of its gradient: whole ones of a head are large."""
        total, gradients = 0, [torch.zeros(())] * len(self.compared)
        for batch in batches:
            with self.trainer.compute_loss_context_manager():
                loss = summed_loss(self.trainer.model, batch)
            total = total + loss.detach()
            for i, gradient in enumerate(torch.autograd.grad(loss, self.compared, allow_unused=True)):
                if gradient is not None:
                    some = gradient.flatten()[:: gradient.numel() // 2**20 + 1]
                    gradients[i] = gradients[i].to(some.device) + some.float()
        return total, gradients

    def refuse_other_results(self) -> None:
        """Raises ValueError where loss or gradients are not the model's own."""
        half = self.trainer.args.bf16 or self.trainer.args.fp16
        loss, gradients = self.measure(self.summed_loss, [self.batch])
        if not torch.allclose(loss, self.own_loss, rtol=1e-2 if half else 1e-4):
            raise ValueError(f"the loss is {loss:.7g}, by the model as it is {self.own_loss:.7g}")
        largest = max(gradient.norm() for gradient in self.own_gradients)
        for own, found in zip(self.own_gradients, gradients, strict=True):
            # Beside the largest gradient: one that is 0 but for rounding (a key's bias) has no digits of its own.
            tolerance = 0.1 * own.norm() + 0.01 * largest if half else 1e-3 * own.norm() + 1e-5 * largest
            if not (own - found).norm() <= tolerance:  # nor where they are no numbers
                raise ValueError("the gradients are not those of the model as it is")

    def replace_forward(self, undo: ExitStack, module: nn.Module, forward: Callable) -> None:
        undo.callback(delattr, module, "forward")
        module.forward = forward

    def chunk_head(self, undo: ExitStack) -> None:
        """The head returns the summed loss: inside its forward alone ZeRO-3 has gathered its weight."""
        head = self.trainer.model.get_output_embeddings()
        if type(head) is not nn.Linear or head.bias is not None:
            raise ValueError("the head does more than a matrix product")

        def forward(hidden_states: torch.Tensor) -> torch.Tensor:
            if self.targets is None:
                return type(head).forward(head, hidden_states)
            supervised = self.targets != IGNORE_INDEX
            return ChunkedCrossEntropy.apply(
                hidden_states[supervised], head.weight, self.targets[supervised], torch.is_grad_enabled()
            )

        self.replace_forward(undo, head, forward)
        undo.callback(setattr, self, "head_is_chunked", False)
        self.head_is_chunked = True

    def take_smaller_layers(self, undo: ExitStack) -> None:
        """Gives the model's RMSNorms and gated MLPs the forwards above, found by what they compute."""
        undo.callback(setattr, self, "smaller_layers", 0)
        undo.callback(setattr, self, "last_mlp", None)
        found = {}
        with torch.random.fork_rng(devices=[]):
            for module in self.trainer.model.modules():
                kind = (type(module), *(value for value in vars(module).values() if isinstance(value, float)))
                if kind not in found:
                    found[kind] = find_smaller_forward(module)
                if found[kind] is not None and "forward" not in vars(module):
                    self.replace_forward(undo, module, partial(found[kind], module))
                    self.smaller_layers += 1
                    self.last_mlp = module if module._modules else self.last_mlp

    def skip_in_last_mlp(self, undo: ExitStack) -> None:
        """Nobody reads what the last layer's MLP makes of tokens that are not supervised."""
        if self.last_mlp is None:
            return
        own_forward = self.last_mlp.forward

        def forward(hidden_states: torch.Tensor) -> torch.Tensor:
            if self.targets is None:
                return own_forward(hidden_states)
            supervised = self.targets != IGNORE_INDEX
            output = torch.zeros_like(hidden_states)
            output[supervised] = own_forward(hidden_states[supervised]).to(output.dtype)
            return output

        undo.callback(setattr, self.last_mlp, "forward", own_forward)
        self.last_mlp.forward = forward

    def keep_examples_apart(self, undo: ExitStack) -> None:
        """Rows without padding, in which attention ends where an example does."""
        model = self.trainer.model
        text_config = model.config.get_text_config()
        own_attention = text_config._attn_implementation
        if not layers_attend_only(model.config):
            raise ValueError("tokens of this model meet elsewhere than in attention")
        # Else the model's own attention would be right as well, with a mask as large as the whole batch squared.
        if not model.is_backend_compatible():
            raise ValueError("this model has attention code of its own")
        if not own_attention.startswith("flash"):
            part = "" if text_config is model.config else "text_config"  # a vision tower keeps its own
            undo.callback(model.set_attn_implementation, {part: own_attention})
            model.set_attn_implementation({part: "packed_sdpa"})
        undo.callback(setattr, self, "padding_free", False)
        self.padding_free = True

    def refuse_contamination(self) -> None:
        """Raises ValueError where the first tokens of an example have another loss once another stands before them.

        Finds what is too small a part of the whole loss to show there in half precision: the last tokens of a row that
        a convolution carries into the next one.
        """
        before, after = (self.trainer.shorten(self.trainer.train_dataset[i], 32) for i in (0, -1))
        before["labels"] = [IGNORE_INDEX] * len(before["labels"])
        after["labels"] = after["labels"][:4] + [IGNORE_INDEX] * len(after["labels"][4:])
        losses = []
        for neighbour in (before["input_ids"], before["input_ids"][::-1]):
            examples = [before | {"input_ids": neighbour}, after]
            batch = self.trainer._prepare_inputs(self.trainer.data_collator(examples))
            with torch.no_grad(), self.trainer.compute_loss_context_manager():
                losses.append(self.summed_loss(self.trainer.model, batch))
        if not torch.allclose(*losses, rtol=1e-3 if self.trainer.args.bf16 or self.trainer.args.fp16 else 1e-5):
            raise ValueError("an example of this model reads the one before it")
