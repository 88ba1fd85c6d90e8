"""From the scripts' default to the loss of each language; ranks, ZeRO's stages and a resumed run change nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import RECIPE, losses, run_train, start_script, train_here
from transformers import AutoTokenizer, FalconConfig, FalconForCausalLM

from conftest import make_conversations, write_rows
from languages import LANGUAGES, detect_language, language_of
from prompt import ALPACA
from report import show_labels
from rows import read_rows
from template import encode_conversation

COMMON = "--learning_rate 1e-3 --lr_scheduler_type constant --logging_steps 1 --num_train_epochs 1"
TURNS = [
    {"role": "system", "content": "天"},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "好"},
    {"role": "user", "content": "再说"},
    {"role": "assistant", "content": " 再见"},
]


def flags(model, data_file, output, *more):
    return ["--model_name_or_path", model, "--data_path", data_file, "--output_dir", output, *COMMON.split(), *more]


def test_answers_and_their_ends_are_learned_in_every_turn(tokenizer):
    (example,) = encode_conversation(TURNS, tokenizer)
    shown = show_labels(tokenizer, example["input_ids"], example["labels"])
    heading, reply = "### Instruction:\n", "\n\n### Response:"
    expected = f"天\n\n{heading}你好{reply}⟦好</s>⟧\n\n{heading}再说{reply}⟦ 再见</s>⟧"
    assert shown.strip() == expected


def test_the_ways_of_training_are_one(tiny_folder, data_file, tmp_path, monkeypatch):
    """Padded in one process; without padding in one, in two ranks, under ZeRO-2 and ZeRO-3, in bins, resumed."""
    apart = ["--validation_split", "0", "--save_strategy", "no"]
    one = ["--per_device_train_batch_size", "8"]
    train_here(monkeypatch, *flags(tiny_folder, data_file, tmp_path / "plain", *apart, *one, "--fast_path", "false"))
    expected = pytest.approx(losses(tmp_path / "plain"), abs=2e-5)
    train_here(monkeypatch, *flags(tiny_folder, data_file, tmp_path / "fast", *apart, *one))
    assert losses(tmp_path / "fast") == expected and losses(tmp_path / "fast")[2] < losses(tmp_path / "fast")[0]
    two = ["--per_device_train_batch_size", "4"]
    for name in ("", "ds_zero2_no_offload.json", "ds_zero3_no_offload.json"):
        more = [*apart, *two, *(["--deepspeed", name] if name else [])]
        output = tmp_path / f"two{name}"
        printed = run_train(*flags(tiny_folder, data_file, output, *more), processes=2)
        assert losses(output) == expected and "padded batches:" not in printed
    printed = run_train(*flags(tiny_folder, data_file, tmp_path / "bins", *apart, *one, "--packing", "true"))
    assert "padded batches:" not in printed and (tmp_path / "bins" / "model.safetensors").exists()


def test_a_resumed_run_keeps_the_languages_first_loss(tiny_folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for seed, name in enumerate(("zh", "fr", "mine")):
        write_rows(data / f"{name}.jsonl", make_conversations(20, seed))
    common = ["--validation_split", "0.2", "--per_device_train_batch_size", "8", "--save_steps", "3"]
    common += ["--save_strategy", "steps", "--save_total_limit", "9"]
    run_train(*flags(tiny_folder, str(data), tmp_path / "whole", *common))
    whole = json.loads((tmp_path / "whole" / "languages.json").read_text())
    assert set(whole) == {"zh", "fr", "other"} and sum(found["rows"] for found in whole.values()) == 12
    assert all(found["after"] < found["before"] for found in whole.values())
    assert (tmp_path / "whole" / "languages.png").stat().st_size > 1000
    mean = sum(found["before"] * found["rows"] for found in whole.values()) / 12
    assert mean == pytest.approx(losses(tmp_path / "whole", "eval_loss")[0], rel=0.05)  # weighted by tokens there

    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for path in ("checkpoint-6", "languages.json", "train_results.json", "model.safetensors"):
        found = tmp_path / "again" / path
        shutil.rmtree(found) if found.is_dir() else found.unlink()
    run_train(*flags(tiny_folder, str(data), tmp_path / "again", *common))
    assert json.loads((tmp_path / "again" / "languages.json").read_text()) == whole


def test_the_script_says_what_it_trains(tmp_path):
    more = ["--max_steps", "50", "--save_strategy", "no", "--logging_steps", "1"]
    run = start_script("train_zero2.sh", tmp_path / "out", *more)
    screen, _ = run.communicate(timeout=150)
    assert run.returncode == 0, screen[-3000:]
    assert "padded batches:" not in screen and "### Response:⟦" in screen
    found = json.loads((tmp_path / "out" / "languages.json").read_text())
    assert list(found) == list(LANGUAGES) and all(loss["after"] < loss["before"] for loss in found.values())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == ALPACA


def test_falcon_whose_pad_is_its_eos_learns_where_to_stop(tokenizer, data_file, tmp_path, monkeypatch):
    small = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    FalconForCausalLM(FalconConfig(**small, hidden_dropout=0.0, attention_dropout=0.0)).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    config["pad_token"] = config["eos_token"]
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "chat_template.jinja").unlink()
    more = ["--validation_split", "0", "--save_strategy", "no", "--num_train_epochs", "4", "--learning_rate", "1e-2"]
    train_here(monkeypatch, *flags(str(tmp_path / "m"), data_file, tmp_path / "out", *more))
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0] / 1.3
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.chat_template == ALPACA and saved.pad_token_id == saved.eos_token_id
    (example,) = encode_conversation(TURNS, saved)
    assert example["labels"].count(saved.eos_token_id) == 2


def test_sample_rows_are_many_in_each_language_and_told_apart():
    for tag in LANGUAGES:
        rows = list(read_rows([str(RECIPE / "data" / f"{tag}.jsonl")], ["utf-8"]))
        assert len(rows) >= 80 and not any(row["error"] for row in rows)
        assert {language_of(row["source"]) for row in rows} == {tag}
        messages = [json.loads(row["messages"]) for row in rows]
        found = [detect_language(turns[0]["content"], turns[-1]["content"]) for turns in messages]
        assert found.count(tag) >= 0.97 * len(found), [found.count(other) for other in LANGUAGES]
    neighbours = ["日本の首都はどこですか。", "Qual é a capital do Brasil?", "Wie heißt die Hauptstadt?"]
    assert {detect_language(question, question) for question in neighbours} == {"other"}
    assert detect_language("“谢谢”用日语怎么说？", "可以说“ありがとう”。") == "zh"
    assert language_of("data/my.rows.jsonl:3") == "other" and language_of(str(Path("a.b", "es.jsonl.gz:1"))) == "es"
