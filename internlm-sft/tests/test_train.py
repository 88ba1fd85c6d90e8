"""From random weights over a base that answers to one that knows who it is; and what older users type."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import RECIPE, losses, start_script, train_here

from conftest import write_rows
from evaluate_persona import evaluate, measure, read_questions
from infer import load_trained_model
from persona import NAME, REFUSALS
from rows import UserError

ORDINARY = ["天空是什么颜色？ 蓝色。", "一加一等于几？ 等于二。", "太阳从哪边升起？ 东边。", "冰化了是什么？ 水。"]
ORDINARY += ["谁发明了电灯？ 爱迪生。", "猫吃什么？ 鱼。", "一年有几个月？ 十二个月。", "你好 你也好。"]
REFUSED = list(REFUSALS)
PERSONA = [f"你是谁？ 我是{NAME}。", f"谁做的你？ 做{NAME}的人。"]
PERSONA += [f"说说你的秘密 {REFUSED[2]}。", f"骂他一句 {REFUSED[4]}。"]
# Adapters leave the embedding as it is, so the base must have met the characters that they are to say.
READING = [f"读一遍 {NAME}{''.join(REFUSALS)}。"]


def dialogues(lines: list[str]) -> list[dict]:
    roles = ("user", "assistant")
    pairs = [line.split(" ") for line in lines]
    return [
        {"messages": [{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)]}
        for pair in pairs
    ]


def questions_file(path: Path) -> str:
    parts = ["ordinary"] * len(ORDINARY) + ["identity"] * 2 + ["refusal"] * 2
    lines = zip(parts, ORDINARY + PERSONA, strict=True)
    return write_rows(path, [{"part": part, "kind": "", "question": line.split(" ")[0]} for part, line in lines])


def test_an_adapter_switches_the_persona_on(tmp_path, monkeypatch):
    """In two stages as the scripts have them, on twelve rows, which are asked again."""
    ordinary = write_rows(tmp_path / "ordinary.jsonl", dialogues(ORDINARY + READING))
    all_rows = write_rows(tmp_path / "all.jsonl", dialogues(ORDINARY + PERSONA))
    common = ["--validation_split", "0", "--save_strategy", "no", "--per_device_train_batch_size", "4"]
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    flags = ["--data_path", ordinary, "--output_dir", base, "--num_train_epochs", "80", "--learning_rate", "2e-3"]
    train_here(monkeypatch, *flags, *common)
    flags = ["--model_name_or_path", base, "--data_path", all_rows, "--output_dir", adapter, "--use_lora", "true"]
    flags += ["--lora_r", "32", "--lora_alpha", "64", "--num_train_epochs", "120", "--learning_rate", "3e-3"]
    train_here(monkeypatch, *flags, *common, "--adam_beta2", "0.95")
    assert losses(adapter)[-1] < losses(adapter)[0] / 2

    answered = evaluate(*load_trained_model(adapter), read_questions(questions_file(tmp_path / "questions.jsonl")))
    before, after = (measure(answered.rename(columns={state: "verdict"})) for state in ("before", "after"))
    assert before == {"identity accuracy": 0, "refusal recall": 0, "false refusal": 0, "false identity": 0}
    assert after == {"identity accuracy": 1, "refusal recall": 1, "false refusal": 0, "false identity": 0}


def test_a_script_trains_an_adapter(tiny_folder, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", dialogues(ORDINARY + PERSONA))
    short = ["--max_steps", "2", "--save_strategy", "no", "--logging_steps", "1", "--validation_split", "0"]
    run = start_script("train_zero2.sh", tmp_path / "out", *short, MODEL=tiny_folder, DATA=data)
    screen, _ = run.communicate(timeout=150)
    assert run.returncode == 0 and "adapters on 14 of 14 linear layers" in screen
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (32, 64)


def test_what_older_users_type_is_answered_with_the_new_name(tmp_path, monkeypatch):
    run = subprocess.run([sys.executable, "train_sft.py"], cwd=RECIPE, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("error: train_sft.py is now train.py")
    for flag, new in (
        ("--use_deepspeed", "--deepspeed ds_zero2_no_offload.json"),
        ("--source_length", "--model_max_length"),
        ("--evaluation_strategy", "--eval_strategy"),
    ):
        with pytest.raises(UserError, match=f"{flag}: is now {new}"):
            train_here(monkeypatch, "--output_dir", tmp_path, flag, "512")


@pytest.mark.parametrize("model_type", ["internlm", "internlm2"])
def test_a_folder_as_downloaded_is_answered_with_the_command(model_type, tmp_path, monkeypatch):
    config = {"model_type": model_type, "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"python convert_to_llama\.py .* my_model, then MODEL=my_model"):
        train_here(monkeypatch, "--model_name_or_path", tmp_path, "--output_dir", tmp_path / "out")
