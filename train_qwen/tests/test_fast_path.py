"""The fast ways give the plain step's loss and gradients, or are left out; what may be changed in the plain step."""

import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from ranks import RECIPE, losses, run_train, train_here
from transformers import (
    AutoModelForCausalLM,
    CpmAntConfig,
    CpmAntForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import arguments
import fast_path
from data import load_encoded
from fast_path import FastPath
from rows import UserError
from trainer import SFTTrainer

SMALL = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 319}


def make_rows() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (20, 47, 33, 41):
        ids = torch.randint(10, 320, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :], "length": length})
    return rows


def make_trainer(model, tmp_path, **settings) -> SFTTrainer:
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "max_steps": 1, "save_strategy": "no"} | settings
    settings |= {"eval_strategy": "no", "eval_on_start": False, "learning_rate": 0.0, "disable_tqdm": True}
    return SFTTrainer(model, arguments.TrainingArguments(**settings), train_dataset=Dataset.from_list(make_rows()))


def take_fast_path(trainer) -> tuple[FastPath, list[str]]:
    path = FastPath(trainer)
    return path, path.choose_ways()


def gradients_of(trainer) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    batch = trainer.data_collator(make_rows())
    trainer.summed_loss(trainer.model, batch).backward()
    return {name: weight.grad.clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


def spread_logits(model):
    """Random weights of the usual size give nearly equal logits, in which differences don't show."""
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.mul_(3)
    return model


def small_model(kind: str, tiny_folder: str):
    torch.manual_seed(0)
    if kind == "gemma":  # weights are kept as their distance from 1; GELU in place of SiLU
        return spread_logits(GemmaForCausalLM(GemmaConfig(head_dim=16, **SMALL)))
    if kind == "phi3":  # gate and up are one matrix
        return spread_logits(Phi3ForCausalLM(Phi3Config(**SMALL)))
    return spread_logits(AutoModelForCausalLM.from_pretrained(tiny_folder))


@pytest.mark.parametrize("kind", ["qwen2", "qwen2 frozen", "gemma", "phi3"])
def test_all_ways_together_have_the_gradients_of_the_plain_step(kind, tiny_folder, tmp_path):
    model = small_model(kind, tiny_folder)
    if kind.endswith("frozen"):  # as under LoRA: only some weights learn
        model.requires_grad_(False)
        model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    trainer = make_trainer(model, tmp_path)
    expected = gradients_of(trainer)
    path, notes = take_fast_path(trainer)
    assert notes == [] and path.padding_free and path.head_is_chunked and path.last_mlp is not None
    assert path.smaller_layers == 3 * len(model.model.layers) + 1
    torch.testing.assert_close(gradients_of(trainer), expected, rtol=1e-3, atol=1e-3)
    path.undo.close()
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.config._attn_implementation == "sdpa" and "summed_loss" not in vars(trainer)
    torch.testing.assert_close(gradients_of(trainer), expected, rtol=0, atol=0)


def raise_key_error(*args, **kwargs):
    raise KeyError("sequence_lengths")


def double_head_gradient(ctx, gradient):
    hidden_gradient, weight_gradient = ctx.saved_tensors
    return hidden_gradient * gradient, 2 * weight_gradient * gradient, None, None


def ignore_the_mask(*args):
    return F.scaled_dot_product_attention(*args[1:4], is_causal=True, enable_gqa=True).transpose(1, 2), None


@pytest.mark.parametrize(
    ("way", "break_it", "note"),
    [
        ("remove_padding", raise_key_error, "padded batches: 'sequence_lengths'"),
        ("packed_sdpa", None, "padded batches: the loss is"),
        ("ChunkedCrossEntropy", double_head_gradient, "logits of whole batches: the gradients are not those"),
        ("project_down", lambda down, act, gate, up: down(act(gate) * up.detach()), None),
        ("RMSNormFunction", lambda ctx, gradient: (gradient, None, None, None, None), None),
    ],
)
def test_a_way_that_fails_is_left_out_and_the_others_stay(way, break_it, note, tiny_folder, tmp_path, monkeypatch):
    trainer = make_trainer(small_model("qwen2", tiny_folder), tmp_path)
    expected = gradients_of(trainer)
    if way == "packed_sdpa":  # attention over the whole row
        monkeypatch.setitem(
            transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._global_mapping,
            way,
            lambda module, q, k, v, *args, **kwargs: ignore_the_mask(module, q, k, v),
        )
    elif way in ("ChunkedCrossEntropy", "RMSNormFunction"):
        monkeypatch.setattr(getattr(fast_path, way), "backward", staticmethod(break_it))
    else:
        monkeypatch.setattr(fast_path, way, break_it)
    path, notes = take_fast_path(trainer)
    assert [text[: len(note or "")] for text in notes] == ([note] if note else [])
    assert path.padding_free == (way not in ("remove_padding", "packed_sdpa"))
    assert path.head_is_chunked == (way != "ChunkedCrossEntropy")
    layers = trainer.model.config.num_hidden_layers
    assert path.smaller_layers == {"project_down": 2 * layers + 1, "RMSNormFunction": layers}.get(way, 3 * layers + 1)
    torch.testing.assert_close(gradients_of(trainer), expected, rtol=1e-3, atol=1e-3)


def test_another_loss_is_one_function_and_the_fast_path_keeps_to_it(tiny_folder, tmp_path, monkeypatch):
    def smoothed(self, logits, targets):
        logits, targets = logits.flatten(0, -2).float(), targets.flatten()
        return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum", label_smoothing=0.1)

    monkeypatch.setattr(SFTTrainer, "loss_of_logits", smoothed)
    trainer = make_trainer(small_model("qwen2", tiny_folder), tmp_path)
    expected = gradients_of(trainer)
    path, notes = take_fast_path(trainer)
    assert len(notes) == 1 and notes[0].startswith("logits of whole batches: the ") and path.padding_free
    torch.testing.assert_close(gradients_of(trainer), expected, rtol=1e-3, atol=1e-3)


def test_without_its_file_the_recipe_trains(tiny_folder, data_file, eval_file, tmp_path):
    copy = tmp_path / "recipe"
    shutil.copytree(RECIPE, copy, ignore=shutil.ignore_patterns("fast_path.py", "tests", "cache_data", "output*"))
    flags = ["--use_cpu", "true", "--model_name_or_path", tiny_folder, "--data_path", data_file]
    flags += ["--eval_data_path", eval_file, "--output_dir", tmp_path / "out", "--num_train_epochs", "1"]
    subprocess.run([sys.executable, "train.py", *map(str, flags)], cwd=copy, check=True, capture_output=True)
    before, after = losses(tmp_path / "out", "eval_loss")
    assert after < before


def test_other_rows_are_measured_and_the_rest_is_refused(tiny_folder, data_file, eval_file, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    rows, others = (load_encoded(path, tokenizer, 2048)[0] for path in (data_file, eval_file))
    args = arguments.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    trainer = SFTTrainer(model, args, train_dataset=rows, eval_dataset=others)
    held_out, trained = trainer.evaluate(), trainer.evaluate(rows, metric_key_prefix="train")
    assert set(trained) == {"train_loss", "train_perplexity"} and trained["train_loss"] != held_out["eval_loss"]
    batch = trainer.data_collator(list(rows.select_columns(["input_ids", "labels"])))
    expected = model(**batch).loss.item()
    assert trained["train_loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(NotImplementedError, match="predict is not taken: infer.py"):
        trainer.predict(rows)
    for name in ("compute_metrics", "compute_loss_func"):
        with pytest.raises(NotImplementedError, match=f"{name} is not taken: "):
            SFTTrainer(model, args, train_dataset=rows, **{name: print})


def test_a_model_whose_padded_batches_are_not_its_rows_has_batches_of_one(tmp_path):
    torch.manual_seed(0)
    small = {"dim_head": 16, "dim_ff": 128, "prompt_types": 4, "prompt_length": 4, "segment_types": 4}
    model = spread_logits(CpmAntForCausalLM(CpmAntConfig(**SMALL, **small)))
    with pytest.raises(UserError, match="another loss on padded batches .* Give --per_device_train_batch_size 1"):
        make_trainer(model, tmp_path, per_device_train_batch_size=4).train()
    ones = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    make_trainer(model, tmp_path, **ones).train()


def test_two_processes_train_what_gets_no_gradient(tokenizer, data_file, eval_file, tmp_path, monkeypatch):
    """The indexer of DeepSeek V3.2 chooses tokens; no gradient of the loss reaches its weights."""
    torch.manual_seed(0)
    small = SMALL | {"vocab_size": len(tokenizer), "num_key_value_heads": 4, "moe_intermediate_size": 32}
    small |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 16}
    small |= {"q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "index_topk": 512}
    small |= {"index_n_heads": 2, "index_head_dim": 16, "first_k_dense_replace": 1}
    DeepseekV32ForCausalLM(DeepseekV32Config(**small)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--model_name_or_path", tmp_path / "model", "--data_path", data_file, "--eval_data_path", eval_file]
    flags += ["--max_steps", "3", "--logging_steps", "1", "--save_strategy", "no", "--learning_rate", "1e-3"]
    train_here(monkeypatch, *flags, "--output_dir", tmp_path / "one", "--per_device_train_batch_size", "8")
    run_train(*flags, "--output_dir", tmp_path / "two", "--per_device_train_batch_size", "4", processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


def test_every_flag_of_transformers_is_decided_upon():
    fields = {field.name for field in dataclasses.fields(arguments.TrainingArguments)}
    decided = [*arguments.DECIDES_THE_NUMBERS, *arguments.FREE, *arguments.NOT_TAKEN]
    assert sorted(decided) == sorted(fields)
    assert not set(arguments.NOT_TAKEN) & set(dataclasses.asdict(arguments.ModelArguments()))
