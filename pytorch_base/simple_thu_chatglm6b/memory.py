"""What a run holds of a GPU's memory, counted before anything is loaded; estimate.py prints it.

The training step is run as it is, forward and backward, on tensors that have a shape, a type and an end but no numbers
(PyTorch's FakeTensor), and each storage counts from its first use to its last. So views, autocast's copies of weights
and what checkpointing computes again count as often as they are there, whatever the architecture. What DDP and
DeepSpeed hold is added up.
"""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import copy
import weakref
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from types import SimpleNamespace
from unittest.mock import patch

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM
from transformers.integrations import unset_hf_deepspeed_config

from arguments import PADDED_ATTENTION
from batch import BalancedBatchSampler, collate, pack_best_fit
from data import IGNORE_INDEX, column
from lora import add_lora, find_targets
from rows import UserError
from trainer import SFTTrainer

GB = 1e9
CONTEXT_GB = 0.6  # CUDA's own and the kernels', which max_memory_allocated doesn't count
FRAGMENTATION = 0.05  # of PyTorch's blocks, where the lengths change from step to step
# Bytes a trained parameter, by the first of these words in --optim; else AdamW's two states in fp32.
STATES = {"8bit": 2, "adafactor": 0, "sgd": 0, "lion": 4}
LOGITS_AT_ONCE_ON_GPU = 1 << 27  # fast_path.py's
BATCHES_LOOKED_AT = 20_000


@dataclass(frozen=True)
class Plan:
    """What decides the memory of a step, apart from its batch.

    Args:
        half: the type of autocast, or of DeepSpeed's working copy; fp32 for none.
        zero: DeepSpeed's settings under "zero_optimization", or None.
    """

    model_args: object
    half: torch.dtype = torch.bfloat16
    checkpointing: bool = False
    batch_size: int = 8
    accumulation: int = 1
    optim: str = "adamw_torch_fused"
    zero: dict | None = None
    world_size: int = 1
    packing: int | None = None
    seed: int = 42
    epochs: int = 1
    gpu: bool = True
    ways: tuple[str, ...] = ("chunk_head", "take_smaller_layers", "skip_in_last_mlp", "keep_examples_apart")


@dataclass
class Step:
    """Bytes of one forward and backward pass on one card, beside the weights.

    Args:
        layers: what each decoder layer keeps for the backward pass, autocast's copies of its weights included.
        kept: what is kept in all at the end of the forward pass, of which `casts` are copies of weights.
        peak: the most at one time, gradients included where they stay.
        batch: rows, tokens that are computed (padding included, if it is), supervised tokens.
    """

    layers: list[int] = field(default_factory=list)
    kept: int = 0
    casts: int = 0
    peak: int = 0
    batch: tuple[int, int, int] = (0, 0, 0)


class Storages(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is on, from the first tensor on them to the last."""

    def __init__(self, known=()):
        """known: tensors that don't count."""
        super().__init__()
        self.live = self.peak = self.casts = 0
        self.weights = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self.seen = weakref.WeakSet(self.weights)

    def count(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten.index.Tensor:  # numbers decide how many a mask takes: it is a real one
            masks = [[i] if i is None or i.dtype != torch.bool else i.nonzero(as_tuple=True) for i in args[1]]
            args = (args[0], list(chain(*masks)))
        output = operation(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is None or storage in self.seen:
                continue
            size = storage.nbytes()
            self.seen.add(storage)
            self.count(size)
            weakref.finalize(storage, self.count, -size)
            if operation is torch.ops.aten._to_copy.default and args[0].untyped_storage() in self.weights:
                self.casts += size
        return output


def build_model(config, plan: Plan) -> nn.Module:
    """The model of this config as load_model and DeepSpeed would make it, of tensors without numbers."""
    unset_hf_deepspeed_config()  # it would begin to share out the weights
    attention = plan.model_args.attn_implementation
    settings = {
        "dtype": plan.half if plan.model_args.use_lora or plan.zero else torch.float32,
        "attn_implementation": attention if attention in PADDED_ATTENTION else None,
        "trust_remote_code": plan.model_args.trust_remote_code,
    }

    def build() -> nn.Module:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), **settings)

    def without_numbers(model: nn.Module) -> nn.Module:
        with FakeTensorMode(allow_non_fake_inputs=True):  # of a CPU: the meta device knows no autocast
            model.to_empty(device="cpu").tie_weights()
        return model

    model = build()
    if plan.model_args.use_lora:  # PEFT can't move tensors without numbers, and the trial pass needs their device
        found = find_targets(without_numbers(model), plan.model_args.target_modules)
        with patch("lora.find_targets", return_value=found), torch.device("meta"):
            model = add_lora(build(), plan.model_args)
    if plan.zero:
        model.to(settings["dtype"])
    return without_numbers(model).train()


def prepare_step(model: nn.Module, plan: Plan, path_class, undo: ExitStack) -> tuple:
    """The function (model, batch) -> summed loss of the recipe, with those of its fast ways that the model can take.

    Returns:
        it, and whether it leaves the padding out.
    """
    plain = SimpleNamespace(model=model, args=SimpleNamespace(activation_checkpointing=plan.checkpointing))
    plain.loss_of_logits = lambda logits, targets: SFTTrainer.loss_of_logits(None, logits, targets)
    path = path_class(plain) if path_class else None
    ways = [way for way in plan.ways if path and not (plan.checkpointing and way in plan.ways[1:3])]
    for way in ways:
        if way != "keep_examples_apart" or plan.model_args.attn_implementation not in PADDED_ATTENTION:
            try:
                getattr(path, way)(undo)
            except ValueError:  # as on_train_begin leaves it out
                continue
    if plan.checkpointing:
        model.activation_checkpointing_enable()
    if not plan.zero and plan.half != torch.float32:
        undo.callback(setattr, model, "forward", model.forward)
        model.forward = convert_outputs_to_fp32(torch.autocast("cpu", plan.half)(model.forward))
    if path is None:
        return lambda model, batch: SFTTrainer.summed_loss(plain, model, batch), False
    return path.summed_loss, path.padding_free


def takes_half(query: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """fast_path.varlen_takes, on a GPU that is not here."""
    return query.dtype != torch.float32 and query.shape[-1] == value.shape[-1] <= 256 and dropout == 0


def measure_step(model: nn.Module, plan: Plan, dataset, path_class) -> Step:
    """One step of `build_model`'s model on the heaviest batch of the run.

    Raises:
        UserError: the model asks for numbers on its way.
    """
    gradients_stay = plan.zero is None and plan.accumulation == 1
    storages, step = Storages([*model.parameters(), *model.buffers()]), Step()
    decoder = max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)
    with ExitStack() as undo:
        if path_class and plan.gpu:
            undo.enter_context(patch("fast_path.varlen_takes", takes_half))
            undo.enter_context(patch.dict("fast_path.LOGITS_AT_ONCE", cpu=LOGITS_AT_ONCE_ON_GPU))
        # The fast path knows tensors by their address, which those without numbers don't have.
        address = property(lambda tensor: lambda: tensor.untyped_storage()._cdata)
        undo.enter_context(patch.object(FakeTensor, "data_ptr", address, create=True))
        # Of a mixture's experts: what PyTorch has no fake for in fp32, Transformers has.
        undo.enter_context(patch("transformers.integrations.moe._can_use_grouped_mm", return_value=False))
        summed_loss, without_padding = prepare_step(model, plan, path_class, undo)
        batch = heaviest_batch(dataset, plan, without_padding)
        tokens = batch["attention_mask"].sum().item() if without_padding else batch["input_ids"].numel()
        step.batch = len(batch["input_ids"]), tokens, (batch["labels"] != IGNORE_INDEX).sum().item()
        starts, ends = [], []
        for layer in decoder:
            undo.callback(layer.register_forward_pre_hook(lambda *_: starts.append(storages.live)).remove)
            undo.callback(layer.register_forward_hook(lambda *_: ends.append(storages.live)).remove)
        for weight in () if gradients_stay else model.parameters():
            if weight.requires_grad:
                hook = weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
                undo.callback(hook.remove)
        try:
            with storages:
                loss = summed_loss(model, batch)
                step.layers = [end - start for start, end in zip(starts, ends, strict=True)]
                step.kept, step.casts = storages.live, storages.casts
                loss.backward()
        except (RuntimeError, NotImplementedError) as error:
            problem = f"a step of {type(model).__name__} asks for its numbers ({' '.join(str(error).split())[:200]})"
            raise UserError(f"--estimate true: {problem}. Leave it out.") from error
        step.peak = storages.peak
        model.zero_grad()
    return step


def heaviest_batch(dataset, plan: Plan, without_padding: bool) -> dict:
    """That batch of the sampler's which has the most tokens, with padding or without; rank 0 gets a round's fullest."""
    lengths = column(dataset, "length")
    bins = pack_best_fit(lengths, plan.packing) if plan.packing else [[i] for i in range(len(lengths))]
    sampler = BalancedBatchSampler(lengths, bins, plan.batch_size, plan.accumulation, plan.world_size, 0, plan.seed)

    def epoch(number: int):
        sampler.set_epoch(number)
        return sampler

    def tokens(batch: list[int]) -> int:
        some = lengths[batch]
        return some.sum() if without_padding else len(some) * some.max()

    batches = chain.from_iterable(map(epoch, range(plan.epochs)))
    heaviest = max(filter(None, islice(batches, BATCHES_LOOKED_AT)), key=tokens)
    return collate(dataset.select(heaviest).select_columns(SFTTrainer.batch_columns).to_list())


def model_states(model: nn.Module, plan: Plan) -> dict[str, int]:
    """Bytes on a card: "weights", "gradients", "optimizer", "buffers" (DDP's, ZeRO's), "at the step" (fp32 gradients).

    "in RAM" is what one process has offloaded. ZeRO by Rajbhandari et al. (2020), its buffers by DeepSpeed 0.19's code.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    trained_count, count = (sum(weight.numel() for weight in some) for some in (trained, list(model.parameters())))
    per_parameter = next((size for word, size in STATES.items() if word in plan.optim), 8)
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    gradients, ram = sum(weight.nbytes for weight in trained), 0
    if plan.zero is None:
        buckets = gradients if plan.world_size > 1 else 0
        states = {"weights": weights, "gradients": gradients, "optimizer": per_parameter * trained_count}
        return states | {"buffers": buckets, "at the step": 0, "in RAM": 0}
    zero, size, ranks = plan.zero, plan.half.itemsize, plan.world_size
    buffers = zero.get("reduce_bucket_size", 5e8)
    optimizer = (4 + per_parameter) * trained_count // ranks
    # The gradients once more, in one piece, and these in fp32.
    at_step = (size + 4) * min(trained_count // ranks, int(zero.get("sub_group_size", 1e9)))
    if zero["stage"] >= 2:
        gradients //= ranks
    if zero["stage"] == 3:
        hidden_size = model.config.get_text_config().hidden_size
        buffers = hidden_size**2 if buffers == "auto" else buffers
        offloaded = "offload_param" in zero
        ram, weights = (weights // ranks, 0) if offloaded else (0, weights // ranks)
        if ranks > 1 or offloaded:  # what the backward pass will use within this distance stays after the forward pass
            largest = max(weight.numel() for weight in model.parameters())
            buffers += min(count, zero.get("stage3_max_reuse_distance", 1e9) / 2 + largest)
    elif zero.get("overlap_comm"):
        buffers *= 2
    if "offload_optimizer" in zero:
        ram, optimizer, gradients, at_step = ram + optimizer + gradients + at_step, 0, 0, 0
    states = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    return states | {"buffers": int(buffers * size), "at the step": at_step, "in RAM": ram}


@dataclass
class Estimate:
    """Bytes of one card; `peak` is what torch.cuda.max_memory_allocated would say at the end."""

    states: dict[str, int]
    step: Step
    peak: int
    moment: str

    @property
    def needed(self) -> float:
        """Bytes that must be free on the card, CUDA's own included."""
        return self.peak * (1 + FRAGMENTATION) + CONTEXT_GB * GB


def estimate(config, dataset, plan: Plan, path_class) -> Estimate:
    """What a card of the run holds at its fullest: in the backward pass, or when the optimizer takes its step.

    Args:
        dataset: rows with `input_ids`, `labels` and `length`.
        path_class: FastPath, or None for the plain step.

    Raises:
        UserError: this can't be said of the model.
    """
    model = build_model(config, plan)
    step = measure_step(model, plan, dataset, path_class)
    states = model_states(model, plan)
    held = states["weights"] + states["optimizer"]
    gradients_come_in_the_step = plan.zero is None and plan.accumulation == 1
    backward = states["buffers"] + step.peak + (0 if gradients_come_in_the_step else states["gradients"])
    at_step = states["gradients"] + states["at the step"] + (states["buffers"] if plan.zero is None else 0)
    moment = "in the backward pass" if backward > at_step else "at the optimizer's step"
    return Estimate(states, step, held + max(backward, at_step), moment)
