"""The command line, the first screen, packed rows beside padded ones, and what the pictures are worth."""

import dataclasses
import json
import os

import pytest
import torch
from datasets import Dataset
from ranks import losses, train_here
from transformers import LlavaForConditionalGeneration

import arguments
import train
from collator import LlavaCollator
from data import load_encoded
from fast_path import FastPath
from llava_trainer import LlavaTrainer, OneMark, exchange_pictures
from model import freeze
from pixels import Pixels, count_image_tokens
from report import show_labels
from rows import UserError


def make_trainer(folder, processor, rows, tmp_path, train_type="none"):
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    freeze(model, train_type)
    args = arguments.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, eval_strategy="no", eval_on_start=False)
    image_tokens = count_image_tokens(processor)
    collator = LlavaCollator(Pixels(processor.image_processor), processor.image_token_id, image_tokens, True)
    return LlavaTrainer(model=model, args=args, train_dataset=rows, data_collator=collator)


def test_pictures_are_decoded_by_workers_beside_a_gpu(monkeypatch):
    def workers(**flags) -> int:
        return arguments.TrainingArguments(output_dir="x", **flags).dataloader_num_workers

    assert workers() == 0 and workers(dataloader_num_workers=3) == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(arguments.transformers.TrainingArguments, "__post_init__", lambda self: None)
    monkeypatch.setattr(arguments.TrainingArguments, "_n_gpu", 1, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert workers() == 6 and workers(use_cpu=True) == 0 and workers(dataloader_num_workers=3) == 3


def gradients_of(trainer, rows) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    batch = trainer.data_collator(list(rows.select_columns(trainer.batch_columns)))
    loss = trainer.summed_loss(trainer.model, batch) / (batch["labels"] != -100).sum()
    loss.backward()
    weights = trainer.model.named_parameters()
    return loss.item(), {name: weight.grad.clone() for name, weight in weights if weight.grad is not None}


def test_packed_rows_have_the_loss_and_the_gradients_of_padded_ones(tiny_folder, processor, data_file, tmp_path):
    rows, _ = load_encoded(data_file, processor, 2048)
    trainer, some = make_trainer(tiny_folder, processor, rows, tmp_path), rows.select(range(8))
    calls = []
    tower = trainer.model.model.vision_tower
    tower.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    loss, gradients = gradients_of(trainer, some)
    assert calls == [8]  # one call a step: of eight rows four have one picture, two have two, two have none
    own = trainer.model.config.text_config._attn_implementation, trainer.model.config.vision_config._attn_implementation
    path = FastPath(trainer)
    assert path.choose_ways() == [] and path.padding_free and path.head_is_chunked and path.last_mlp is not None
    assert trainer.model.config.text_config._attn_implementation == "packed_sdpa"
    assert trainer.model.config.vision_config._attn_implementation == own[1]
    packed_loss, packed = gradients_of(trainer, some)
    assert packed_loss == pytest.approx(loss, abs=1e-6) and packed.keys() == gradients.keys()
    torch.testing.assert_close(packed, gradients, rtol=1e-3, atol=1e-6)
    path.undo.close()  # and generation has the model's own attention again
    config = trainer.model.config
    assert (config.text_config._attn_implementation, config.vision_config._attn_implementation) == own
    prompt = trainer.data_collator(list(rows.select([0])))
    del prompt["labels"]
    trainer.model.eval().generate(**prompt, max_new_tokens=2)


def test_short_examples_never_cut_a_picture(tiny_folder, processor, data_file, tmp_path):
    rows, _ = load_encoded(data_file, processor, 2048)
    trainer = make_trainer(tiny_folder, processor, rows, tmp_path)
    for row in rows.select(range(4)):
        for tokens in (1, 4, 32, 10000):
            short = trainer.shorten(row, tokens)
            count = short["input_ids"].count(processor.image_token_id)
            assert count == 16 * len(short["images"]) == 16 * len(short["image_ids"])
            assert len(short["input_ids"]) - count == min(tokens, row["length"] - 16 * len(row["images"]))
            trainer.data_collator([short])


def test_exchanged_rows_never_keep_a_picture_of_their_own_nor_an_equal_one(processor, data_file):
    rows, _ = load_encoded(data_file, processor, 2048)
    with_pictures, exchanged, others = exchange_pictures(rows)
    assert len(with_pictures) == len(exchanged) == 19 and len(others) == 6
    assert exchange_pictures(rows)[1].to_dict() == exchanged.to_dict()
    for own, new in zip(with_pictures, exchanged, strict=True):
        assert not set(own["image_ids"]) & set(new["image_ids"]) and len(own["images"]) == len(new["images"])
        assert {image["path"] for image in own["images"]}.isdisjoint(image["path"] for image in new["images"])
        assert own["input_ids"] == new["input_ids"] and own["labels"] == new["labels"]
    image = {"path": "a.png", "offset": 0, "size": -1, "coding": ""}
    same = Dataset.from_list([{"image_ids": [1], "images": [image], "length": 3}] * 3)  # one picture in all rows
    with_pictures, exchanged, others = exchange_pictures(same)
    assert not len(with_pictures) and len(others) == 3


def test_the_screen_and_the_report(tiny_folder, data_file, eval_file, tmp_path, monkeypatch, capsys):
    paths = ["--model_name_or_path", tiny_folder, "--data_path", data_file, "--eval_data_path", eval_file]
    more = "--num_train_epochs 1 --image_aspect_ratio crop --packing true --model_max_length 256 --learning_rate 1e-3"
    train_here(monkeypatch, *paths, "--output_dir", tmp_path, *more.split())
    screen = capsys.readouterr().out
    for line in (
        "note        25 pictures; 6 examples have none",
        "note        vision tower ",
        "first example, what is learned between ⟦ and ⟧:\n<|user|><image>",
        "pictures (0.0001",
    ):
        assert line in screen
    assert "logits of whole batches" not in screen and "padded batches:" not in screen
    results = json.loads((tmp_path / "train_results.json").read_text())
    assert results["eval_loss_after"] < results["eval_loss_before"]
    history = {key: losses(tmp_path, f"eval_{key}") for key in ("loss", "loss_exchanged", "image_worth")}
    assert results["eval_image_worth_after"] == history["image_worth"][-1] != 0
    assert results["eval_loss_exchanged_after"] == history["loss_exchanged"][-1] != history["loss"][-1]
    saved = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
    assert saved["do_center_crop"] is True and saved["do_pad"] is False


def test_a_picture_is_shown_as_one_mark(processor):
    ids = [processor.image_token_id] * 32 + processor.tokenizer.encode("天地", add_special_tokens=False)
    assert show_labels(OneMark(processor), ids, [-100] * 33 + ids[33:]) == "<image><image>天⟦地⟧"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--train_type", "lora"], "--train_type lora: give one of use_lora, none, freeze_vision, projector"),
        (["--image_aspect_ratio", "fit"], "--image_aspect_ratio fit: give one of pad, crop, squash"),
        (["--use_lora", "true", "--train_type", "none"], "--use_lora true contradicts --train_type none"),
        (["--lora_r", "4"], "--lora_r has no effect without --train_type use_lora"),
        (["--vision_learning_rate", "1e-5"], "--vision_learning_rate has no effect without --train_type none"),
        (
            ["--train_type", "none", "--feature_cache_gb", "5"],
            "--feature_cache_gb has no effect with --train_type none",
        ),
        (["--warmup_ratio", "0.1"], "--warmup_ratio: is now --warmup_steps"),
    ],
)
def test_flags_that_cannot_work_are_named(flags, reason, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=reason):
        train_here(monkeypatch, "--output_dir", tmp_path, *flags)


def test_use_lora_is_a_train_type(monkeypatch):
    for flags in (["--use_lora", "true"], ["--train_type", "use_lora"]):
        monkeypatch.setattr("sys.argv", ["train.py", "--use_cpu", "true", *flags])
        model_args, *_ = train.parse_arguments()
        assert model_args.use_lora and model_args.train_type == "use_lora"


def test_every_flag_of_transformers_is_decided_upon():
    fields = {field.name for field in dataclasses.fields(arguments.TrainingArguments)}
    decided = [*arguments.DECIDES_THE_NUMBERS, *arguments.FREE, *arguments.NOT_TAKEN]
    assert sorted(decided) == sorted(fields)
