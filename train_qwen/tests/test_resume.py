"""A run that was killed and started again ends bit for bit where one that was never stopped ends."""

import errno
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from ranks import Run, losses, read_history, run_train, start_train, train_here
from safetensors.torch import load_file

from rows import UserError

FLAGS = "--learning_rate 1e-3 --logging_steps 1 --save_strategy steps --save_steps 3 --num_train_epochs 3 --seed 7"
# 25 rows in steps of 8: 4 steps an epoch, 12 in all, so that checkpoints fall inside epochs.


def kill_when(run: Run, condition) -> None:
    """SIGKILL to all ranks as soon as the condition holds."""
    deadline = time.time() + 120
    while not condition():
        assert run.is_running() and time.time() < deadline, "the run ended before it could be killed"
        time.sleep(0.002)
    run.kill()


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
def test_a_killed_run_ends_like_one_that_was_never_stopped(processes, tiny_folder, data_file, eval_file, tmp_path):
    paths = ["--model_name_or_path", tiny_folder, "--data_path", data_file, "--eval_data_path", eval_file]
    # Dropout on adapters in the one case, sharded optimizer states in the other.
    layout = "--use_lora true --per_device_train_batch_size 4 --gradient_accumulation_steps 2"
    if processes == 2:
        layout = "--per_device_train_batch_size 4 --deepspeed ds_zero2_no_offload.json"

    def command(output):
        return [*paths, "--output_dir", output, *FLAGS.split(), *layout.split()]

    run_train(*command(tmp_path / "whole"), processes=processes)

    killed = tmp_path / "killed"
    first, second = killed / "checkpoint-6", killed / "checkpoint-9"
    kill_when(start_train(*command(killed), processes=processes), (first / "manifest.json").exists)
    # The second start goes on from the second epoch and dies while it writes the next checkpoint.
    kill_when(start_train(*command(killed), processes=processes), second.exists)
    assert not (second / "manifest.json").exists()

    screen = run_train(*command(killed), processes=processes)
    assert f"{second} is incomplete" in screen and f"resuming from {first}" in screen
    expected, resumed = final_state(tmp_path / "whole"), final_state(killed)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_a_truncated_file_makes_a_checkpoint_incomplete(tmp_path):
    from checkpoint import MANIFEST, find_checkpoint, is_complete, list_file_sizes

    for step in (3, 6):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"0123456789")
        (folder / MANIFEST).write_text(json.dumps(list_file_sizes(folder)))
    (tmp_path / "run.json").write_text('{"model": "a"}')
    assert find_checkpoint(str(tmp_path), {"model": "a"}, overwrite=False)[0].endswith("checkpoint-6")
    (tmp_path / "checkpoint-6" / "optimizer.pt").write_bytes(b"01234")
    assert not is_complete(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-best").mkdir()  # a copy that the user made
    checkpoint, _, messages = find_checkpoint(str(tmp_path), {"model": "a"}, overwrite=False)
    assert checkpoint.endswith("checkpoint-3") and "checkpoint-6 is incomplete" in messages[0]
    assert (tmp_path / "incomplete-checkpoint-6" / "optimizer.pt").read_bytes() == b"01234"
    (tmp_path / "checkpoint-3" / MANIFEST).write_text("")  # a power cut
    assert find_checkpoint(str(tmp_path), {"model": "a"}, overwrite=False)[0] is None


def test_another_model_or_other_data_is_refused_and_overwriting_starts_afresh(tmp_path):
    from checkpoint import find_checkpoint

    assert find_checkpoint(str(tmp_path), {"model": "a", "data": "1"}, overwrite=False)[0] is None
    assert json.loads((tmp_path / "run.json").read_text()) == {"model": "a", "data": "1"}
    (tmp_path / "run.json").unlink()
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(UserError, match="holds checkpoints of another program"):
        find_checkpoint(str(tmp_path), {"model": "a", "data": "1"}, overwrite=False)
    (tmp_path / "run.json").write_text('{"model": "a", "data": "1"}')
    with pytest.raises(UserError, match="model was a, is b.*--overwrite_output_dir true"):
        find_checkpoint(str(tmp_path), {"model": "b", "data": "1"}, overwrite=False)
    with pytest.raises(UserError, match="data was 1, is 2"):
        find_checkpoint(str(tmp_path), {"model": "a", "data": "2"}, overwrite=False)
    assert find_checkpoint(str(tmp_path), {"model": "b", "data": "1"}, overwrite=True)[0] is None
    assert not (tmp_path / "checkpoint-3").exists()
    assert find_checkpoint(str(tmp_path), {"model": "a", "data": "1"}, overwrite=False)[0] is None
    (tmp_path / "train_results.json").write_text("{}")  # by --save_strategy no
    with pytest.raises(UserError, match="holds the finished model of another run: model was a, is b"):
        find_checkpoint(str(tmp_path), {"model": "b", "data": "1"}, overwrite=False)
    assert find_checkpoint(str(tmp_path), {"model": "a", "data": "1"}, overwrite=False)[1], "it is finished"
    assert not find_checkpoint(str(tmp_path), {"model": "b", "data": "1"}, overwrite=True)[1]


def test_another_model_in_the_same_folder_is_another_run(tmp_path):
    from checkpoint import hash_model_files

    assert hash_model_files("Qwen/Qwen3-0.6B") == ""
    hashes = set()
    for size, byte in ((10**6, b"a"), (10**6, b"b"), (10**6 + 1, b"b")):
        (tmp_path / "model.safetensors").write_bytes(byte * size)
        hashes.add(hash_model_files(str(tmp_path)))
    assert len(hashes) == 3


def test_a_run_that_stops_early_does_so_after_a_resume_too(tiny_folder, data_file, eval_file, tmp_path, monkeypatch):
    import trainer

    paths = ["--model_name_or_path", tiny_folder, "--data_path", data_file, "--eval_data_path", eval_file]
    flags = "--learning_rate 3e-2 --num_train_epochs 12 --early_stopping_patience 2 --per_device_train_batch_size 8"
    flags += " --logging_steps 1 --save_total_limit 3"

    def run(output, *more):
        train_here(monkeypatch, *paths, "--output_dir", output, *flags.split(), *more)
        return losses(output, "eval_loss")

    expected = run(tmp_path / "whole")
    epochs = len(expected) - 1
    assert expected[-2] > min(expected) < expected[-1] and epochs < 12

    training_step = trainer.SFTTrainer.training_step
    calls = iter(range(100))

    def stop_in_the_last_epoch(self, *args, **kwargs):
        if next(calls) == 4 * (epochs - 1):
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(trainer.SFTTrainer, "training_step", stop_in_the_last_epoch)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    with pytest.raises(UserError, match="another run: learning_rate was 0.03, is 0.02"):
        run(tmp_path / "stopped", "--learning_rate", "2e-2")
    assert run(tmp_path / "stopped") == expected
    assert_goes_straight_to_the_report(lambda: run(tmp_path / "stopped"), tmp_path / "stopped", monkeypatch)
    assert losses(tmp_path / "stopped", "eval_loss") == expected


def assert_goes_straight_to_the_report(run, output: Path, monkeypatch) -> None:
    """Started again as if it had died after its last checkpoint, a run takes no step and leaves the same behind."""
    import trainer

    def state():
        results = json.loads((output / "train_results.json").read_text())
        del results["seconds"], results["tokens_per_second"], results["peak_memory_gb"]
        return results, {path.name for path in output.iterdir()}, load_file(output / "model.safetensors")

    results, files, weights = state()
    (output / "train_results.json").unlink()
    (output / "model.safetensors").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(trainer.SFTTrainer, "training_step", lambda *args, **kwargs: pytest.fail("it trains on"))
        run()
    assert state()[:2] == (results, files)
    assert all(torch.equal(weights[name], weight) for name, weight in state()[2].items())


def test_a_run_that_was_stopped_reports_the_loss_of_all_its_steps(tiny_folder, data_file, tmp_path, monkeypatch):
    import trainer

    paths = ["--model_name_or_path", tiny_folder, "--data_path", data_file]
    # Checkpoints that fall between the points of the loss curve, and an end within an epoch.
    flags = "--max_steps 7 --save_strategy steps --save_steps 3 --logging_steps 4 --lr_scheduler_type constant"

    def run(output):
        train_here(monkeypatch, *paths, "--output_dir", output, *flags.split())
        return json.loads((output / "train_results.json").read_text())["train_loss"]

    step_losses, training_step = [], trainer.SFTTrainer.training_step

    def remember(self, *args, **kwargs):
        step_losses.append(training_step(self, *args, **kwargs).item())
        return torch.tensor(step_losses[-1])

    with monkeypatch.context() as patch:
        patch.setattr(trainer.SFTTrainer, "training_step", remember)
        expected = run(tmp_path / "whole")
    assert expected == pytest.approx(sum(step_losses) / 7, rel=1e-6)

    calls = iter(range(100))

    def stop_in_step_6(self, *args, **kwargs):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(trainer.SFTTrainer, "training_step", stop_in_step_6)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    assert run(tmp_path / "stopped") == expected
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert_goes_straight_to_the_report(lambda: run(tmp_path / "stopped"), tmp_path / "stopped", monkeypatch)
    mode = (tmp_path / "whole" / "train_results.json").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "whole").rglob("model.safetensors")} == {mode}


def test_a_full_disk_and_a_missing_permission_are_said_in_one_line(tmp_path):
    from safetensors import SafetensorError

    from checkpoint import explain_write_errors, lock_output_dir

    def fail(error):
        with explain_write_errors("output"):
            raise error

    full = r"output: No space left on device\. Free some space and start again"
    with pytest.raises(UserError, match=full):
        fail(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    with pytest.raises(UserError, match=full), explain_write_errors("output"):
        torch.save(torch.zeros(10**6), "/dev/full")
    with pytest.raises(UserError, match=full), explain_write_errors("output"), open("/dev/full", "w") as file:
        file.write("0")
    with pytest.raises(UserError, match=r"a/b: Read-only file system\. Change its permissions, or give --output_dir"):
        fail(OSError(errno.EROFS, "Read-only file system", "a/b"))
    with pytest.raises(UserError, match="another process of this run has ended"):
        fail(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:17641"))
    with pytest.raises(RuntimeError, match="Reader"):  # a file that is broken, not a disk that is full
        (tmp_path / "broken.pt").write_bytes(b"PK")
        fail(RuntimeError("[enforce fail at inline_container.cc:145] . PytorchStreamReader failed reading zip archive"))
    with pytest.raises(UserError, match=r"can't be written to \(Not a directory\)\. Give another --output_dir"):
        lock_output_dir(str(tmp_path / "broken.pt" / "output"))


@pytest.mark.parametrize("is_made_again", [False, True])
def test_a_folder_that_is_removed_ends_the_run_at_the_next_checkpoint(
    is_made_again, tiny_folder, data_file, tmp_path, monkeypatch
):
    import trainer
    from checkpoint import find_checkpoint, lock_output_dir

    output, training_step = tmp_path / "output", trainer.SFTTrainer.training_step

    def remove(self, *args, **kwargs):
        shutil.rmtree(output, ignore_errors=True)
        if is_made_again:  # by another run
            lock_output_dir(str(output)).close()
            find_checkpoint(str(output), {"model": "another"}, overwrite=False)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(trainer.SFTTrainer, "training_step", remove)
    paths = ["--model_name_or_path", tiny_folder, "--data_path", data_file, "--output_dir", output]
    with pytest.raises(UserError, match="output: was removed while the run went on"):
        train_here(monkeypatch, *paths, "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1")
    assert not list(tmp_path.glob("output/checkpoint-*"))


def test_a_run_that_came_to_its_end_is_left_as_it_is(tiny_folder, data_file, tmp_path, monkeypatch, capsys):
    paths = ["--model_name_or_path", tiny_folder, "--data_path", data_file, "--output_dir", tmp_path]
    train_here(monkeypatch, *paths, "--max_steps", "2")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir() if file.name != ".lock"}
    train_here(monkeypatch, *paths, "--max_steps", "2")
    assert "nothing is left to train" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir() if file.name != ".lock"}
    train_here(monkeypatch, *paths, "--max_steps", "2", "--overwrite_output_dir", "true")
    assert (tmp_path / "train_results.json").stat().st_mtime_ns > before[tmp_path / "train_results.json"]


def test_a_user_s_own_copies_and_the_best_checkpoint_outlive_the_rotation(tmp_path):
    from checkpoint import seal_checkpoint

    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "incomplete-checkpoint-10").mkdir()
    for step in (10, 20, 30, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        best = tmp_path / "checkpoint-20" if step > 10 else None
        seal_checkpoint(tmp_path / f"checkpoint-{step}", save_total_limit=2, best=best)
        assert (tmp_path / "incomplete-checkpoint-10").exists() == (step == 10)  # there was room for it
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-best", "checkpoint-20", "checkpoint-100"}
