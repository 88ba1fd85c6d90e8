"""A run that was killed and started again ends bit for bit where one that was never stopped ends.

What all recipes share of it (checkpoint.py, callbacks.py) is tested in train_qwen; here is what this recipe adds: the
order of its batches, its head beside the adapters, and what makes two runs the same.
"""

import time
from pathlib import Path

import pytest
import torch
from ranks import losses, run_train, start_train, train_here
from safetensors.torch import load_file

from conftest import write_table
from rows import UserError


def final_state(output: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer states at the end, and the logged losses."""
    state = load_file(output / "adapter_model.safetensors")
    stack = [(file.name, torch.load(file, weights_only=False)) for file in output.glob("checkpoint-12/*/*optim*.pt")]
    while stack:
        name, value = stack.pop()
        if isinstance(value, torch.Tensor):
            state[name] = value
        elif isinstance(value, dict):
            stack += [(f"{name}.{key}", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            stack += [(f"{name}.{index}", item) for index, item in enumerate(value)]
    return state | {"losses": torch.tensor(losses(output), dtype=torch.float64)}


def test_a_killed_run_ends_like_one_that_was_never_stopped(encoder_folder, data_file, eval_file, tmp_path):
    paths = ["--model_name_or_path", encoder_folder, "--data_path", data_file, "--eval_data_path", eval_file]
    # 25 rows in steps of 8: 4 steps an epoch, 12 in all, so that the first checkpoint falls inside an epoch.
    flags = "--test_split 0 --logging_steps 1 --save_strategy steps --save_steps 6 --num_train_epochs 3 --seed 7"
    # Adapters with dropout, accumulation, sharded optimizer states.
    flags += " --use_lora true --learning_rate 1e-3 --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    flags += " --deepspeed ds_zero2_no_offload.json"
    never_stopped, killed = tmp_path / "never_stopped", tmp_path / "killed"

    def run_in(output) -> list:
        return [*paths, "--output_dir", output, *flags.split()]

    run_train(*run_in(never_stopped), processes=2)
    run = start_train(*run_in(killed), processes=2)
    while not (killed / "checkpoint-6" / "manifest.json").exists():
        assert run.is_running(), run.printed()
        time.sleep(0.002)
    run.kill()
    assert not (killed / "checkpoint-12").exists()
    assert f"resuming from {killed / 'checkpoint-6'}" in run_train(*run_in(killed), processes=2)
    expected, resumed = final_state(never_stopped), final_state(killed)
    assert len(resumed["losses"]) == 12 and any("exp_avg" in name for name in resumed)
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
        (["--model_max_length", "16"], "model_max_length was"),
    ):
        with pytest.raises(UserError, match=f"another run: {reason}"):
            train_here(monkeypatch, *run, *changed)
    write_table(tmp_path / "train.csv", [*rows, ("天地玄黄宇宙洪荒美妙", "好评")])
    with pytest.raises(UserError, match="another run: data was"):
        train_here(monkeypatch, *run)
    train_here(monkeypatch, *run, "--overwrite_output_dir", "true")
    assert results.stat().st_mtime_ns > before
