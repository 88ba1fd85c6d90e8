"""A run that was killed and started again ends bit for bit where one that was never stopped ends."""

import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from conftest import RECIPE, losses, read_history, run_train, train_command, train_here, write_table
from rows import UserError

FLAGS = "--learning_rate 1e-3 --logging_steps 1 --save_strategy steps --save_steps 3 --num_train_epochs 3 --seed 7"
# 25 rows in steps of 8: 4 steps an epoch, 12 in all, so that checkpoints fall inside epochs.


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(command, cwd=RECIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_when(process: subprocess.Popen, condition) -> None:
    """SIGKILL to the launcher and all its workers as soon as the condition holds."""
    deadline = time.time() + 120
    while not condition():
        assert process.poll() is None and time.time() < deadline, "the run ended before it could be killed"
        time.sleep(0.002)
    launcher = psutil.Process(process.pid)
    family = [launcher, *launcher.children(recursive=True)]
    for member in family:
        member.kill()
    psutil.wait_procs(family)


def final_state(output: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state at the end, and the logged losses."""
    weights = load_file(next(output.glob("*model.safetensors")))
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


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_classifier_ends_like_one_that_was_never_stopped(
    processes, encoder_folder, data_file, eval_file, tmp_path
):
    paths = ["--model_name_or_path", encoder_folder, "--data_path", data_file, "--eval_data_path", eval_file]
    paths += ["--test_split", "0"]
    # Dropout on adapters in the one case, sharded optimizer states in the other.
    layout = "--use_lora true --per_device_train_batch_size 4 --gradient_accumulation_steps 2"
    if processes == 2:
        layout = "--per_device_train_batch_size 4 --deepspeed ds_zero2_no_offload.json"

    def command(output):
        return [*paths, "--output_dir", output, *FLAGS.split(), *layout.split()]

    run_train(*command(tmp_path / "whole"), processes=processes)

    killed = tmp_path / "killed"
    first, second = killed / "checkpoint-6", killed / "checkpoint-9"
    kill_when(start(train_command(*command(killed), processes=processes)), (first / "manifest.json").exists)
    # The second start goes on from the second epoch and dies while it writes the next checkpoint.
    kill_when(start(train_command(*command(killed), processes=processes)), second.exists)
    assert not (second / "manifest.json").exists()

    screen = run_train(*command(killed), processes=processes).stdout
    assert f"{second} is torn" in screen and f"resuming from {first}" in screen
    expected, resumed = final_state(tmp_path / "whole"), final_state(killed)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_another_setting_or_table_is_another_run(encoder_folder, data_file, tmp_path, monkeypatch, capsys):
    rows = [line.split(",") for line in Path(data_file).read_text("utf-8").splitlines()[1:]]
    table = write_table(tmp_path / "train.csv", rows)
    run = ["--model_name_or_path", encoder_folder, "--data_path", table, "--output_dir", tmp_path / "out"]
    run += ["--max_steps", "2"]
    train_here(monkeypatch, *run)
    results = tmp_path / "out" / "train_results.json"
    before = results.stat().st_mtime_ns
    train_here(monkeypatch, *run)
    assert "nothing is left to train" in capsys.readouterr().out and results.stat().st_mtime_ns == before
    for changed, reason in (
        (["--learning_rate", "1e-3"], "learning_rate was"),
        (["--class_weights", "balanced"], "class_weights was none, is balanced"),
        (["--distillation_alpha", "0.3"], "distillation_alpha was 0.0, is 0.3"),
        (["--model_max_length", "16"], "model_max_length was"),
    ):
        with pytest.raises(UserError, match=f"another run: {reason}"):
            train_here(monkeypatch, *run, *changed)
    write_table(tmp_path / "train.csv", [*rows, ("天地玄黄宇宙洪荒美妙", "好评")])
    with pytest.raises(UserError, match="another run: data was"):
        train_here(monkeypatch, *run)
    train_here(monkeypatch, *run, "--overwrite_output_dir", "true")
    assert results.stat().st_mtime_ns > before


def test_a_classifier_that_stops_early_does_so_after_a_resume_too(
    encoder_folder, data_file, eval_file, tmp_path, monkeypatch
):
    import trainer

    paths = ["--model_name_or_path", encoder_folder, "--data_path", data_file, "--eval_data_path", eval_file]
    flags = "--learning_rate 3e-2 --num_train_epochs 20 --early_stopping_patience 2 --per_device_train_batch_size 8"
    flags += " --metric_for_best_model loss --logging_steps 1 --save_total_limit 3 --load_best_model_at_end true"
    flags += " --test_split 0"

    def run(output):
        train_here(monkeypatch, *paths, "--output_dir", output, *flags.split())
        return losses(output, "eval_loss")

    expected = run(tmp_path / "whole")
    epochs = len(expected) - 1
    assert epochs < 20 and expected[-1] > min(expected) < expected[-2]
    training_step = trainer.ClassificationTrainer.training_step
    calls = iter(range(1000))

    def stop_in_the_last_epoch(self, *args, **kwargs):
        if next(calls) == 4 * (epochs - 1):
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(trainer.ClassificationTrainer, "training_step", stop_in_the_last_epoch)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    assert run(tmp_path / "stopped") == expected
