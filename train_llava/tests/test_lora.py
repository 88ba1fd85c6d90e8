"""Adapters stand in the language model alone; they and the projector come back from the disk as they were."""

import pytest
import torch
from peft import PeftModel
from ranks import losses, run_train, server, train_here
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

import lora
import model as model_module
from arguments import ModelArguments, TrainingArguments
from infer import load_trained_model
from lora import find_targets
from model import freeze, load_model
from rows import UserError

FLAGS = "--train_type use_lora --lora_dropout 0 --learning_rate 1e-2 --projector_learning_rate 1e-3 --logging_steps 1"
FLAGS += " --num_train_epochs 1 --save_strategy no"


def read_adapter(base: str, adapter: str, folder: str) -> None:
    """What a fresh process says of an adapter's folder: PEFT's own way to load it, and infer.py's."""
    plain = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), adapter).eval()
    ours, _ = load_trained_model(adapter, dtype=torch.float32)
    batch = torch.load(f"{folder}/batch.pt")
    with torch.no_grad():
        torch.save([model(**batch).logits for model in (plain, ours)], f"{folder}/logits.pt")


def flags(model, data, output, *more):
    return ["--model_name_or_path", model, "--data_path", data, "--output_dir", output, *FLAGS.split(), *more]


@pytest.fixture
def adapted(tiny_folder, tmp_path):
    model_args = ModelArguments(tiny_folder, train_type="use_lora", lora_dropout=0.0)
    model = load_model(model_args, TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    freeze(model, "use_lora")
    return model


def test_adapters_stand_in_the_language_model_alone(adapted):
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    projector = [name for name in trained if ".multi_modal_projector.modules_to_save.default." in name]
    others = [name for name in trained if name not in projector]
    assert len(projector) == 4
    assert len(others) == 2 * 7 * 3 and all(".language_model.layers." in name for name in others)
    assert not any("lora" in name for name, _ in adapted.named_parameters() if "vision_tower" in name)
    messages = lora.describe_adapters(adapted, ModelArguments(train_type="use_lora", lora_dropout=0.0))
    assert len(messages) == 1 and messages[0].startswith("adapters on 21 of 21 linear layers: q_proj x3, ")


def test_under_zero3_no_layer_of_the_tower_is_a_target(tiny_folder, monkeypatch):
    bare = model_module.LlavaForConditionalGeneration.from_pretrained(tiny_folder)
    expected = find_targets(bare, ["all-linear"])
    monkeypatch.setattr(lora, "is_deepspeed_zero3_enabled", lambda: True)
    assert find_targets(bare, ["all-linear"]) == expected and len(expected[0]) == 21
    with pytest.raises(UserError, match="dense: no such module|linear_1: no such module"):
        find_targets(bare, ["linear_1"])


def test_an_adapter_comes_back_in_a_fresh_process(tiny_folder, data_file, tmp_path, monkeypatch):
    import train

    trainers = []
    build = train.build_trainer
    monkeypatch.setattr(train, "build_trainer", lambda *args: trainers.append(build(*args)) or trainers[0])
    more = ["--feature_cache_gb", "0", "--validation_split", "0", "--per_device_train_batch_size", "8"]
    train_here(monkeypatch, *flags(tiny_folder, data_file, tmp_path / "one", *more))
    trainer, _ = trainers[0]
    assert losses(tmp_path / "one")[-1] < losses(tmp_path / "one")[0] - 0.1
    saved = load_file(tmp_path / "one" / "adapter_model.safetensors")
    base = load_file(f"{tiny_folder}/model.safetensors")
    for name, weight in saved.items():
        if "projector" in name:
            assert not torch.equal(weight, base[name.removeprefix("base_model.model.").removeprefix("model.")])
        else:
            assert weight.abs().max() > 0
    batch = trainer.data_collator(list(trainer.train_dataset.select(range(4)).select_columns(trainer.batch_columns)))
    del batch["labels"]
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
    torch.save(dict(batch), tmp_path / "batch.pt")
    reader = server.Process(target=read_adapter, args=(tiny_folder, str(tmp_path / "one"), str(tmp_path)))
    reader.start()
    reader.join()
    for logits in torch.load(tmp_path / "logits.pt"):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    two = ["--validation_split", "0", "--per_device_train_batch_size", "4", "--deepspeed", "ds_zero3_no_offload.json"]
    run_train(*flags(tiny_folder, data_file, tmp_path / "z3", *two), processes=2)
    found = load_file(tmp_path / "z3" / "adapter_model.safetensors")
    torch.testing.assert_close(found, saved, rtol=1e-2, atol=1e-3)
    assert losses(tmp_path / "z3") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
