"""The command line: the default, shortened; frozen encoders; what can't be trained, and what is said of it."""

import json
import math
from pathlib import Path

import pytest
import torch
from made_pairs import write_table
from ranks import losses, read_history, run_train, train_here
from safetensors.torch import load_file

import arguments
import train
from rows import UserError
from trainer import MAX_LOGIT_SCALE

ONE_STEP = ["--max_steps", "1", "--save_strategy", "no"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of its own, for what would be kept from an earlier test."""
    import features

    monkeypatch.setattr(features, "CACHE_DIR", tmp_path)
    return tmp_path


def test_the_report_of_a_run(levit_folder, paths, tmp_path, monkeypatch, capsys):
    more = ["--num_train_epochs", "12", "--per_device_train_batch_size", "8", "--load_best_model_at_end", "true"]
    more += ["--early_stopping_patience", "12", "--vision_learning_rate", "3e-3"]
    train_here(monkeypatch, *paths(tmp_path, levit_folder), *more)
    screen = capsys.readouterr().out
    assert "first pair  images/0.png  ⟦" in screen and "captions that an earlier pair has, too" in screen
    assert "to validate on: held_out 12" in screen and "rate        0.001, vision encoder 0.003" in screen
    assert "logit_bias                    1 parameters,            0 trained" in screen
    results = json.loads((tmp_path / "train_results.json").read_text())
    recalls = losses(tmp_path, "eval_mean_recall")
    assert results["before"]["eval_mean_recall"] == recalls[0] and len(recalls) == 13
    assert results["after"]["eval_mean_recall"] == results["mean_recall_best"] == max(recalls[1:]) > recalls[0]
    assert {"eval_held_out/i2t_r1", "eval_held_out/choices_place", "eval_held_out/mean_cosine"} < set(results["after"])
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] / 2
    last = [entry for entry in read_history(tmp_path) if "loss" in entry][-1]
    assert (last["accuracy_i2t"], last["same_caption_pairs"], last["loss"]) == (1, 0, 0)  # a single pair
    assert 0 < sum(losses(tmp_path, "same_caption_pairs")[:4]) < 8 and results["logit_scale"] == last["logit_scale"]
    best = Path(results["best_checkpoint"])
    assert (best / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    for folder in (best, tmp_path):
        assert (folder / "preprocessor_config.json").exists() and (folder / "tokenizer.json").exists()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_trained_folder_is_what_infer_and_a_further_run_read(levit_folder, paths, tmp_path, monkeypatch):
    from infer import load_trained_model

    train_here(monkeypatch, *paths(tmp_path / "a", levit_folder), *ONE_STEP)
    model, tokenizer, processor = load_trained_model(str(tmp_path / "a"))
    assert tokenizer.model_max_length == 64 and processor.backend == "pil" and not model.training
    weights = load_file(tmp_path / "a" / "model.safetensors")
    assert all(torch.equal(weight.cpu(), weights[name]) for name, weight in model.state_dict().items())
    train_here(monkeypatch, *paths(tmp_path / "b", str(tmp_path / "a")), *ONE_STEP, "--cross_embedding", "sigmoid")
    assert load_file(tmp_path / "b" / "model.safetensors")["logit_bias"].item() == pytest.approx(-math.log(7), abs=2e-3)


def test_two_encoders_of_two_folders_are_joined(tiny_folder, data_file, eval_file, tmp_path, monkeypatch, capsys):
    from model import load_model, load_processors

    whole = load_model(tiny_folder)
    for part, processor in zip(("text", "vision"), load_processors(tiny_folder), strict=True):
        getattr(whole, f"{part}_model").save_pretrained(tmp_path / part)
        processor.save_pretrained(tmp_path / part)
    flags = ["--text_model_name_or_path", tmp_path / "text", "--image_model_name_or_path", tmp_path / "vision"]
    flags += ["--data_path", data_file, "--eval_data_path", eval_file, "--output_dir", tmp_path / "out", *ONE_STEP]
    flags += ["--text_pooling", "mean", "--projection_dim", "24", "--cross_embedding", "sigmoid", "--freeze", "vision"]
    train_here(monkeypatch, *flags)
    assert f"model       {tmp_path}/vision + {tmp_path}/text" in capsys.readouterr().out
    model = load_model(str(tmp_path / "out"))
    assert (model.config.vision_pooling, model.config.text_pooling) == ("cls", "mean")
    assert model.text_projection.weight.shape == model.visual_projection.weight.shape == (24, 128)
    weights = model.vision_model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in whole.vision_model.state_dict().items())
    assert model.logit_bias.item() == pytest.approx(-math.log(7), abs=1e-3)


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_kept_features_of_a_frozen_encoder_change_nothing(tower, paths, cache, tmp_path, monkeypatch, capsys):
    more = ["--freeze", tower, "--num_train_epochs", "1", "--save_strategy", "no"]
    train_here(monkeypatch, *paths(tmp_path / "kept"), *more)
    assert f"features of the frozen {tower} encoder: " in capsys.readouterr().out
    [file] = cache.glob("features-*.npy")
    written = file.stat().st_mtime_ns
    run_two = [*paths(tmp_path / "two"), *more, "--per_device_train_batch_size", "4"]
    train_here(monkeypatch, *paths(tmp_path / "again"), *more)
    assert file.stat().st_mtime_ns == written
    with monkeypatch.context() as patch:
        patch.setattr(train, "prepare_features", lambda *args: ({}, []))
        train_here(patch, *paths(tmp_path / "anew"), *more)
    if tower == "vision":
        run_train(*run_two, processes=2)
    expected = losses(tmp_path / "anew")
    for output in ("kept", "again", *(["two"] if tower == "vision" else [])):
        assert losses(tmp_path / output) == pytest.approx(expected, abs=1e-5)
    before, after = load_file(f"{paths('')[1]}/model.safetensors"), load_file(tmp_path / "kept" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith(f"{tower}_model."))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_temperature_ends_at_100_and_decays_never(tiny_folder, paths, tmp_path, monkeypatch):
    import trainer

    groups = []
    create = trainer.CLIPTrainer.create_optimizer
    monkeypatch.setattr(
        trainer.CLIPTrainer, "create_optimizer", lambda self: groups.append((self, create(self))) or groups[-1][1]
    )
    load = train.load_any_model

    def hot(*args):
        model = load(*args)
        model.logit_scale.data.fill_(5.0)
        return model

    monkeypatch.setattr(train, "load_any_model", hot)
    more = [
        "--max_steps",
        "2",
        "--lr_scheduler_type",
        "constant",
        "--text_learning_rate",
        "1e-4",
        "--weight_decay",
        "0.3",
    ]
    train_here(monkeypatch, *paths(tmp_path), *more)
    first, second = losses(tmp_path, "logit_scale")
    assert first == pytest.approx(100) and second <= 100 + 1e-4
    assert load_file(tmp_path / "model.safetensors")["logit_scale"] <= MAX_LOGIT_SCALE + 1e-6
    [(clip_trainer, optimizer)] = groups[:1]
    names = {id(parameter): name for name, parameter in clip_trainer.model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["initial_lr"] == (1e-4 if name.startswith("text_model.") else 1e-3)
            assert group["weight_decay"] == (0.3 if parameter.ndim > 1 and "norm" not in name else 0.0), name


def test_a_tower_that_gives_no_numbers_is_named_with_the_rows_of_the_batch(paths, tmp_path, monkeypatch):
    load = train.load_any_model

    def broken(*args):
        model = load(*args)
        model.text_model.encoder.layer[0].output.dense.weight.data[0, 0] = torch.nan
        return model

    monkeypatch.setattr(train, "load_any_model", broken)
    with pytest.raises(
        FloatingPointError, match=r"step 1: the output of the text encoder is .*train\.jsonl:\d+, .*\.\.\."
    ):
        train_here(monkeypatch, *paths(tmp_path), "--per_device_train_batch_size", "16", "--eval_on_start", "false")


def test_bad_images_and_captions_are_named_or_counted(tiny_folder, tmp_path, monkeypatch, capsys):
    from conftest import draw_pairs

    rows = draw_pairs(tmp_path / "images", 9)
    (tmp_path / "images" / "3.png").write_bytes((tmp_path / "images" / "3.png").read_bytes()[:900])
    rows[5]["image"], rows[7]["text"], rows[8]["text"] = "images/none.png", "  ", "红" * 5000
    data = write_table(tmp_path / "train.jsonl", rows)
    flags = ["--model_name_or_path", tiny_folder, "--data_path", data, "--validation_split", "0", *ONE_STEP]
    with pytest.raises(UserError, match="3 of 9 rows can't be trained on") as raised:
        train_here(monkeypatch, *flags, "--output_dir", tmp_path / "out")
    for place, reason in ((4, "truncated"), (6, "there is no image"), (8, "is empty")):
        assert any(f"train.jsonl:{place}" in line and reason in line for line in str(raised.value).splitlines())
    capsys.readouterr()
    train_here(monkeypatch, *flags, "--output_dir", tmp_path / "skipped", "--skip_bad_rows", "true")
    screen = capsys.readouterr().out
    assert "note        3: bad rows skipped (bad_rows.jsonl)" in screen
    assert "note        1: captions cut to 64 tokens" in screen
    assert len((tmp_path / "skipped" / "bad_rows.jsonl").read_text().splitlines()) == 3
    assert "before" not in json.loads((tmp_path / "skipped" / "train_results.json").read_text())


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--lerning_rate", "1"], "--lerning_rate: no such flag"),
        (["--context_length", "52"], "--context_length: is now --max_seq_length"),
        (["--freeze_vision", "true"], "--freeze_vision: is now --freeze vision"),
        (["--evaluation_strategy", "no"], "--evaluation_strategy: is now --eval_strategy"),
        (
            ["--cross_embedding", "gather-nn"],
            "--cross_embedding gather-nn: there is no such choice; known are base, gather",
        ),
        (["--same_caption", "no"], "--same_caption no: there is no such choice; known are mask, positive, ignore"),
        (["--text_model_name_or_path", "bert"], "--image_model_name_or_path is missing"),
        (["--text_pooling", "mean"], "--text_pooling has no effect with --model_name_or_path"),
        (["--unlocked_layers", "2"], "--unlocked_layers has no effect without --freeze"),
        (["--freeze", "text", "--text_learning_rate", "1"], "--text_learning_rate has no effect with --freeze text"),
        (["--loss_block_size", "8", "--cross_embedding", "local"], "--loss_block_size has no effect with --cross_emb"),
        (["--gradcache_chunk_size", "2", "--gradient_accumulation_steps", "2"], "no effect beside --gradient_acc"),
        (["--gradcache_chunk_size", "8"], "--gradcache_chunk_size 8 has no effect: the batch of a process is 8"),
        (["--gradcache_chunk_size", "2", "--deepspeed", "ds_zero2_no_offload.json"], "can't be had with --deepspeed"),
        (["--validation_split", "0.1"], "--validation_split has no effect with --eval_data_path"),
        (["--data_size", "0"], "--data_size 0: 1 or more"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor is not taken: the loss is contrastive"),
        (["--dataloader_drop_last", "true"], "--dataloader_drop_last is not taken: every pair is trained on"),
        (["--fsdp", "true"], "--fsdp is not taken"),
        (["--max_steps", "0"], "--max_steps 0: nothing would be trained"),
        (["--max_steps", "1", "--warmup_steps", "1"], "--warmup_steps 1: the run has a single step"),
        (["--max_seq_length", "65"], "--max_seq_length 65: from 3 to the 64 positions"),
        (["--per_device_train_batch_size", "1"], "a pair alone has no negatives"),
        (["--fp16", "true"], "--fp16 true: needs a GPU"),
        (
            ["--metric_for_best_model", "loss"],
            "no such metric; give mean_recall, or one of a gallery, such as held_out/",
        ),
    ],
)
def test_flags_that_cannot_work_are_named(flags, reason, paths, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=reason):
        train_here(monkeypatch, *paths(tmp_path), *flags)


def test_each_flag_of_transformers_has_a_meaning_here():
    own = set(arguments.TrainingArguments.__dataclass_fields__)
    known = [*arguments.DECIDES_THE_NUMBERS, *arguments.FREE, *arguments.NOT_TAKEN]
    assert sorted(known) == sorted(own) and len(known) == len(set(known))


def test_several_runs_in_one_picture(paths, tmp_path, monkeypatch, capsys):
    import compare

    for mode in ("base", "tiled"):
        train_here(monkeypatch, *paths(tmp_path / mode), *ONE_STEP, "--cross_embedding", mode)
    capsys.readouterr()
    compare.main([str(tmp_path / "base"), str(tmp_path / "tiled")])
    screen = capsys.readouterr().out
    assert [line.split()[0] for line in screen.splitlines()[:3]] == ["run", "base", "tiled"]
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "base").rename(tmp_path / "tiled" / "tiled")
    compare.main([str(tmp_path / "tiled"), str(tmp_path / "tiled/tiled")])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == [
        str(tmp_path / "tiled"),
        str(tmp_path / "tiled/tiled"),
    ]
    with pytest.raises(SystemExit, match="holds no finished run"):
        compare.main([str(tmp_path)])
