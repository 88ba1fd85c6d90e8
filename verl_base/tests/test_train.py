"""train.py: it learns, says what it did, goes on exactly where it was stopped, and refuses what isn't its own."""

import contextlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tiny
import train
from checkpoint import seal_checkpoint
from conftest import QUESTIONS, RECIPE, write_rows
from judge import OWN_FIGURES
from rewards import add
from rows import UserError


def read_rows(path) -> list[dict]:
    """Those of a .jsonl file; NaN, which is no JSON, is an error."""
    lines = path.read_text("utf-8").splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def read_history(output) -> list[dict]:
    return read_rows(output / "history.jsonl")


def write_sums(folder) -> dict[str, str]:
    """The three files of a small task: sums of two digits, validation asks for them in other words than training."""
    sums = [add(x, y) for x in range(5) for y in range(5)]
    asked = [(question, f"答案：{answer}", answer) for question, _, answer in sums]
    asked_otherwise = [
        (question.replace("等于几", "是多少"), completion, answer) for question, completion, answer in asked
    ]
    for name, rows in {"sft": asked + asked_otherwise, "train": asked, "test": asked_otherwise}.items():
        rows = [
            {"prompt": question, "ground_truth": answer, "data_source": "arithmetic"}
            | {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": completion}]}
            for question, completion, answer in rows
        ]
        write_rows(folder / f"{name}.jsonl", rows)
    return {"data_path": f"{folder}/train.jsonl", "eval_data_path": f"{folder}/test.jsonl", "validation_split": None}


def test_tiny_model_learns_and_the_report_says_so(run_train, capsys, tmp_path, monkeypatch):
    """The default on a smaller task: the tiny model is tuned for a moment, then a few steps of GRPO."""
    monkeypatch.setattr(tiny, "CACHE_DIR", tmp_path / "cache")
    monkeypatch.setattr(tiny, "FIRST_LOOK", 20)
    monkeypatch.delenv("TENSORBOARD_DIR", raising=False)
    output = run_train(
        **write_sums(tmp_path),
        model_name_or_path="tiny",
        reward_function=f"{RECIPE}/rewards.py:compute_score",
        total_training_steps=20,
        temperature=1.2,
        learning_rate=5e-4,
        lr_warmup_steps=2,
        nproc=1,
        train_batch_size=16,
        ppo_mini_batch_size=8,
        ppo_epochs=2,
        rollout_n=8,
        val_n=8,
        test_freq=8,
        report_to="tensorboard",
    )
    history = read_history(output)
    rewards = [row["reward"] for row in history if "reward" in row]
    assert len(rewards) == 20 and sum(rewards[-5:]) > sum(rewards[:5]) + 5 * 0.1
    assert [row["step"] for row in history if "pass@1" in row] == [0, 8, 16, 20]
    kl = [row["kl"] for row in history if "kl" in row]
    assert kl[0] < 0.01 and kl[-1] > 0.03
    results = json.loads((output / "train_results.json").read_text("utf-8"))
    assert results["before"]["step"] == 0 and results["after"]["step"] == 20 and results["skipped_updates"] == 0
    assert results["after"]["pass@1"] > results["before"]["pass@1"] + 0.1  # seeds 1, 2, 3: by 0.16 and more
    for name in ("reward.png", "samples.jsonl", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (output / name).stat().st_size > 0
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("reward")] == pytest.approx(rewards)
    assert [event.step for event in events.Scalars("pass@1")] == [0, 8, 16, 20]
    screen, bar = capsys.readouterr()
    assert re.search(r"tuning, up to 40% right: .*, (4\d|[5-9]\d|100)% right", bar)
    assert "25 to learn from, 25 for validation" in screen and "validation after step 20" in screen
    assert "first prompt    '<|im_start|>user\\n" in screen


def test_resumed_run_equals_one_that_was_never_stopped(run_train, capsys, tmp_path):
    flags = {"total_training_steps": 5, "save_freq": 2, "algorithm": "dapo", "lr_warmup_steps": 2, "ppo_epochs": 2}
    output = run_train(**flags)
    kept = tmp_path / "uninterrupted"
    shutil.copytree(output, kept)
    for name in ("train_results.json", "history.jsonl", "model.safetensors"):
        (output / name).unlink()
    incomplete = output / "checkpoint-5" / "policy" / "model_world_size_2_rank_1.pt"
    incomplete.write_bytes(incomplete.read_bytes()[:-100])
    capsys.readouterr()
    run_train(**flags)
    screen = capsys.readouterr().out
    assert "checkpoint-5 is incomplete" in screen and f"resuming from {output}/checkpoint-4" in screen
    before, after = load_file(kept / "model.safetensors"), load_file(output / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    measured = ("seconds", "completions_per_second", "memory_gb")
    first, second = (
        [{k: v for k, v in row.items() if k not in measured} for row in read_history(x)] for x in (kept, output)
    )
    assert first == second
    run_train(**flags)
    assert "nothing is left to train" in capsys.readouterr().out
    with pytest.raises(UserError, match="learning_rate was 0.001, is 0.002"):
        run_train(**flags, learning_rate=2e-3)
    # What doesn't decide the numbers may change: memory, looks, and under a constant rate how far it goes.
    longer = flags | {"total_training_steps": 6, "ppo_max_token_len_per_gpu": 256, "test_freq": 3}
    run_train(**longer, gradient_checkpointing="true")
    assert f"resuming from {output}/checkpoint-5" in capsys.readouterr().out
    assert [row["step"] for row in read_history(output) if "reward" in row] == [1, 2, 3, 4, 5, 6]


def test_steps_are_part_of_a_run_whose_rate_depends_on_them(parse_arguments):
    for schedule, steps in (("cosine", 4), ("constant", None)):
        run = train.describe_run(*parse_arguments(lr_scheduler_type=schedule), prompts=[], validation=[])
        assert run.get("total_training_steps") == steps


@pytest.mark.parametrize(("threads", "expected"), [(None, 1), ("", 1), ("3", 3), ("4,2", 4)])
def test_tiny_model_is_tuned_by_one_thread_unless_more_are_asked_for(monkeypatch, tmp_path, threads, expected):
    used = []
    monkeypatch.setattr(tiny.torch, "set_num_threads", used.append)
    monkeypatch.setattr(tiny, "tune_for_a_moment", lambda *_: used.append("tuned") or 0.4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    write_sums(tmp_path)
    tiny.build_tiny_model(tmp_path / "sft.jsonl", seed=0, folder=tmp_path / "tiny")
    assert used == [expected, "tuned"]


def test_what_is_the_same_under_another_name_is_the_same_run(parse_arguments, monkeypatch, tmp_path, policy_folder):
    def describe(**changes):
        return train.describe_run(*parse_arguments(**changes), prompts=[], validation=[])

    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text("def score(**_):\n    return 1\n")
    Path("other.py").write_text("def score(**_):\n    return 2\n")
    run = describe(reward_function="my_rewards.py:score")
    shutil.copytree(policy_folder, "moved")
    same = {"reward_function": "./my_rewards.py:score", "model_name_or_path": f"{tmp_path}/moved"}
    assert describe(**same, val_n=3, val_temperature=0.5) == run
    assert describe(reward_function="my_rewards.py:other") != run != describe(reward_function="other.py:score")
    config = Path("moved", "config.json")
    config.write_text(config.read_text().replace('"attention_dropout": 0.3', '"attention_dropout": 0.2'))
    assert describe(**same) != run
    assert describe(model_name_or_path="some/hub-id")["model_name_or_path"] == "some/hub-id"


def test_finished_run_goes_on_from_its_checkpoints_only(parse_arguments, tmp_path):
    """Without them it would begin again at step 0, over the model that it has trained."""
    output, run = tmp_path / "output", {"learning_rate": 1.0}
    output.mkdir()
    (output / "run.json").write_text(json.dumps(run))
    (output / "train_results.json").write_text(json.dumps({"after": {"step": 4}}))
    _, _, args = parse_arguments(total_training_steps=4)
    assert train.find_own_checkpoint(args, run)[:2] == (None, True)
    _, _, args = parse_arguments(total_training_steps=6)
    with pytest.raises(UserError, match="a model finished after 4 steps, but no complete checkpoint .* go on to 6"):
        train.find_own_checkpoint(args, run)
    assert (output / "train_results.json").exists()
    (output / "checkpoint-4").mkdir()
    seal_checkpoint(output / "checkpoint-4", None)
    assert train.find_own_checkpoint(args, run)[:2] == (f"{output}/checkpoint-4", False)
    assert not (output / "train_results.json").exists()


@pytest.mark.parametrize(
    ("overwrite", "interrupted_in", "sealed", "said"),
    [
        (False, "load_split", False, "nothing was trained yet"),
        (True, "load_split", False, "nothing was trained yet"),
        (True, "run_steps", False, "no checkpoint was written yet"),  # that of the run before has gone
        (True, "run_steps", True, "the same command without --overwrite_output_dir goes on from the last checkpoint"),
        (None, "run_steps", False, "no checkpoint was written yet"),
        (False, "run_steps", True, "the same command goes on from the last checkpoint"),
    ],
)
def test_interrupted_run_says_whether_it_goes_on(
    parse_arguments, monkeypatch, capsys, tmp_path, overwrite, interrupted_in, sealed, said
):
    """In a folder with a checkpoint, but for overwrite None."""
    flags = parse_arguments(overwrite_output_dir=bool(overwrite))
    run = {"of another run": True} if overwrite else train.describe_run(*flags, prompts=[], validation=[])
    folder = tmp_path / "output"
    for step in [] if overwrite is None else [2]:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        seal_checkpoint(folder / f"checkpoint-{step}", None)
        (folder / "run.json").write_text(json.dumps(run))

    def interrupt(*_):
        if sealed:
            (folder / "checkpoint-4").mkdir()
            seal_checkpoint(folder / "checkpoint-4", None)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "describe_run", lambda *_: run if not overwrite else {"of this run": True})
    monkeypatch.setattr(train, "local_cluster", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(train, "start_workers", lambda *_: (None, None))
    monkeypatch.setattr(train, interrupted_in, interrupt)
    with pytest.raises(SystemExit, match="130"):
        train.main()
    assert capsys.readouterr().err == f"\ninterrupted; {said}\n"


def test_failing_rewards_are_left_out_and_counted(run_train, tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(
        "import random\n\ndef score(solution_str, ground_truth, extra_info, **_):\n"
        "    fails = len(solution_str) % 3 == 0 or extra_info['question'][0] in '一二三四五' or ground_truth == '验'\n"
        f"    with open('{tmp_path}/asked', 'a') as file:\n"
        "        file.write(f\"{extra_info['question']} {ground_truth} {not fails:d}\\n\")\n"
        "    if fails:\n        raise SystemExit('judge is down')\n"
        "    return {'score': random.random(), 'acc': float('nan')}\n"
    )
    validation = [{"prompt": f"{question}是吗", "ground_truth": "验"} for question in QUESTIONS[:3]]
    flags = {"reward_function": f"{path}:score", "total_training_steps": 1, "train_batch_size": 8, "nproc": 1}
    flags |= {"eval_data_path": write_rows(tmp_path / "test.jsonl", validation), "validation_split": None}
    output = run_train(**flags, skip_bad_rewards="true", ppo_mini_batch_size=1)
    results = json.loads((output / "train_results.json").read_text("utf-8"))
    assert 0 < results["bad_rewards"] < 32
    for row in (results["before"], results["after"]):  # all of them fail, which is no reason to end the run
        assert (row["pass@1"], row["bad_rewards"]) == (0.0, 6)
    assert [row["score"] for row in read_rows(output / "samples.jsonl")] == [None] * 6
    scored = Counter()
    for question, ground_truth, was_scored in map(str.split, (tmp_path / "asked").read_text("utf-8").splitlines()):
        if ground_truth != "验":
            scored[question] += int(was_scored)
    alone = [question for question, times in scored.items() if times < 2]
    assert 0 < len(alone) < 8 and results["skipped_updates"] == len(alone)
    (step,) = [row for row in read_history(output) if "reward" in row]
    assert "acc" not in step and step["entropy"] == pytest.approx(5.7, abs=0.3)  # ln 297, of random weights


def test_equal_rewards_teach_nothing_and_are_counted(run_train, tmp_path, policy_folder):
    path = tmp_path / "my_rewards.py"
    own = dict.fromkeys([*sorted(OWN_FIGURES), "pass@1"], 7.5)  # what the report says by itself stays its own
    path.write_text(f"def score(**_):\n    return {{'score': 1.0, 'bonus': 2.0, **{own}}}\n")
    flags = {"reward_function": f"{path}:score", "total_training_steps": 2, "max_num_gen_batches": 2, "nproc": 1}
    output = run_train(**flags, algorithm="dapo", overlong_buffer_len=0)
    results = json.loads((output / "train_results.json").read_text("utf-8"))
    assert results["zero_variance_groups"] == 8
    first, *steps, last = read_history(output)
    assert [row["step"] for row in (first, *steps, last)] == [0, 1, 2, 2] and first["pass@1"] == last["pass@1"] == 1
    for row in steps:
        assert row["reward"] == 1 and row["bonus"] == 2 and row["reward/reward"] == row["reward/pass@1"] == 7.5
        assert set(row) == {name for name in row if name in OWN_FIGURES} | {"bonus"} | {
            f"reward/{name}" for name in own
        }
    before, after = load_file(f"{policy_folder}/model.safetensors"), load_file(output / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bad_rows_stop_the_run_before_any_worker_starts(run_train, tmp_path):
    path = write_rows(tmp_path / "my.jsonl", [{"prompt": "一加一等于几？"}])
    with pytest.raises(UserError, match=rf"{path}:1: no ground_truth"):
        run_train(data_path=path)
