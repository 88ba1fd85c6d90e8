"""train.py as it is started: it learns, names the classes, refuses what it can't do, and takes other encoders."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from ranks import RECIPE, losses, run_train, start_script, train_here
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    ElectraConfig,
    ErnieConfig,
    MegatronBertConfig,
    ModernBertConfig,
    RobertaConfig,
    RoCBertConfig,
)

from conftest import TELLING, make_reviews, save_model, write_table
from rows import UserError


def run_script(name: str, output, *flags, **variables) -> str:
    """What a launch script prints, by the real torchrun in as many processes as the script starts on a CPU."""
    process = start_script(name, output, *flags, **variables)
    printed, _ = process.communicate(timeout=180)
    assert process.returncode == 0, printed[-5000:]
    return printed


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The embedded default on 300 reviews of three classes by train_zero2.sh: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("learned")
    rows = make_reviews(300, labels=tuple(TELLING))
    rows[30] = (rows[30][0], "差评")  # a wrong label, which stays; the rows below leave
    rows += [rows[5], (rows[6][0], "中评" if rows[6][1] != "中评" else "好评"), ("", "好评")]
    table = write_table(folder / "table.csv", rows)
    flags = "--num_train_epochs 8 --learning_rate 2e-3 --per_device_train_batch_size 8"
    return folder / "out", run_script("train_zero2.sh", folder / "out", *flags.split(), DATA=table)


def test_it_learns_and_reports(learned):
    output, _ = learned
    results = json.loads((output / "train_results.json").read_text())
    assert (
        results["test_accuracy"] > 0.9
        and results["test_accuracy_of_baseline"] > 0.9
        and results["validation_loss"] < results["validation_loss_before"]
    )
    history = losses(output)
    assert history[-1] < 0.8 * history[0]
    assert {"loss.png", "confusion.png", "per_class.csv", "removed.csv", "model.safetensors"} <= {
        path.name for path in output.iterdir()
    }
    assert all((output / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "confusion.png"))
    table = pd.read_csv(output / "per_class.csv", index_col=0)
    assert set(table.index) == set(TELLING) and table.support.sum() == 30
    assert table.f1.is_monotonic_increasing


def test_the_run_summary_names_rows_classes_and_what_was_removed(learned):
    output, summary = learned
    assert re.search(r"rows +239 train, 30 validation, 30 test", summary)
    assert re.search(r"classes +\S评 \d+, \S评 \d+, \S评 \d+\n", summary)
    assert re.search(r"removed 1: a copy \(.*table.csv:302\)", summary)
    assert re.search(r"removed 2: in several classes \(.*table.csv:8, .*table.csv:303\)", summary)
    assert re.search(r"removed 1: empty text \(.*table.csv:304\)", summary)
    assert re.search(r"first row +\S评: \[CLS\] .+ \[SEP\]", summary)
    removed = pd.read_csv(output / "removed.csv")
    assert len(removed) == 4 and removed.reason.str.contains("a copy: of .*table.csv:7").any()


def test_classes_are_saved_in_the_model(learned):
    config = AutoConfig.from_pretrained(learned[0])
    assert config.id2label == {0: "中评", 1: "好评", 2: "差评"}
    assert config.label2id == {"中评": 0, "好评": 1, "差评": 2}


def test_suspicious_rows_are_wrong_with_certainty(learned):
    rows = pd.read_csv(learned[0] / "suspicious_rows.csv")
    assert len(rows) <= 50 and (rows.label != rows.predicted).all()
    assert rows.probability.is_monotonic_decreasing


def test_lora_saves_an_adapter_that_serves(encoder_folder, data_file, eval_file, tmp_path, monkeypatch):
    from safetensors.torch import load_file
    from transformers import pipeline

    from export import export
    from infer import load_trained_model, predict_probabilities

    paths = ["--model_name_or_path", encoder_folder, "--data_path", data_file, "--eval_data_path", eval_file]
    flags = "--use_lora true --learning_rate 1e-2 --num_train_epochs 3 --per_device_train_batch_size 4"
    train_here(monkeypatch, *paths, "--output_dir", tmp_path, *flags.split())
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all("lora_" in name or "classifier" in name for name in saved)
    assert max(weight.abs().max() for name, weight in saved.items() if "lora_B" in name) > 0
    model, tokenizer = load_trained_model(str(tmp_path))
    texts = [text for text, _ in make_reviews(6, seed=9)]
    probabilities, _ = predict_probabilities(model, tokenizer, texts)
    assert export(str(tmp_path), str(tmp_path / "merged")) < 1e-5
    served = pipeline("text-classification", str(tmp_path / "merged"))(texts, top_k=None)
    for row, answer in zip(probabilities, served, strict=True):
        scores = {item["label"]: item["score"] for item in answer}
        assert [scores["好评"], scores["差评"]] == pytest.approx(row.tolist(), abs=1e-5)


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "config",
    [
        RobertaConfig(**SMALL, max_position_embeddings=34, pad_token_id=1),
        ModernBertConfig(**SMALL, pad_token_id=0),
        ErnieConfig(**SMALL),
        ElectraConfig(**SMALL, embedding_size=16),
        MegatronBertConfig(**SMALL),
        RoCBertConfig(**SMALL, shape_embed_dim=8, pronunciation_embed_dim=8),
    ],
    ids=lambda config: config.model_type,
)
def test_other_encoders_train_too(config, tokenizer, tmp_path, monkeypatch, capsys):
    config.vocab_size = len(tokenizer)
    model = save_model(config, tokenizer, tmp_path / "model", has_head=False)
    table = write_table(tmp_path / "table.csv", make_reviews(40))
    flags = "--num_train_epochs 4 --learning_rate 3e-3 --per_device_train_batch_size 8 --logging_steps 4"
    train_here(
        monkeypatch, "--model_name_or_path", model, "--data_path", table, "--output_dir", tmp_path, *flags.split()
    )
    history = losses(tmp_path)
    assert min(history[1:]) < history[0]
    if config.model_type == "roberta":  # its first two positions are not for tokens
        assert "the model has positions for 32 tokens" in capsys.readouterr().out


def load_for(folder: str, id2label: dict[int, str], use_lora: bool = False, **precision):
    """The model as train.py loads it."""
    from model import load_model
    from train import ModelArguments

    args = SimpleNamespace(**{"bf16": False, "fp16": False, "deepspeed": None} | precision)
    return load_model(ModelArguments(model_name_or_path=folder, use_lora=use_lora), args, id2label)


def test_a_head_is_kept_for_its_own_classes_alone(classifier_folder):
    def weight(id2label):
        model = load_for(classifier_folder, id2label)
        return model.classifier.weight, model.config.id2label

    own, names = weight({0: "好评", 1: "差评"})
    turned, turned_names = weight({0: "差评", 1: "好评"})
    assert torch.equal(own, turned) and names == turned_names == {0: "好评", 1: "差评"}
    other, other_names = weight({0: "负面", 1: "正面"})
    assert not torch.equal(own, other) and other_names == {0: "负面", 1: "正面"}


@pytest.mark.parametrize("labels", [("负面", "正面"), ("负面", "正面", "其他"), tuple(map(str, range(300)))], ids=len)
@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "xlnet", "gpt2"])
def test_nothing_of_other_classes_is_left(family, labels, tokenizer, tmp_path):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": len(tokenizer)}
    small |= {"bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    own = {"gpt2": {}, "xlnet": {"d_inner": 64, "d_head": 8}}.get(family, {"intermediate_size": 64})
    config = AutoConfig.for_model(family, **small, **own)
    config.id2label = {0: "好评", 1: "差评"}
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1e6)
    model.save_pretrained(tmp_path)
    loaded = load_for(str(tmp_path), dict(enumerate(labels)))
    new = {name: weight for name, weight in loaded.named_parameters() if weight.abs().max() < 1}
    assert new and {weight.shape[0] for weight in new.values()} == {len(labels)}
    assert all(
        weight.shape == dict(model.named_parameters())[name].shape
        for name, weight in loaded.named_parameters()
        if name not in new
    )
    assert loaded.config.id2label == dict(enumerate(labels))


@pytest.mark.parametrize("order", [("0", "1"), ("1", "0")])
def test_classes_are_those_of_the_ids_whatever_else_the_file_says(order, telling_folder, tmp_path, monkeypatch):
    """The head of a model whose `id2label` was edited is kept, and each class is counted under its own name."""
    model = shutil.copytree(telling_folder, tmp_path / "edited")
    config = json.loads((model / "config.json").read_text("utf-8"))
    config["id2label"] = {number: {"0": "赞", "1": "贬"}[number] for number in order}
    (model / "config.json").write_text(json.dumps(config))
    rows = [(text, {"好评": "赞", "差评": "贬"}[name]) for text, name in make_reviews(60, seed=5)]
    table = write_table(
        tmp_path / "table.csv", [row for number, row in enumerate(rows) if number % 4 != 3]
    )  # 30 and 15
    paths = ["--model_name_or_path", model, "--data_path", table, "--output_dir", tmp_path / "out"]
    train_here(monkeypatch, *paths, "--max_steps", "1", "--learning_rate", "1e-6")
    assert json.loads((tmp_path / "out" / "train_results.json").read_text())["test_accuracy"] > 0.7
    assert AutoConfig.from_pretrained(tmp_path / "out").label2id == {"赞": 0, "贬": 1}
    support = pd.read_csv(tmp_path / "out" / "per_class.csv", index_col=0).support
    assert support.to_dict() == {"赞": 3, "贬": 2}


def test_an_adapter_is_not_trained_further_as_it_is(classifier_folder, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is a LoRA adapter. Merge it first"):
        load_for(str(tmp_path), {0: "好评", 1: "差评"})


def test_a_picture_that_would_grow_with_the_square_of_the_classes_is_left_out(
    encoder_folder, tmp_path, monkeypatch, capsys
):
    import report

    monkeypatch.setattr(report, "MAX_PICTURED", 2)
    monkeypatch.setattr(report, "MAX_BASELINE", 0)
    table = write_table(tmp_path / "table.csv", make_reviews(60, labels=tuple(TELLING)))
    test = write_table(tmp_path / "test.csv", make_reviews(9, seed=3))
    paths = ["--model_name_or_path", encoder_folder, "--data_path", table, "--test_data_path", test]
    train_here(monkeypatch, *paths, "--output_dir", tmp_path, "--max_steps", "1", "--validation_split", "0")
    assert not (tmp_path / "confusion.png").exists() and (tmp_path / "per_class.csv").exists()
    assert "test_accuracy_of_baseline" not in json.loads((tmp_path / "train_results.json").read_text())
    assert pd.read_csv(tmp_path / "per_class.csv")["class"].tolist()[2] == "中评"
    assert "classes without a test row, which macro-F1 leaves out: 中评\n" in capsys.readouterr().out


def test_lora_trains_its_head_in_full_precision(encoder_folder):
    model = load_for(encoder_folder, {0: "a", 1: "b"}, use_lora=True, bf16=True)
    trained = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("classifier" in name for name in trained) and set(trained.values()) == {torch.float32}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32, torch.bfloat16}


def test_lora_under_zero3_draws_a_new_head_and_saves_a_complete_adapter(classifier_folder, tmp_path):
    from safetensors.torch import load_file

    table = write_table(
        tmp_path / "table.csv", [(text, {"好评": "正面"}.get(name, "负面")) for text, name in make_reviews(25)]
    )
    flags = "--use_lora true --learning_rate 1e-2 --per_device_train_batch_size 4 --num_train_epochs 2"
    run_script("train_zero3.sh", tmp_path, *flags.split(), MODEL=classifier_folder, DATA=table)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(weight.numel() for weight in saved.values())
    assert max(weight.abs().max() for name, weight in saved.items() if "lora_B" in name) > 0
    assert json.loads((tmp_path / "train_results.json").read_text())["test_loss"] < 1


def test_lora_saves_what_the_checkpoint_did_not_have(bert_config, tokenizer, data_file, tmp_path, monkeypatch):
    """A masked-LM has no pooler: one that stayed as it was drawn would be another one at each load."""
    import trainer
    from infer import load_trained_model, predict_probabilities

    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(bert_config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    predicted = []
    predict_logits = trainer.ClassificationTrainer.predict_logits
    monkeypatch.setattr(
        trainer.ClassificationTrainer,
        "predict_logits",
        lambda self, dataset: predicted.append(predict_logits(self, dataset)) or predicted[-1],
    )
    test = write_table(tmp_path / "test.csv", make_reviews(12, seed=4))
    run = ["--model_name_or_path", tmp_path / "base", "--data_path", data_file, "--test_data_path", test]
    train_here(monkeypatch, *run, "--output_dir", tmp_path / "out", "--use_lora", "true", "--learning_rate", "1e-2")
    expected = torch.from_numpy(predicted[-1]).softmax(1).numpy()
    loaded, _ = predict_probabilities(
        *load_trained_model(str(tmp_path / "out")), [text for text, _ in make_reviews(12, seed=4)]
    )
    assert loaded == pytest.approx(expected, abs=1e-5)


def test_a_model_of_other_classes_gets_a_new_head(classifier_folder, tmp_path, monkeypatch):
    rows = make_reviews(60, labels=tuple(TELLING))
    table = write_table(tmp_path / "table.csv", rows)
    paths = ["--model_name_or_path", classifier_folder, "--data_path", table, "--output_dir", tmp_path]
    train_here(monkeypatch, *paths, "--max_steps", "2", "--logging_steps", "1")
    assert AutoConfig.from_pretrained(tmp_path).num_labels == 3 and max(losses(tmp_path)) < 2


def test_numbers_as_labels_and_other_columns(encoder_folder, tmp_path):
    rows = [(text, {"好评": "10", "差评": "2.0"}[label]) for text, label in make_reviews(40)]
    table = write_table(tmp_path / "table.csv", rows, header=("评论", "星级"))
    Path(table).write_bytes(Path(table).read_text("utf-8").encode("gb18030"))
    flags = ["--max_steps", "2", "--text_column", "评论", "--label_column", "星级"]
    run_script("train.sh", tmp_path, *flags, MODEL=encoder_folder, DATA=table)
    assert AutoConfig.from_pretrained(tmp_path).id2label == {0: "2", 1: "10"}


def test_without_validation_and_test_rows(encoder_folder, data_file, tmp_path, monkeypatch):
    paths = ["--model_name_or_path", encoder_folder, "--data_path", data_file, "--output_dir", tmp_path]
    flags = ["--validation_split", "0", "--test_split", "0", "--max_steps", "2"]
    train_here(monkeypatch, *paths, *flags)
    assert "validation_loss" not in json.loads((tmp_path / "train_results.json").read_text())
    with pytest.raises(UserError, match="need validation rows"):
        train_here(monkeypatch, *paths, *flags, "--early_stopping_patience", "1")


def test_a_run_stops_early_and_keeps_its_best_weights(encoder_folder, data_file, eval_file, tmp_path, monkeypatch):
    paths = ["--model_name_or_path", encoder_folder, "--data_path", data_file, "--eval_data_path", eval_file]
    flags = "--learning_rate 3e-2 --num_train_epochs 20 --early_stopping_patience 2 --per_device_train_batch_size 8"
    flags += " --metric_for_best_model loss --load_best_model_at_end true --test_split 0"
    train_here(monkeypatch, *paths, "--output_dir", tmp_path, *flags.split())
    history = losses(tmp_path, "eval_loss")
    assert len(history) < 21 and min(history) < min(history[-2:])
    assert json.loads((tmp_path / "train_results.json").read_text())["validation_loss"] == pytest.approx(min(history))


def test_long_texts_are_cut_and_counted(encoder_folder, data_file, tmp_path, monkeypatch, capsys):
    paths = ["--model_name_or_path", encoder_folder, "--data_path", data_file, "--output_dir", tmp_path]
    train_here(monkeypatch, *paths, "--max_steps", "1", "--model_max_length", "10")
    summary = capsys.readouterr().out
    assert re.search(r"\d+ of the train rows are longer and were cut", summary)
    assert re.search(r"tokens +\d+ an epoch, 10 in the longest row", summary)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 10


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--lora_r 4", "--lora_r has no effect without --use_lora true"),
        ("--validation_split 0.1 --eval_data_path a.csv", "--validation_split has no effect with --eval_data_path"),
        ("--test_split 0.1 --test_data_path a.csv", "--test_split has no effect with --test_data_path"),
        ("--class_weights some", "class_weights.*invalid choice: .some. .choose from .?none.?, .?balanced"),
        ("--early_stopping_patience 2 --eval_strategy no", "has no effect with --eval_strategy no"),
        ("--validation_split 20", "less than 1 together"),
        ("--attn_implementation flash_attention_2", "no model could be read there"),
        ("--metric_for_best_model f1", "invalid choice: .f1. .choose from .?macro_f1.?, .?accuracy.?, .?loss"),
        ("--dataloader_drop_last true", "every row is trained on"),
        ("--no_such_flag 1", "no_such_flag"),
        ("--use_lora true --target_modules nothing", "no such module; the linear ones are .*query"),
        ("--model_name_or_path no/such_folder/here", "no model could be read there"),
    ],
)
def test_what_has_no_effect_or_is_not_there_is_refused(flags, reason, encoder_folder, data_file, tmp_path, monkeypatch):
    run = ["--data_path", data_file, "--output_dir", tmp_path, "--model_name_or_path", encoder_folder]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=reason):
        train_here(monkeypatch, *run, *flags.split())


def test_bad_tables_end_with_one_line(tmp_path):
    table = write_table(tmp_path / "one.csv", [(text, "好评") for text, _ in make_reviews(10)])
    printed = run_train("--data_path", table, "--output_dir", tmp_path / "out", status=1)
    assert "Traceback" not in printed
    assert printed.splitlines()[-1].startswith(f"error: {table}: only the class '好评'")


def test_a_configuration_file_says_the_same(encoder_folder, data_file, tmp_path, monkeypatch):
    import train

    config = {"model_name_or_path": encoder_folder, "data_path": data_file, "output_dir": str(tmp_path / "out")}
    (tmp_path / "config.yaml").write_text(json.dumps(config | {"max_steps": 1, "use_cpu": True}))
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "config.yaml")])
    assert train.parse_arguments()[2].max_steps == 1


@pytest.mark.parametrize("name", ["train.sh", "train_zero2.sh", "train_zero3.sh"])
def test_the_processes_of_a_machine_share_one_batch(name, tmp_path):
    """By a stand-in for python, which counts no GPU and prints what it is to start."""
    (tmp_path / "python").write_text('#!/bin/sh\n[ "$1" = -c ] && echo 0 || echo "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key not in ("MODEL", "DATA", "OUTPUT")}
    environment["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    for processes in (1, 4):
        command = subprocess.run(
            ["bash", RECIPE / name, "--seed", "7"],
            env=environment | {"NPROC": str(processes)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert f"--nproc_per_node {processes} " in command and command.endswith("--seed 7\n")
        assert f"--per_device_train_batch_size {96 // processes} " in command


def test_a_loss_that_is_no_number_stops_the_run(encoder_folder, data_file, tmp_path, monkeypatch):
    paths = ["--model_name_or_path", encoder_folder, "--data_path", data_file, "--output_dir", tmp_path]
    with pytest.raises(UserError, match="a loss of nan, where guessing has 0.69: lower --learning_rate"):
        train_here(monkeypatch, *paths, "--learning_rate", "1e30", "--max_grad_norm", "0", "--logging_steps", "1")


def test_a_loss_far_above_guessing_stops_the_run(classifier_folder, data_file, tmp_path, monkeypatch):
    model = AutoModelForSequenceClassification.from_pretrained(classifier_folder)
    with torch.no_grad():
        model.classifier.weight *= 1e7
    model.save_pretrained(tmp_path / "model")
    shutil.copy(f"{classifier_folder}/tokenizer.json", tmp_path / "model")
    shutil.copy(f"{classifier_folder}/tokenizer_config.json", tmp_path / "model")
    paths = ["--model_name_or_path", tmp_path / "model", "--data_path", data_file, "--output_dir", tmp_path / "out"]
    with pytest.raises(UserError, match=r"a loss of \d.*, where guessing has 0\.69"):
        train_here(monkeypatch, *paths)
