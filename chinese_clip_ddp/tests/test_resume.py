"""A run that was killed and started again ends bit for bit where one that was never stopped ends."""

import time
from pathlib import Path

import pytest
import torch
from ranks import Run, read_history, run_train, start_train, train_here
from safetensors.torch import load_file

from rows import UserError

FLAGS = "--save_strategy steps --save_steps 3 --num_train_epochs 3 --seed 7 --cross_embedding"
LOGGED = ("loss", "logit_scale", "accuracy_i2t", "same_caption_pairs", "eval_mean_recall")
# 25 pairs in steps of 8: 4 steps an epoch, 12 in all, so that checkpoints fall inside epochs.


def kill_when(run: Run, condition) -> None:
    """SIGKILL to all ranks as soon as the condition holds."""
    deadline = time.time() + 120
    while not condition():
        assert run.is_running() and time.time() < deadline, run.printed()[-5000:]
        time.sleep(0.002)
    run.kill()


def final_state(output: Path) -> dict[str, torch.Tensor]:
    """Weights, statistics of batch norms and optimizer state at the end, and what was logged."""
    state = load_file(output / "model.safetensors")
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    optimizer_files = [*last.glob("optimizer.pt"), *sorted(last.rglob("*optim_states.pt"))]
    assert optimizer_files
    for file in optimizer_files:
        stack = [(file.name, torch.load(file, weights_only=False))]
        while stack:
            name, value = stack.pop()
            if isinstance(value, torch.Tensor):
                state[name] = value
            elif isinstance(value, dict):
                stack += [(f"{name}.{key}", item) for key, item in value.items()]
            elif isinstance(value, (list, tuple)):
                stack += [(f"{name}.{index}", item) for index, item in enumerate(value)]
    for key in LOGGED:
        state[key] = torch.tensor([entry[key] for entry in read_history(output) if key in entry], dtype=torch.float64)
        assert len(state[key])
    return state


@pytest.mark.parametrize(
    ("tower", "layout"),
    [
        ("levit", "tiled --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --image_augmentation crop"),
        ("tiny", "sigmoid --per_device_train_batch_size 4 --deepspeed ds_zero2_no_offload.json"),
    ],
)
def test_a_killed_run_ends_like_one_that_was_never_stopped(tower, layout, paths, request, tmp_path):
    model = request.getfixturevalue(f"{tower}_folder")

    def command(output):
        return [*paths(output, model), *FLAGS.split(), *layout.split()]

    run_train(*command(tmp_path / "whole"), processes=2)

    killed = tmp_path / "killed"
    first, second = killed / "checkpoint-6", killed / "checkpoint-9"
    # It dies while it writes its third checkpoint, and goes on from the second one, in the midst of an epoch.
    kill_when(start_train(*command(killed), processes=2), second.exists)
    assert not (second / "manifest.json").exists()

    screen = run_train(*command(killed), processes=2)
    assert f"{second} is incomplete" in screen and f"resuming from {first}" in screen
    expected, resumed = final_state(tmp_path / "whole"), final_state(killed)
    assert expected.keys() == resumed.keys()
    assert not [name for name in expected if not torch.equal(expected[name], resumed[name])]
    assert (expected["logit_scale"].diff() != 0).all()


def test_another_way_of_the_loss_is_another_run_and_a_finished_one_is_left_as_it_is(
    paths, tmp_path, monkeypatch, capsys
):
    train_here(monkeypatch, *paths(tmp_path), "--max_steps", "1")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir() if file.name != ".lock"}
    with pytest.raises(UserError, match="another run: cross_embedding was tiled, is local"):
        train_here(monkeypatch, *paths(tmp_path), "--max_steps", "1", "--cross_embedding", "local")
    train_here(monkeypatch, *paths(tmp_path), "--max_steps", "1")
    assert "nothing is left to train" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir() if file.name != ".lock"}
