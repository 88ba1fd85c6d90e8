"""The exported folder: the same logits, plain files, and refusals."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import export
from infer import load_trained_model
from rows import UserError


@pytest.fixture(scope="module")
def adapter(tiny_folder, tokenizer, tmp_path_factory) -> str:
    """A LoRA adapter that changes every linear layer, and the tokenizer, as train.py leaves them."""
    from peft import LoraConfig, get_peft_model

    folder = str(tmp_path_factory.mktemp("adapter"))
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Path(folder, "checkpoint-5").mkdir()
    Path(folder, "checkpoint-5", "optimizer.pt").write_bytes(b"x")
    return folder


@torch.no_grad()
def logits(model, tokenizer) -> torch.Tensor:
    inputs = tokenizer("天地玄黄，宇宙洪荒。", return_tensors="pt")
    return model(**inputs).logits[0].float()


def test_merged_folder_says_what_base_and_adapter_say(adapter, tiny_folder, tokenizer, tmp_path):
    target = str(tmp_path / "merged")
    assert export.export(adapter, target) < 1e-3
    merged = AutoModelForCausalLM.from_pretrained(target).eval()
    assert type(merged).__name__ == "Qwen2ForCausalLM" and merged.dtype == torch.float32
    tuned = logits(load_trained_model(adapter)[0], tokenizer)
    base = logits(load_trained_model(tiny_folder)[0], tokenizer)
    assert (tuned - base).abs().max() > 0.1
    torch.testing.assert_close(logits(merged, AutoTokenizer.from_pretrained(target)), tuned, atol=1e-3, rtol=1e-4)


def test_merged_folder_holds_what_serving_needs_and_nothing_else(adapter, tokenizer, tmp_path):
    target = tmp_path / "merged"
    export.export(adapter, str(target))
    files = {path.name for path in target.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} <= files
    assert not [name for name in files if "adapter" in name or "checkpoint" in name or name.endswith((".bin", ".pt"))]
    assert AutoTokenizer.from_pretrained(target).chat_template == tokenizer.chat_template
    ends = GenerationConfig.from_pretrained(target).eos_token_id
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(adapter, tmp_path, dtype, capsys):
    target = str(tmp_path / "merged")
    export.main([adapter, target, "--dtype", dtype])
    screen = capsys.readouterr().out
    assert "largest difference of a logit" in screen and f"vllm serve {target} --max-model-len 2048" in screen
    assert json.loads(Path(target, "config.json").read_text())["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(target).dtype == getattr(torch, dtype)


def test_whole_model_is_copied_plain(tiny_folder, tmp_path):
    target = tmp_path / "plain"
    assert export.export(tiny_folder, str(target)) == 0
    assert (target / "model.safetensors").is_file()


def copy_with(folder: str, target: Path, **files: dict) -> str:
    """A copy of a model folder with some values of its .json files replaced."""
    shutil.copytree(folder, target)
    for name, values in files.items():
        file = target / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return str(target)


@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_older_readers_find_what_they_look_for_and_so_does_the_newest(kind, tiny_folder, tokenizer, tmp_path):
    scaling = {"rope_type": kind}
    if kind == "yarn":
        scaling |= {"factor": 4.0, "original_max_position_embeddings": 512}
    path = copy_with(tiny_folder, tmp_path / "base", config={"rope_parameters": scaling | {"rope_theta": 1e6}})
    target = tmp_path / "plain"
    umask = os.umask(0o027)
    try:
        export.export(path, str(target))
    finally:
        os.umask(umask)
    config = json.loads((target / "config.json").read_text())
    assert config["rope_theta"] == 1e6 and config.get("rope_scaling") == (None if kind == "default" else scaling)
    assert AutoModelForCausalLM.from_pretrained(target).config.rope_parameters == scaling | {"rope_theta": 1e6}
    config = json.loads((target / "tokenizer_config.json").read_text())
    assert (
        config["additional_special_tokens"] == tokenizer.extra_special_tokens and "extra_special_tokens" not in config
    )
    assert AutoTokenizer.from_pretrained(target).extra_special_tokens == tokenizer.extra_special_tokens
    assert {file.stat().st_mode & 0o777 for file in target.iterdir()} == {0o640}


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        ({"temperature": 0.7, "top_k": 20}, {"do_sample": True, "temperature": 0.7, "top_k": 20}),
        ({"do_sample": False, "temperature": 0.7}, {"do_sample": False}),
        ({"temperature": 0.0}, {"do_sample": False}),
    ],
)
def test_generation_settings_that_contradict_each_other_are_mended(settings, written, tiny_folder, tmp_path):
    path = copy_with(tiny_folder, tmp_path / "base", generation_config=settings)
    export.export(path, str(tmp_path / "plain"))
    config = json.loads((tmp_path / "plain" / "generation_config.json").read_text())
    names = ("do_sample", "temperature", "top_p", "top_k")
    assert {name: config[name] for name in names if config.get(name) is not None} == written


def test_generation_settings_beyond_mending_are_named(tiny_folder, tmp_path):
    path = copy_with(tiny_folder, tmp_path / "base", generation_config={"typical_p": 0.5})
    with pytest.raises(SystemExit, match=r"base: the generation_config.json .* can't be saved.*typical_p"):
        export.main([path, str(tmp_path / "plain")])
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapter_on_one_of_two_tied_layers_is_refused(target, tiny_folder, tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", target_modules=[target], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), config).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=f"changes {target}, .* one weight"):
        export.export(str(tmp_path / "adapter"), str(tmp_path / "merged"))


def test_full_disk_is_said_in_one_line_and_leaves_nothing(tiny_folder, tmp_path, monkeypatch):
    def fail(folder):
        assert (folder / "model.safetensors").exists()
        raise OSError(28, "No space left on device", f"{folder}/config.json")

    monkeypatch.setattr(export, "write_older_names", fail)
    with pytest.raises(SystemExit, match=r"config.json: No space left on device\. Free some space"):
        export.main([tiny_folder, str(tmp_path / "plain")])
    assert not list(tmp_path.iterdir())


def test_target_that_is_not_empty_is_left_alone(adapter, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(SystemExit, match="is not an empty folder"):
            export.main([adapter, str(target)])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_wrong_merge_is_found(adapter, tmp_path, monkeypatch):
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(UserError, match=r"its logits differ .* Do not use it"):
        export.export(adapter, str(tmp_path / "merged"))
    assert not list(tmp_path.iterdir())
