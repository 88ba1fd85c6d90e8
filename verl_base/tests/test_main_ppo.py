"""verl's own trainers by our data, rewards and plug-ins; the scripts for GPUs as far as their configurations go."""

import json
import os
import re
import socket
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from hydra.errors import InstantiationException
from transformers import AutoModelForCausalLM, AutoTokenizer

from base03_main_ppo.check_configs import ALGORITHMS, SCRIPTS, check_script
from base03_main_ppo.make_parquet import make_parquet, read_rows
from base03_main_ppo.untuned import save_untuned
from conftest import QUESTIONS, RECIPE, addresses_listened_on, processes_of, write_rows
from judge import import_reward_function
from rows import UserError

# A policy with random weights writes 48 tokens of nonsense.
RL = ["data.train_batch_size=40", "actor_rollout_ref.actor.ppo_mini_batch_size=20", "data.max_response_length=48"]
RL += ["trainer.val_before_train=false"]
RL += ["trainer.total_training_steps=2", "trainer.test_freq=2", "trainer.save_freq=2"]  # 60 prompts: two epochs


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with the three files of a task."""
    folder = tmp_path_factory.mktemp("task")
    rows = [{"prompt": question, "ground_truth": "八", "data_source": "arithmetic"} for question in QUESTIONS]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": "答案：八"}] for q in QUESTIONS]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", rows[:4])
    write_rows(folder / "sft.jsonl", [{"messages": messages} for messages in turns])
    return folder


def start_script(script: str, output, task, overrides: list[str], **variables) -> subprocess.Popen:
    """A script in a session of its own, which prints to `output`.log; its processes have RUN in their environment."""
    environment = os.environ | {"DATA": str(task), "OUTPUT": str(output), "RUN": str(output)} | variables
    environment["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    command = ["bash", str(RECIPE / "base03_main_ppo" / script), *overrides]
    with output.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def read_log(output) -> str:
    return output.with_suffix(".log").read_text("utf-8", errors="replace")


def assert_nothing_is_left(output) -> None:
    end = time.time() + 15
    while (left := processes_of(output)) and time.time() < end:
        time.sleep(0.5)
    for process in left:
        process.kill()
    assert left == []


def find_metric(name: str, shown: str) -> list[float]:
    return [float(value) for value in re.findall(rf"{name}:(?:np\.float\d+\()?(-?[\d.e-]+)", shown)]


def test_rows_become_verls_parquet(task, tmp_path):
    make_parquet(task, tmp_path)
    train = pd.read_parquet(tmp_path / "train.parquet")
    assert len(train) == len(QUESTIONS) - 4  # the validation questions are none of them
    assert list(train["prompt"][0]) == [{"role": "user", "content": QUESTIONS[4]}]
    assert train["reward_model"][0]["ground_truth"] == "八" and train["data_source"][0] == "arithmetic"
    assert train["extra_info"][0]["source"] == f"{task}/train.jsonl:5"
    conversations = [len(pd.read_parquet(tmp_path / f"sft_{split}.parquet")) for split in ("train", "test")]
    assert conversations == [61, 3]


@pytest.mark.parametrize(
    ("split", "row", "reason"),
    [
        ("train", {"prompt": "一加一等于几？"}, "no ground_truth"),
        ("train", {"prompt": "一加一等于几？", "ground_truth": 2}, "ground_truth is a int, in the first row a str"),
        ("sft", {"messages": [{"role": "user", "content": "一加一等于几？"}]}, "a question and a reply at least"),
        ("sft", {"messages": [{"role": "user", "content": "问"}] * 2}, "the last message must be the assistant's"),
    ],
)
def test_bad_rows_are_named(split, row, reason, task, tmp_path):
    first = (task / f"{split}.jsonl").read_text("utf-8").splitlines()[0]
    path = tmp_path / "rows.jsonl"
    write_rows(path, [json.loads(first), row])
    with pytest.raises(UserError, match=f"{path}:2: .*{reason}"):
        read_rows(path, split)


@pytest.fixture(scope="module")
def untuned(tmp_path_factory, task) -> str:
    folder = str(tmp_path_factory.mktemp("untuned"))
    save_untuned(task / "sft.jsonl", folder)
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gpu_scripts_compose_what_verl_accepts(script, algorithm, untuned):
    differences = check_script(script, algorithm, untuned)
    assert differences["actor_rollout_ref.rollout.name"][1] == "vllm"
    assert differences["reward.custom_reward_function.path"][1] == str(RECIPE / "rewards.py")
    assert ("trainer.nnodes" in differences) == (script == "train_cluster.sh")


def test_settings_that_verl_does_not_accept(untuned):
    with pytest.raises(ValueError, match="verl knows no trainer.total_step"):
        check_script("train_vllm.sh", "ppo", untuned, "+trainer.total_step=3")
    with pytest.raises(InstantiationException, match="pipeline_model_parallel_size"):
        check_script("train_cluster.sh", "grpo", untuned, "actor_rollout_ref.rollout.pipeline_model_parallel_size=2")


def test_cluster_whose_port_is_in_use_does_not_start(task, tmp_path):
    output = tmp_path / "cluster"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        head = {"NNODES": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NPROC": "1"}
        run = start_script("train_cluster.sh", output, task, [], RAY_AUTH_TOKEN="secret", **head)
        assert run.wait(timeout=60) == 1
    assert f"error: 127.0.0.1:{port} is in use" in read_log(output)
    assert not output.exists()


def test_warm_start_lowers_the_loss(tmp_path, task):
    output = tmp_path / "sft"
    small = ["data.train_batch_size=16", "trainer.total_epochs=4", "trainer.test_freq=-1", "optim.lr_warmup_steps=2"]
    run = start_script("sft_cpu.sh", output, task, small)
    assert run.wait() == 0, read_log(output)[-5000:]
    assert_nothing_is_left(output)
    losses = find_metric("train/loss", read_log(output))
    assert len(losses) == 12 and losses[-1] < losses[0] / 2
    folder = output / "global_step_12" / "huggingface"
    ids = AutoTokenizer.from_pretrained(folder)("答案：八<|im_end|>", return_tensors="pt")["input_ids"]
    tuned, untuned = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (folder, output / "untuned")
    )
    with torch.no_grad():
        assert tuned(ids, labels=ids).loss < untuned(ids, labels=ids).loss


def test_ppo_learns_from_a_reward_and_listens_to_this_machine_only(tmp_path, task, policy_folder, reward_file, request):
    """PPO needs all that GRPO needs, and a critic. It starts its own Ray, which is what must listen to nobody else."""
    output = tmp_path / "ppo"
    path, name = reward_file.rsplit(":", 1)
    own = [f"reward.custom_reward_function.path={path}", f"reward.custom_reward_function.name={name}"]
    own += [f"trainer.rollout_data_dir={output / 'rollouts'}"]
    variables = {"MODEL": policy_folder, "ALGORITHM": "ppo", "NPROC": "1"}
    run = start_script("train_cpu.sh", output, task, [*RL, *own], **variables)
    request.addfinalizer(lambda: [process.kill() for process in processes_of(output)])
    addresses = set()
    while run.poll() is None:
        addresses |= addresses_listened_on(processes_of(output))
        time.sleep(1)
    assert_nothing_is_left(output)
    assert run.returncode == 0, read_log(output)[-5000:]
    assert addresses == {"127.0.0.1"}
    shown = read_log(output)
    scores = find_metric("critic/score/mean", shown)
    rows = [json.loads(line) for line in (output / "rollouts" / "1.jsonl").read_text("utf-8").splitlines()]
    reward = import_reward_function(reward_file)
    expected = [reward("arithmetic", row["output"], row["gts"])["score"] for row in rows]
    assert len(rows) == 40 and len(set(expected)) > 1
    assert [row["score"] for row in rows] == pytest.approx(expected, abs=1e-6)
    assert len(scores) == 2 and scores[0] == pytest.approx(sum(expected) / len(expected), abs=1e-6)
    assert max(find_metric("rollout_corr/log_ppl_abs_diff", shown)) < 1e-5  # what is sampled from is what is trained
    assert find_metric("critic/vf_loss", shown) and find_metric("critic/grad_norm", shown)[0] > 0
    assert find_metric("val-core/arithmetic/acc/mean@2", shown) == [0.0]
    assert (output / "global_step_2" / "actor" / "huggingface" / "model.safetensors").is_file()
    assert not (output / "ray").exists()
