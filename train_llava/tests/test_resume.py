"""A run that was killed and started again ends bit for bit where one that was never stopped ends."""

import time
from pathlib import Path

import torch
from ranks import Run, read_history, run_train, start_train
from safetensors.torch import load_file

FLAGS = "--learning_rate 1e-3 --logging_steps 1 --save_strategy steps --save_steps 3 --num_train_epochs 3 --seed 7"
FLAGS += " --per_device_train_batch_size 8 --train_type use_lora --projector_learning_rate 2e-3"
# 25 rows in steps of 8: 4 steps an epoch, 12 in all, so that checkpoints fall inside epochs. Adapters have dropout.


def kill_when(run: Run, condition) -> None:
    """SIGKILL to all ranks as soon as the condition holds."""
    deadline = time.time() + 120
    while not condition():
        assert run.is_running() and time.time() < deadline, "the run ended before it could be killed"
        time.sleep(0.002)
    run.kill()


def final_state(output: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state at the end, and the logged losses."""
    state = load_file(output / "adapter_model.safetensors")
    for number, values in torch.load(output / "checkpoint-12" / "optimizer.pt")["state"].items():
        state |= {f"{number}.{name}": value for name, value in values.items()}
    for key in ("loss", "eval_loss", "eval_loss_exchanged"):
        state[key] = torch.tensor([entry[key] for entry in read_history(output) if key in entry])
    return state


def test_a_killed_run_ends_like_one_that_was_never_stopped(tiny_folder, data_file, eval_file, tmp_path):
    paths = ["--model_name_or_path", tiny_folder, "--data_path", data_file, "--eval_data_path", eval_file]

    def command(output):
        return [*paths, "--output_dir", output, *FLAGS.split()]

    run_train(*command(tmp_path / "whole"))
    killed = tmp_path / "killed"
    first, second = killed / "checkpoint-6", killed / "checkpoint-9"
    kill_when(start_train(*command(killed)), (first / "manifest.json").exists)
    # The second start goes on from the second epoch and dies while it writes the next checkpoint.
    kill_when(start_train(*command(killed)), second.exists)
    assert not (second / "manifest.json").exists()

    screen = run_train(*command(killed))
    assert f"{second} is incomplete" in screen and f"resuming from {first}" in screen
    expected, resumed = final_state(tmp_path / "whole"), final_state(killed)
    assert expected.keys() == resumed.keys() and len(expected) > 50
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
