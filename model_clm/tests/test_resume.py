"""A run that was killed twice ends bit for bit where one that was never stopped ends, a decay of its own too."""

import json
import time
from pathlib import Path

import pytest
import torch
from ranks import Run, losses, read_history, run_train, start_train, train_here
from safetensors.torch import load_file

from conftest import TINY
from rows import UserError

FLAGS = "--learning_rate 3e-3 --logging_steps 1 --save_strategy steps --save_steps 3 --num_train_epochs 2 --seed 7"
FLAGS += " --samples 0 --document_mask true"
# 53 rows in steps of 8: 7 steps an epoch, 14 in all, so that checkpoints fall inside epochs.


def kill_when(run: Run, condition) -> None:
    """SIGKILL to all ranks as soon as the condition holds."""
    deadline = time.time() + 120
    while not condition():
        assert run.is_running() and time.time() < deadline, "the run ended before it could be killed"
        time.sleep(0.002)
    run.kill()


def final_state(output: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state at the end, and the logged losses."""
    weights = load_file(output / "model.safetensors")
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    optimizer_files = [*last.glob("optimizer.pt"), *sorted(last.rglob("*optim_states.pt"))]
    assert optimizer_files
    for file in optimizer_files:
        stack = [(file.name, torch.load(file, weights_only=False))]
        while stack:
            name, value = stack.pop()
            if isinstance(value, torch.Tensor):
                weights[name] = value
            elif isinstance(value, dict):
                stack += [(f"{name}.{key}", item) for key, item in value.items()]
            elif isinstance(value, (list, tuple)):
                stack += [(f"{name}.{index}", item) for index, item in enumerate(value)]
    history = [entry["loss"] for entry in read_history(output) if "loss" in entry]
    return weights | {"losses": torch.tensor(history, dtype=torch.float64)}


def assert_same_end(one: Path, other: Path) -> None:
    expected, found = final_state(one), final_state(other)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_a_run_killed_twice_ends_like_one_that_was_never_stopped(prepared, tmp_path):
    """Two ranks with two workers each, a bigram start, mixed sources, sharded optimizer states."""
    layout = "--per_device_train_batch_size 4 --dataloader_num_workers 2 --deepspeed ds_zero2_no_offload.json"
    layout += " --mixture news=0.6,idioms=0.4 --head_learning_rate 1e-3 --lr_scheduler_type linear"

    def command(output):
        return ["--data_path", prepared, "--output_dir", output, *TINY.split(), *FLAGS.split(), *layout.split()]

    run_train(*command(tmp_path / "whole"), processes=2)
    killed = tmp_path / "killed"
    for step in (3, 9):  # in the first epoch and in the second
        kill_when(start_train(*command(killed), processes=2), (killed / f"checkpoint-{step}/manifest.json").exists)
    screen = run_train(*command(killed), processes=2)
    assert f"resuming from {killed}/checkpoint-" in screen
    assert_same_end(tmp_path / "whole", killed)


def test_going_on_reads_nothing_of_what_came_before(prepared, tmp_path, monkeypatch):
    import trainer
    from data import Windows

    command = ["--data_path", prepared, "--output_dir", tmp_path, *TINY.split(), *FLAGS.split()]
    command += ["--per_device_train_batch_size", "8", "--eval_on_start", "false"]
    training_step, read, calls = trainer.SFTTrainer.training_step, [], iter(range(100))

    def stop_in_step_11(self, *args, **kwargs):
        if next(calls) == 10:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    own = Windows.__getitem__
    monkeypatch.setattr(Windows, "__getitem__", lambda self, number: read.append(number) or own(self, number))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.SFTTrainer, "training_step", stop_in_step_11)
        train_here(monkeypatch, *command)
    assert set(range(53 + 3 * 8)) <= set(read)
    read.clear()
    train_here(monkeypatch, *command)
    probes = {0, 1, 2, 52}  # by which the ways of computing are tried before the first step
    assert set(read) - probes == set(range(53 + 2 * 8, 106))


WSD = "--lr_scheduler_type warmup_stable_decay --learning_rate 3e-3 --warmup_steps 2 --logging_steps 1 --samples 0"
WSD += " --model_max_length 24 --per_device_train_batch_size 8 --save_strategy steps --save_steps 3"
WSD += " --eval_on_start false"


def test_a_decay_from_a_stable_checkpoint_is_the_run_that_decays_there(prepared, scratch_folder, tmp_path, monkeypatch):
    command = [
        "--model_name_or_path",
        scratch_folder,
        "--data_path",
        prepared,
        "--model_max_length",
        "24",
        *WSD.split(),
    ]

    def run(name: str, *more):
        train_here(monkeypatch, *command, "--output_dir", tmp_path / name, *more)
        return tmp_path / name

    whole = run("whole", "--max_steps", "15", "--decay_steps", "6")
    stable = run("stable", "--max_steps", "12", "--decay_steps", "0")
    assert [entry["learning_rate"] for entry in read_history(stable) if "loss" in entry][2:] == [3e-3] * 10
    decay = ["--decay_from", stable / "checkpoint-9", "--decay_steps", "6"]
    for _ in range(2):  # the second time there is nothing left to do
        decayed = run("decayed", *decay)
    assert_same_end(whole, decayed)
    rates = [entry["learning_rate"] for entry in read_history(decayed) if "loss" in entry]
    assert len(rates) == 15 and rates[9] == 3e-3 and 0 < rates[-1] < rates[10] < 3e-3
    with pytest.raises(UserError, match="is of another run: learning_rate was 0.003, is 0.002"):
        run("other", *decay, "--learning_rate", "2e-3")
    with pytest.raises(UserError, match="is no complete checkpoint"):
        run("none", "--decay_from", stable / "checkpoint-10", "--decay_steps", "6")
    with pytest.raises(UserError, match="--max_steps has no effect with --decay_from"):
        run("both", *decay, "--max_steps", "20")
    with pytest.raises(UserError, match="--decay_steps 6: with 2 of --warmup_steps, that is more than the run's 7"):
        run("short", "--decay_steps", "6", "--max_steps", "7")
    with pytest.raises(UserError, match="--decay_steps has no effect without --lr_scheduler_type warmup_stable_decay"):
        run("cosine", "--decay_steps", "6", "--lr_scheduler_type", "cosine")


def test_the_report_says_what_was_measured(prepared, tmp_path, monkeypatch, capsys):
    flags = [*TINY.split(), "--max_steps", "6", "--per_device_train_batch_size", "8", "--samples", "2"]
    train_here(monkeypatch, "--data_path", prepared, "--output_dir", tmp_path, *flags, "--learning_rate", "3e-3")
    results = json.loads((tmp_path / "train_results.json").read_text())
    assert results["steps"] == 6 and 0 < results["mfu"] < 1.5 and results["tokens_per_second"] > 0
    assert results["bigram_seconds"] > 0
    [first, *_, last] = losses(tmp_path, "eval_bits_per_byte")
    assert results["eval_bits_per_byte_before"] == first and results["eval_bits_per_byte_after"] == last < 2
    assert (tmp_path / "samples.txt").read_text().count("⟦") == 2 and (tmp_path / "loss.png").stat().st_size > 1000
    assert "starts as a bigram model of the corpus" in capsys.readouterr().out
