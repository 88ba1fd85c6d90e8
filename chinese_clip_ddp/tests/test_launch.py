"""The launch scripts as a user types them: by bash and the real torchrun, from any folder."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from ranks import RECIPE, losses, start_script

SHORT = ["--max_steps", "2", "--save_strategy", "no", "--logging_steps", "1", "--eval_on_start", "false"]


def test_all_ways_from_any_folder_end_in_one_picture(levit_folder, data_file, tmp_path):
    shutil.copytree(Path(data_file).parent, tmp_path / "my pairs")
    shutil.copytree(levit_folder, tmp_path / "my_model")
    variables = {"DATA": "my pairs", "MODEL": "my_model", "MODES": "custom"}
    run = start_script("train_ddp_ti_all.sh", "my output", *SHORT, folder=tmp_path, **variables)
    screen, _ = run.communicate(timeout=300)
    assert run.returncode == 0, screen[-3000:]
    assert "of 64 pairs x 2 processes" in screen and "--cross_embedding custom" in screen
    assert len(losses(tmp_path / "my output" / "custom")) == 2
    assert (tmp_path / "my output" / "compare.png").exists() and "compare.png" in screen.splitlines()[-1]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("train.sh", "--nproc_per_node 1"),
        ("train_ddp_text_image.sh", "--nproc_per_node 2"),
        ("train_zero2.sh", "--deepspeed ds_zero2_no_offload.json"),
        ("train_zero3.sh", "--deepspeed ds_zero3_no_offload.json"),
    ],
)
def test_what_a_script_runs(script, expected, tmp_path):
    """By a python that says what it was asked for: without a GPU, and of each script the same settings."""
    (tmp_path / "python").write_text('#!/bin/sh\n[ "$1" = -c ] && echo 0 || printf "%s\\n" "$*"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("MODEL", "DATA", "OUTPUT")}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def command(*flags, **variables) -> str:
        run = subprocess.run(
            ["bash", f"{RECIPE}/{script}", *flags],
            cwd=tmp_path,
            env=environment | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        return run.stdout.strip()

    made, default = command("--seed", "7").splitlines()
    assert made == "data01_scenes.py" and default.endswith("--seed 7") and expected in default
    assert "--data_path cache_data/scenes " in default and "--model_name_or_path" not in default
    processes, batch = (
        int(re.search(rf"--{flag} (\d+)", default)[1]) for flag in ("nproc_per_node", "per_device_train_batch_size")
    )
    assert processes * batch == int(re.search(r"\(\(\((\d+) \+ nproc", (RECIPE / script).read_text())[1])
    own = command(DATA="my", MODEL="org/clip", OUTPUT="out")
    assert f"--model_name_or_path org/clip --data_path my --output_dir {tmp_path}/out " in own
    assert "--learning_rate 1e-5" in own and "scenes" not in own
    both = shlex.split("--text_model_name_or_path bge --image_model_name_or_path vit")
    assert "--learning_rate 1e-5" in command(*both, DATA="my")
