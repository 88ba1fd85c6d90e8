"""The model is looked at before the first step: what can't be trained is refused by name, an adapter is trained on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import losses, run_train, train_here
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, OpenAIGPTConfig

from arguments import ModelArguments, TrainingArguments
from model import PLAIN_TEMPLATE, check_model, load_model, load_tokenizer, mend_generation_config
from rows import UserError


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A copy of the tiny model that may be spoiled."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def change(file: Path, **settings) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def arguments(model, **settings) -> ModelArguments:
    return ModelArguments(model_name_or_path=str(model), **settings)


def training_arguments(tmp_path, **settings) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, **settings)


def flags(model, data, output, eval_data) -> list[str]:
    return [
        *("--model_name_or_path", model, "--data_path", data, "--eval_data_path", eval_data, "--output_dir", output),
        *("--use_lora", "true", "--learning_rate", "1e-2", "--max_steps", "2", "--save_strategy", "no"),
    ]


@pytest.fixture(scope="module")
def adapter(tiny_folder, data_file, eval_file, tmp_path_factory) -> Path:
    """What a LoRA run leaves, of rank 4 on two kinds of layer."""
    output = tmp_path_factory.mktemp("adapter") / "first"
    with pytest.MonkeyPatch.context() as monkeypatch:
        more = ["--lora_r", "4", "--target_modules", "q_proj", "v_proj"]
        train_here(monkeypatch, *flags(tiny_folder, data_file, output, eval_file), *more)
    return output


def results(output: Path) -> dict:
    return json.loads((output / "train_results.json").read_text())


@pytest.mark.parametrize("processes", [1, 2])
def test_an_adapter_is_trained_on(processes, adapter, tiny_folder, data_file, eval_file, tmp_path, monkeypatch):
    from infer import load_trained_model

    if processes == 1:
        train_here(monkeypatch, *flags(adapter, data_file, tmp_path, eval_file))
    else:
        zero3 = ["--deepspeed", "ds_zero3_no_offload.json"]
        run_train(*flags(adapter, data_file, tmp_path, eval_file), *zero3, processes=2)
    assert results(tmp_path)["eval_loss_before"] == pytest.approx(results(adapter)["eval_loss_after"], abs=1e-4)
    assert results(tmp_path)["eval_loss_after"] < results(tmp_path)["eval_loss_before"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], sorted(config["target_modules"])) == (
        tiny_folder,
        4,
        ["q_proj", "v_proj"],
    )
    first, second = (load_file(run / "adapter_model.safetensors") for run in (adapter, tmp_path))
    assert first.keys() == second.keys() and any(not first[name].equal(second[name]) for name in first)
    load_trained_model(str(tmp_path))


def test_a_run_on_an_adapter_goes_on_from_its_checkpoint(adapter, data_file, eval_file, tmp_path, monkeypatch):
    more = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_here(monkeypatch, *flags(adapter, data_file, whole, eval_file), *more)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoint-4")
    (parts / "train_results.json").unlink()
    train_here(monkeypatch, *flags(adapter, data_file, parts, eval_file), *more)
    assert losses(parts) == losses(whole)
    expected, found = (load_file(run / "adapter_model.safetensors") for run in (whole, parts))
    assert all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, r"is an adapter of .* python export.py .*first merged, then MODEL=merged"),
        ({"use_lora": True, "lora_r": 16}, "--lora_r 16: the adapter in .*first was made with 4. Leave the flag out"),
        ({"use_lora": True, "target_modules": ["q_proj"]}, r"--target_modules \['q_proj'\]: .* with \['q_proj', 'v_pr"),
    ],
)
def test_an_adapter_that_other_flags_ask_for(settings, reason, adapter):
    with pytest.raises(UserError, match=reason):
        check_model(arguments(adapter, **settings), 2048)


def test_an_adapter_keeps_its_own_settings(adapter):
    model_args = arguments(adapter, use_lora=True, target_modules=["v_proj", "q_proj"])
    check_model(model_args, 2048)
    assert model_args.lora_r == 4 and model_args.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_git_lfs_pointer(name, folder):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7352032\n")
    with pytest.raises(UserError, match=rf"{name}: is a Git LFS pointer, .* git -C .*model lfs pull"):
        check_model(arguments(folder), 2048)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "qwen2_vl", "vision_config": {}}, "'qwen2_vl' is a vision-language .* recipe train_llava"),
        ({"model_type": "t5"}, "'t5' is an encoder-decoder model"),
        ({"model_type": "bert"}, "'bert' is an encoder model"),
        ({"model_type": "vit"}, "'vit' is no causal language model"),
        ({"model_type": "qwen9"}, "'qwen9' is unknown to Transformers .*: pip install -U transformers"),
        ({"model_type": "qwen9", "auto_map": {"AutoConfig": "configuration.Config"}}, "--trust_remote_code true"),
        ({"model_type": "gpt2", "n_positions": 64}, "--model_max_length 2048: .* 64 positions, .* that works is 64"),
        (
            {"model_type": "llama", "max_position_embeddings": 512, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "beyond 512 tokens, dynamic NTK .* that works is 512",
        ),
    ],
)
def test_a_model_that_cannot_be_trained(config, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=reason) as raised:
        check_model(arguments(tmp_path), 2048)
    assert "\n" not in str(raised.value)


def test_rotary_positions_have_no_end(folder):
    change(folder / "config.json", max_position_embeddings=64)
    assert check_model(arguments(folder), 2048).max_position_embeddings == 64


def test_a_tokenizer_with_more_ids_than_the_model(folder, data_file, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = len(tokenizer)
    tokenizer.add_tokens(["一个新词"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=f"the tokenizer has {ids + 1} ids, the model's embedding {ids} rows"):
        train_here(monkeypatch, "--model_name_or_path", folder, "--data_path", data_file, "--output_dir", tmp_path)


def spoil(file: Path, rename) -> None:
    save_file({rename(name): weight for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})


def test_weights_under_other_names(folder, data_file, tmp_path):
    spoil(folder / "model.safetensors", lambda name: f"module.{name}")
    reason = "lacks 27 of the model's tensors: lm_head.weight, model.embed_tokens.weight, "
    with pytest.raises(UserError, match=rf"{reason}.*; has 26 that the model doesn't know: module.lm_head.weight, "):
        load_model(arguments(folder), training_arguments(tmp_path))
    zero3 = ["--deepspeed", "ds_zero3_no_offload.json", "--output_dir", tmp_path, "--data_path", data_file]
    assert reason in run_train("--model_name_or_path", folder, *zero3, processes=2, status=1)


def test_weights_of_another_size(folder, tmp_path):
    change(folder / "config.json", intermediate_size=512)
    with pytest.raises(UserError, match=r"has 6 of another size: .*down_proj.weight \(\[256, 768\] for \[256, 512\]\)"):
        load_model(arguments(folder), training_arguments(tmp_path))


def test_a_tied_tensor_under_either_name_and_tensors_of_others_are_no_error(folder, tmp_path):
    file = folder / "model.safetensors"
    weights = load_file(file) | {"value_head.weight": torch.zeros(1)}
    tied = weights.pop("lm_head.weight")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        save_file(weights | {name: tied}, file, metadata={"format": "pt"})
        model = load_model(arguments(folder), training_arguments(tmp_path))
        assert model.lm_head.weight.equal(tied) and model.get_input_embeddings().weight.equal(tied)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_tied_layer(target, tiny_folder, tmp_path):
    with pytest.raises(UserError, match="--target_modules: .* are one weight"):
        load_model(arguments(tiny_folder, use_lora=True, target_modules=[target]), training_arguments(tmp_path))


def test_a_model_without_activation_checkpointing(tmp_path):
    config = OpenAIGPTConfig(vocab_size=64, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    checkpointing = training_arguments(tmp_path, gradient_checkpointing=True)
    reason = "--gradient_checkpointing true: OpenAIGPTLMHeadModel has no activation checkpointing. Leave it out."
    with pytest.raises(UserError, match=reason):
        load_model(arguments(tmp_path / "model"), checkpointing)
    load_model(arguments(tmp_path / "model"), training_arguments(tmp_path))


def test_an_adapter_of_another_model(tiny_folder, adapter, tmp_path):
    spoiled = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    change(spoiled / "adapter_config.json", r=2)
    with pytest.raises(
        UserError, match=f"{spoiled}: the adapter can't be put on its base model: .* size mismatch"
    ) as raised:
        load_model(arguments(spoiled, use_lora=True), training_arguments(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_generation_config_that_cannot_be_saved(folder, tmp_path):
    change(folder / "generation_config.json", temperature=0.7, top_p=0.8)
    model = AutoModelForCausalLM.from_pretrained(folder)
    notes = mend_generation_config(model)
    assert notes == ["generation_config.json has settings that need do_sample; it is saved with do_sample=True"]
    model.generation_config.pad_token_id = 0  # the Trainer changes it too, and only then saving is strict
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["temperature"] == 0.7
    model.generation_config.pad_token_id = -1
    with pytest.raises(UserError, match=r"generation_config.json .* can't be saved.*pad_token_id"):
        mend_generation_config(model)


def test_the_template_of_tokenizers_that_bring_none(folder):
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(arguments(folder)).chat_template == PLAIN_TEMPLATE
    tokenizer_file = json.loads((folder / "tokenizer.json").read_text())
    bos = {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
    single = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer_file["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single}
    tokenizer_file["post_processor"]["special_tokens"] = {"<|im_start|>": bos}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_file))
    change(folder / "tokenizer_config.json", bos_token="<|im_start|>")
    assert load_tokenizer(arguments(folder)).chat_template == "{{ bos_token }}" + PLAIN_TEMPLATE
    change(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match="neither a chat template nor an EOS"):
        load_tokenizer(arguments(folder))
