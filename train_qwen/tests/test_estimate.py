"""The estimate of a GPU's memory is what a real step keeps, byte for byte where it can be; its advice helps."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from datasets import Dataset
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from ranks import RECIPE, train_here
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    MixtralConfig,
    Qwen2Config,
)

import estimate as screen
from arguments import PADDED_ATTENTION, ModelArguments, TrainingArguments
from fast_path import FastPath
from lora import add_lora
from memory import Plan, Storages, build_model, estimate, heaviest_batch, model_states
from trainer import SFTTrainer

SIZES = {"vocab_size": 2000, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
ON_CPU = Plan(ModelArguments(), half=torch.float32, gpu=False)
LORA = ModelArguments(use_lora=True)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in torch.randint(50, 300, (24,), generator=generator).tolist():
        ids = torch.randint(10, 2000, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :], "length": length})
    return Dataset.from_list(rows)


def build_real_model(plan: Plan, config=None):
    """What load_model makes of a folder, with random weights."""
    torch.manual_seed(0)
    half = plan.half if plan.model_args.use_lora else torch.float32
    attention = plan.model_args.attn_implementation
    model = AutoModelForCausalLM.from_config(config or Qwen2Config(**SIZES), dtype=half, attn_implementation=attention)
    return add_lora(model, plan.model_args) if plan.model_args.use_lora else model


def real_trainer(plan: Plan, dataset, folder, with_fast_path: bool, config=None) -> SFTTrainer:
    """The recipe's trainer as it is when its first step begins."""
    settings = {"output_dir": str(folder), "use_cpu": True, "eval_strategy": "no", "eval_on_start": False}
    settings |= {"per_device_train_batch_size": plan.batch_size, "activation_checkpointing": plan.checkpointing}
    model, args = build_real_model(plan, config), TrainingArguments(**settings)
    trainer = SFTTrainer(model, args, train_dataset=dataset, packing=plan.packing)
    args.bf16 = plan.half != torch.float32  # decides what the trial takes for rounding
    if args.bf16:
        model.forward = convert_outputs_to_fp32(torch.autocast("cpu", plan.half)(model.forward))
    if with_fast_path:
        path = FastPath(trainer, plan.model_args.attn_implementation not in PADDED_ATTENTION)
        assert path.choose_ways() == [] or config
    if plan.checkpointing:
        model.activation_checkpointing_enable()
    return trainer


def watch_real_step(trainer, batch: dict, monkeypatch) -> tuple[int, int]:
    """Bytes that autograd saves in the forward pass, weights left out; the most at one time, backward pass included.

    Saved are, besides what the hooks see, what fast_path's own hooks hand on and what checkpointing holds for itself:
    the arguments of the layers.
    """
    model, saved = trainer.model.train(), {}
    weights = {weight.untyped_storage()._cdata for weight in [*model.parameters(), *model.buffers()]}

    def remember(tensor):
        if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in weights:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    def hooks_that_tell(pack, unpack):
        return saved_tensors_hooks(lambda tensor: remember(pack(tensor)), unpack)

    def remember_arguments(layer, args, kwargs):
        for value in [*args, *kwargs.values(), *kwargs.get("position_embeddings", ())]:
            remember(value)

    monkeypatch.setattr("fast_path.saved_tensors_hooks", hooks_that_tell)
    hooks = []
    if trainer.args.activation_checkpointing:
        layers = max((module for module in model.modules() if isinstance(module, torch.nn.ModuleList)), key=len)
        hooks = [layer.register_forward_pre_hook(remember_arguments, with_kwargs=True) for layer in layers]
    storages = Storages([*model.parameters(), *model.buffers()])
    with storages:
        with saved_tensors_hooks(remember, lambda tensor: tensor):
            loss = trainer.summed_loss(model, batch)
        for hook in hooks:
            hook.remove()
        kept = sum(storage.nbytes() for storage in saved.values())
        saved.clear()
        loss.backward()
    return kept, storages.peak


CASES = {
    "padding left out": (ON_CPU, True),
    "the plain step": (ON_CPU, False),
    "sdpa, padded": (replace(ON_CPU, model_args=ModelArguments(attn_implementation="sdpa")), True),
    "eager, padded": (replace(ON_CPU, model_args=ModelArguments(attn_implementation="eager")), True),
    "packed": (replace(ON_CPU, packing=512, batch_size=2), True),
    "checkpointing": (replace(ON_CPU, checkpointing=True), True),
    "LoRA": (replace(ON_CPU, model_args=LORA), True),
    "LoRA, checkpointing": (replace(ON_CPU, model_args=LORA, checkpointing=True), True),
    "autocast": (replace(ON_CPU, half=torch.bfloat16), True),
    "autocast, LoRA, padded": (
        replace(ON_CPU, half=torch.bfloat16, model_args=replace(LORA, attn_implementation="sdpa")),
        True,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_activations_and_peak_are_those_of_a_real_step(case, dataset, tmp_path, monkeypatch):
    plan, with_fast_path = CASES[case]
    found = estimate(Qwen2Config(**SIZES), dataset, plan, FastPath if with_fast_path else None)
    trainer = real_trainer(plan, dataset, tmp_path, with_fast_path)
    without_padding = with_fast_path and plan.model_args.attn_implementation is None
    batch = heaviest_batch(dataset, plan, without_padding)
    kept, peak = watch_real_step(trainer, batch, monkeypatch)
    assert found.step.kept == pytest.approx(kept, rel=0.05)
    assert found.step.peak == pytest.approx(peak, rel=0.01)
    assert found.step.batch[1] == (batch["attention_mask"].sum() if without_padding else batch["input_ids"].numel())


@pytest.mark.parametrize(
    "config",
    [
        Gemma3TextConfig(**SIZES, head_dim=16),  # sliding windows, four norms a layer
        GPT2Config(vocab_size=2000, n_embd=64, n_layer=3, n_head=4),  # LayerNorm, no gate, dropout
        MixtralConfig(**SIZES, num_local_experts=4),
        FalconConfig(vocab_size=2000, hidden_size=64, num_hidden_layers=3, num_attention_heads=4),  # padded
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures_are_counted_by_the_same_code(config, dataset, tmp_path, monkeypatch):
    found = estimate(config, dataset, ON_CPU, FastPath)
    trainer = real_trainer(ON_CPU, dataset, tmp_path, with_fast_path=True, config=config)
    batch = heaviest_batch(dataset, ON_CPU, without_padding=config.model_type != "falcon")
    _, peak = watch_real_step(trainer, batch, monkeypatch)
    assert found.step.peak == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize("model_args", [ModelArguments(), LORA], ids=["all weights", "LoRA"])
def test_weights_gradients_and_optimizer_are_those_of_a_real_model(model_args):
    plan = Plan(model_args)
    found, model = model_states(build_model(Qwen2Config(**SIZES), plan), plan), build_real_model(plan)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW(weights)
    optimizer.step()
    states = [tensor for of in optimizer.state.values() for tensor in of.values() if tensor.ndim]
    assert found["weights"] == sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert found["gradients"] == sum(weight.grad.nbytes for weight in weights)
    assert found["optimizer"] == sum(tensor.nbytes for tensor in states)
    assert found["buffers"] == 0 and model_states(model, replace(plan, world_size=2))["buffers"] == found["gradients"]


def read_zero(name: str) -> dict:
    return json.loads((RECIPE / name).read_text())["zero_optimization"]


def test_zero_shares_out_what_deepspeed_says():
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES), dtype=torch.bfloat16)
    count = sum(weight.numel() for weight in model.parameters())

    def states(name: str) -> dict:
        return model_states(model, Plan(ModelArguments(), zero=read_zero(name), world_size=8))

    _, on_card = estimate_zero2_model_states_mem_needs(count, 8, cpu_offload=False)
    found = states("ds_zero2_no_offload.json")
    # DeepSpeed leaves out the gradients that are put in one piece before they become fp32, and the buckets.
    held = found["weights"] + found["gradients"] + found["optimizer"] + found["at the step"] - 2 * count // 8
    assert held == pytest.approx(on_card, rel=1e-3)
    assert found["buffers"] == 2 * 2 * 500_000_000
    _, on_card = estimate_zero2_model_states_mem_needs(count, 8, cpu_offload=True)
    offloaded = states("ds_zero2_offload.json")
    assert offloaded["weights"] == pytest.approx(on_card, rel=1e-3) and offloaded["optimizer"] == 0
    whole = states("ds_zero3_no_offload.json")
    assert whole["weights"] == pytest.approx(2 * count / 8, rel=1e-3)
    assert whole["buffers"] >= 2 * count  # of so small a model all layers stay together
    assert states("ds_zero3_offload.json")["weights"] == 0


@pytest.fixture
def large_folder(tiny_folder, tmp_path) -> Path:
    """The tiny model's folder with the config of a larger one, and no weights: they are not looked at."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "large"))
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 2048, "intermediate_size": 8192, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_advice_is_followed_and_the_estimate_falls(large_folder, data_file, tmp_path, monkeypatch, capsys):
    output = tmp_path / "output"
    flags = ["--model_name_or_path", large_folder, "--data_path", data_file, "--output_dir", output]

    def needed(*more, **cards) -> tuple[float, str]:
        monkeypatch.setattr(screen, "find_cards", lambda: cards)
        train_here(monkeypatch, *flags, "--estimate", "true", *more)
        printed = capsys.readouterr().out
        return float(re.search(r"^needed +([\d.]+) GB", printed, re.M)[1]), printed

    at_first, printed = needed(small=1e9, large=24e9)
    assert at_first > 1 and "fits large\n" in printed and not output.exists(), "it may be asked for beside a run"
    advice = dict(re.findall(r"^or +([\d.]+) GB by (--[^:,]+)", printed, re.M))
    assert {flags.split()[0] for flags in advice.values()} >= {"--deepspeed", "--use_lora"}
    promised, followed = [*advice.items()][-2]  # DeepSpeed's
    found, _ = needed(*followed.split(), large=24e9)
    assert found == pytest.approx(float(promised), abs=0.011) and found < at_first


def test_a_model_that_asks_for_its_numbers_is_refused(dataset):
    from rows import UserError

    config = MixtralConfig(**SIZES | {"num_local_experts": 2})
    config._experts_implementation = "eager"
    with pytest.raises(UserError, match="--estimate true: a step of MixtralForCausalLM asks for its numbers"):
        estimate(config, dataset, ON_CPU, FastPath)
