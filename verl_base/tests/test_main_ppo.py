"""verl's own trainers by our data, rewards and plug-ins; the scripts for GPUs as far as their configurations go."""

import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import psutil
import pytest

from base03_main_ppo.check_configs import ALGORITHMS, SCRIPTS, check_script
from base03_main_ppo.make_parquet import read_rows
from base03_main_ppo.untuned import save_untuned
from conftest import QUESTIONS, RECIPE, write_rows
from rows import UserError


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with the three files of a task, and what it takes to find Python in a script."""
    folder = tmp_path_factory.mktemp("task")
    prompts = [{"prompt": question, "ground_truth": "八", "data_source": "arithmetic"} for question in QUESTIONS]
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": "答案：八"}] for question in QUESTIONS
    ]
    write_rows(folder / "train.jsonl", prompts)
    write_rows(folder / "test.jsonl", prompts[:4])
    write_rows(folder / "sft.jsonl", [{"messages": messages} for messages in turns])
    return folder


def run_script(script: str, output, task, overrides: list[str], **variables) -> str:
    """What a script printed; nothing of it may be left running."""
    environment = os.environ | {"DATA": str(task), "OUTPUT": str(output), "RUN": str(output)} | variables
    environment["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    command = ["bash", str(RECIPE / "base03_main_ppo" / script), *overrides]
    run = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert run.returncode == 0, run.stdout[-5000:]
    left = []
    for process in psutil.process_iter():
        try:
            left += [process.name()] if process.environ().get("RUN") == str(output) else []
        except psutil.Error:
            continue
    assert left == []
    return run.stdout


def test_bad_rows_are_named(tmp_path):
    path = tmp_path / "train.jsonl"
    write_rows(path, [{"prompt": "一加一等于几？", "ground_truth": "二"}, {"prompt": "一加一等于几？"}])
    with pytest.raises(UserError, match=rf"{path}:2: no ground_truth"):
        read_rows(path, "train")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gpu_scripts_compose_what_verl_accepts(script, algorithm, tmp_path, task):
    save_untuned(task / "sft.jsonl", str(tmp_path / "model"))
    differences = check_script(script, algorithm, str(tmp_path / "model"))
    assert differences["actor_rollout_ref.rollout.name"][1] == "vllm"
    assert differences["reward.custom_reward_function.path"][1] == str(RECIPE / "rewards.py")
    assert ("trainer.nnodes" in differences) == (script == "train_cluster.sh")


def test_warm_start_then_grpo(tmp_path, task):
    sft = tmp_path / "sft"
    small = ["data.train_batch_size=16", "trainer.total_epochs=3", "trainer.test_freq=-1", "trainer.save_freq=12"]
    shown = run_script("sft_cpu.sh", sft, task, [*small, "optim.lr_warmup_steps=2"])
    losses = [float(loss) for loss in re.findall(r"train/loss:\s*([\d.]+)", shown)]
    assert len(losses) >= 10 and losses[-1] < losses[0] / 2
    (model,) = sft.glob("global_step_*/huggingface")
    rl = ["data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.rollout.n=4"]
    rl += [
        "trainer.total_training_steps=2",
        "trainer.test_freq=-1",
        "trainer.save_freq=2",
        "data.max_response_length=8",
    ]
    shown = run_script(
        "train_cpu.sh", tmp_path / "grpo", task, [*rl, "trainer.val_before_train=false"], MODEL=str(model)
    )
    rewards = [float(reward) for reward in re.findall(r"critic/score/mean:([\d.-]+)", shown)]
    assert len(rewards) == 2 and all(-1 < reward < 1.7 for reward in rewards)
    assert list((tmp_path / "grpo").glob("global_step_2/actor/huggingface/*.safetensors"))
    assert not (tmp_path / "grpo" / "ray").exists()


def test_parquet_is_in_verls_form(task, tmp_path):
    output = tmp_path / "data"
    command = [sys.executable, "-m", "base03_main_ppo.make_parquet", str(task), str(output)]
    subprocess.run(command, cwd=RECIPE, check=True, capture_output=True)
    row = pd.read_parquet(output / "train.parquet").iloc[0]
    assert row["reward_model"]["ground_truth"] == "八" and row["data_source"] == "arithmetic"
    assert list(row["prompt"]) == [{"role": "user", "content": QUESTIONS[0]}]
    shutil.rmtree(output)
