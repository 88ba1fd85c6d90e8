"""The exported folder: the same logits with a picture in the prompt, names that vLLM reads, and refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as T
from ranks import RECIPE
from safetensors.torch import load_file
from small_parts import make_language_model, make_tower

import export
from build_model import build_llava
from infer import load_trained_model
from rows import UserError

T.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("parts")
    vision, text = make_tower("clip", folder / "clip"), make_language_model("qwen2", folder / "qwen2")
    build_llava(vision, text, str(folder / "llava"))
    return str(folder / "llava")


def write_adapter(base: str, folder: Path, target=r".*language_model.*_proj") -> str:
    """What a LoRA run leaves: adapters, the trained projector, the processor."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, processor = load_trained_model(base)
    projector = {"modules_to_save": ["multi_modal_projector"]}
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=target, init_lora_weights=False, **projector)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "multi_modal_projector.modules_to_save" in name:
                weight.add_(torch.randn_like(weight))
    adapted.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(llava, tmp_path_factory) -> str:
    return write_adapter(llava, tmp_path_factory.mktemp("adapter"))


def test_merged_folder_says_what_base_adapter_and_projector_say(adapter, llava, tmp_path):
    assert export.export(adapter, str(tmp_path / "merged")) < 1e-3
    tuned, processor = load_trained_model(adapter)
    merged = T.LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    expected = export.probe_logits(tuned, processor)
    assert (expected - export.probe_logits(load_trained_model(llava)[0], processor)).abs().max() > 0.1
    torch.testing.assert_close(export.probe_logits(merged, processor), expected, atol=1e-3, rtol=1e-4)
    projector = [one.model.multi_modal_projector.linear_1.weight for one in (merged, load_trained_model(llava)[0])]
    assert not torch.equal(*projector)


def test_a_fresh_process_reads_equal_logits(adapter, llava, tmp_path):
    """With Transformers alone, as its user would: no module of this recipe."""
    export.export(adapter, str(tmp_path / "merged"))
    tuned, processor = load_trained_model(adapter)
    torch.save(export.probe_logits(tuned, processor), tmp_path / "expected.pt")
    export.draw_probe().save(tmp_path / "probe.png")
    code = """
import sys, torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
folder, picture, expected = sys.argv[1:]
model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(folder, backend="pil")
messages = [{"role": "user", "content": "<image>\\n你好，图里有什么？"}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=text, images=Image.open(picture), return_tensors="pt")
with torch.no_grad():
    print((model(**inputs).logits[0] - torch.load(expected)).abs().max().item())
"""
    arguments = [str(tmp_path / name) for name in ("merged", "probe.png", "expected.pt")]
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert float(result.stdout.split()[-1]) < 1e-4
    assert RECIPE not in tmp_path.parents


def test_names_and_files_that_vllm_reads(adapter, tmp_path, capsys):
    """vLLM's LlavaForConditionalGeneration and Transformers 4 read the layout of llava-hf's folders."""
    target = tmp_path / "merged"
    export.main([adapter, str(target), "--dtype", "float16"])
    screen = capsys.readouterr().out
    assert "largest difference of a logit" in screen and f"vllm serve {target} --max-model-len 32768" in screen
    files = {path.name for path in target.iterdir()}
    assert {"config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"} <= files
    assert not [name for name in files if "adapter" in name or name.endswith((".bin", ".pt"))]
    weights = load_file(target / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"vision_tower", "multi_modal_projector", "language_model"}
    assert "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight" in weights
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in weights
    assert "language_model.lm_head.weight" not in weights  # one with the embedding
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    config = json.loads((target / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"] and config["dtype"] == "float16"
    assert config["text_config"]["rope_theta"] == config["text_config"]["rope_parameters"]["rope_theta"]
    pictures = json.loads((target / "preprocessor_config.json").read_text())
    assert pictures["image_processor_type"] == "LlavaImageProcessor" and pictures["do_pad"]
    _, processor = load_trained_model(str(target))
    assert processor.tokenizer.eos_token == "<|im_end|>"


def test_a_tower_that_vllm_does_not_know(llava, tmp_path, capsys):
    text = make_language_model("llama", tmp_path / "text")
    build_llava(make_tower("levit", tmp_path / "levit"), text, str(tmp_path / "llava"))
    export.main([str(tmp_path / "llava"), str(tmp_path / "plain")])
    assert f"python app.py {tmp_path}/plain    (vLLM's LLaVA knows no tower levit)" in capsys.readouterr().out
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("llava", "plain"))
    assert before.keys() == after.keys() and all(after[name].equal(before[name]) for name in before)


def test_an_adapter_on_one_of_two_tied_layers_is_refused(llava, tmp_path):
    adapter = write_adapter(llava, tmp_path / "adapter", target=["embed_tokens"])
    with pytest.raises(UserError, match="changes embed_tokens, .* one weight"):
        export.export(adapter, str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_a_wrong_merge_and_a_full_disk_leave_nothing(adapter, llava, tmp_path, monkeypatch):
    from peft import PeftModel

    def fail(folder):
        raise OSError(28, "No space left on device", f"{folder}/config.json")

    with monkeypatch.context() as patch:
        patch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
        with pytest.raises(UserError, match=r"its logits differ .* Do not use it"):
            export.export(adapter, str(tmp_path / "merged"))
    monkeypatch.setattr(export, "write_older_names", fail)
    with pytest.raises(SystemExit, match=r"config.json: No space left on device\. Free some space"):
        export.main([llava, str(tmp_path / "plain")])
    assert not list(tmp_path.iterdir())
    (tmp_path / "notes.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(SystemExit, match="is not an empty folder"):
            export.main([llava, str(target)])
