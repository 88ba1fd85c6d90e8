"""The launch scripts as a user types them, by bash and the real torchrun."""

import shutil

from ranks import losses, start_script

from conftest import TINY

SHORT = ["--max_steps", "2", "--save_strategy", "no", "--logging_steps", "1", "--samples", "0"]


def test_the_old_name_hands_over_and_relative_paths_are_the_caller_s(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "my prepared")
    run = start_script("base_run.sh", "my output", *TINY.split(), *SHORT, folder=tmp_path, DATA="my prepared")
    screen, _ = run.communicate(timeout=170)
    assert run.returncode == 0, screen[-3000:]
    assert "base_run.sh is now train_zero2.sh" in screen and "--deepspeed ds_zero2_no_offload.json" in screen
    [before, after] = losses(tmp_path / "my output", "eval_bits_per_byte")
    assert before != after
    assert {path.name for path in tmp_path.iterdir()} == {"my prepared", "my output"}
