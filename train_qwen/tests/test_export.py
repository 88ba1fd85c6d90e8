"""The exported folder: the same logits, plain files, and refusals."""

import json
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
    assert "largest difference of a logit" in capsys.readouterr().out
    assert json.loads(Path(target, "config.json").read_text())["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(target).dtype == getattr(torch, dtype)


def test_whole_model_is_copied_plain(tiny_folder, tmp_path):
    target = tmp_path / "plain"
    assert export.export(tiny_folder, str(target)) == 0
    assert (target / "model.safetensors").is_file()


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
