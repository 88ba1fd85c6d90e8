"""The launch scripts as a user types them: by bash and the real torchrun, from any folder."""

import json
import os
import shutil
import subprocess

import pytest
from ranks import RECIPE, losses, read_history


def shorten(file, **changed: str) -> None:
    """Replaces pieces of a file's text, each of which is there once."""
    text = file.read_text("utf-8")
    for old, new in changed.items():
        old = old.replace("__", " = ")
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file.write_text(text, "utf-8")


def test_the_default_shortened_learns_in_two_stages_and_is_asked(tmp_path):
    """The recipe in a folder of its own: 320 scenes, 20 steps for the tower, 8 and 30 for the stages."""
    folder = tmp_path / "my recipe"
    shutil.copytree(RECIPE, folder, ignore=shutil.ignore_patterns("cache_data", "output*", "tests", "*.ipynb"))
    shorten(folder / "scenes.py", **{"    size__len(scenes) // 10": "    scenes, size = scenes[:320], 20"})
    shorten(folder / "data01_scenes.py", **{"VIEWS, EVAL_VIEWS__6, 2": "VIEWS, EVAL_VIEWS = 1, 1"})
    shorten(
        folder / "data01_scenes.py", **{"range(0x1F32D, 0x1F380), range(0x1F400, 0x1F440)": "range(0x1F42D, 0x1F432)"}
    )
    shorten(folder / "pretrain_tower.py", **{"WARMUP_STEPS__1300": "WARMUP_STEPS = 20"})
    shorten(folder / "train.sh", **{"--max_steps 60": "--max_steps 8", "--num_train_epochs 3": "--max_steps 30"})
    environment = {name: value for name, value in os.environ.items() if name not in ("MODEL", "DATA", "OUTPUT")}
    flags = ["--logging_steps", "4", "--save_strategy", "no"]
    run = subprocess.run(
        ["bash", folder / "train.sh", *flags],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    assert "train.py" in run.stderr and "--train_type projector" in run.stderr  # what runs is printed
    output = folder / "output"
    results = json.loads((output / "scenes_results.json").read_text())
    assert set(results["seen"]) - set(results["blind"]) == {"description", "emoji"}
    table = run.stdout.splitlines()[-9:]
    assert table[0].split() == ["right,", "word", "for", "word", "seen", "blind"] and table[-1].split()[0] == "emoji"
    assert losses(output)[-1] < 0.6 * losses(output)[0]
    before, *_, after = losses(output, "eval_loss")
    assert after < 0.6 * before and len(losses(output / "stage1")) == 2
    assert all("eval_loss_exchanged" in entry for entry in read_history(output) if "eval_loss" in entry)


@pytest.fixture
def command(tmp_path):
    """The commands that a script runs, by a python that says what it was asked for; without a GPU."""
    (tmp_path / "python").write_text('#!/bin/sh\n[ "$1" = -c ] && echo 0 || printf "%s\\n" "$*"\n')
    (tmp_path / "python").chmod(0o755)
    unset = ("MODEL", "DATA", "OUTPUT", "VISION", "TEXT", "CAPTIONS", "NPROC")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"

    def run(script: str, *flags: str, status: int = 0, **variables: str) -> list[str]:
        done = subprocess.run(
            ["bash", f"{RECIPE}/{script}", *flags],
            cwd=tmp_path,
            env=environment | variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr
        return (done.stdout if status == 0 else done.stderr).strip().splitlines()

    return run


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("train.sh", "--nproc_per_node 1"),
        ("train_zero2.sh", "--deepspeed ds_zero2_no_offload.json"),
        ("train_zero3.sh", "--deepspeed ds_zero3_no_offload.json"),
    ],
)
def test_what_a_script_runs(script, expected, command, tmp_path):
    made, first, second, asked = command(script, "--seed", "7")
    assert made == "data01_scenes.py" and asked.startswith("evaluate_scenes.py ")
    for line in (first, second):
        assert expected in line and "--eval_data_path cache_data/scenes_eval --data_path cache_data/scenes " in line
        assert " --seed 7" in line
    assert "--model_name_or_path tiny" in first and first.endswith("--train_type projector")
    output = first.split("--output_dir ")[1].split()[0]
    assert f"--model_name_or_path {output} " in second and "--train_type freeze_vision" in second
    processes = 1 if script == "train.sh" else 2
    assert f"--per_device_train_batch_size {16 // processes} " in first
    (own,) = command(script, "--train_type", "none", DATA="my", MODEL="org/llava", OUTPUT="out")
    assert "--data_path my --model_name_or_path org/llava " in own and f"--output_dir {tmp_path}/out " in own
    assert own.endswith("--train_type none") and "scenes" not in own
    adapters = ["--train_type", "use_lora", "--target_modules", "q_proj", "v_proj", "--lora_r", "16"]
    _, first, second, _ = command(script, *adapters, "--seed", "7")
    assert "lora" not in first and "q_proj" not in first and first.endswith("--seed 7 --train_type projector")
    assert second.endswith(" ".join([*adapters, "--seed 7"]))
    assert "by OUTPUT=" in command(script, "--output_dir", "x", status=1)[-1]


def test_both_stages_of_real_models(command, tmp_path):
    (tmp_path / "clip").mkdir()
    parts = {"VISION": "clip", "TEXT": "org/qwen", "DATA": "my", "CAPTIONS": "some", "OUTPUT": "out"}
    built, said, first, _, second = command("train_stages.sh", "--train_type", "use_lora", **parts)
    assert said == "stage 1 of 2: train.py --train_type projector"
    assert built == f"build_model.py {tmp_path}/clip org/qwen {tmp_path}/out/built"
    assert "--data_path some" in first and first.endswith("--per_device_train_batch_size 16")
    for line, model, output in ((first, "built", "stage1"), (second, "stage1", "stage2")):
        assert f"--model_name_or_path {tmp_path}/out/{model} " in line
        assert f"--output_dir {tmp_path}/out/{output} " in line
    assert "--data_path my" in second and second.endswith("--train_type use_lora")
    common = "--image_aspect_ratio crop --skip_bad_rows true"
    said, first, _, second = command(
        "train_stages.sh", *common.split(), STAGE1="--max_steps 5", DATA="my", MODEL="org/llava"
    )
    assert first.endswith(f"--per_device_train_batch_size 16 --max_steps 5 {common}") and second.endswith(common)
    (tmp_path / "out/built").mkdir()  # as the first command has left it
    assert len(command("train_stages.sh", **parts)) == 4
    assert "built of other parts" in command("train_stages.sh", status=1, **parts | {"TEXT": "org/other"})[-1]
    assert "VISION and TEXT, or MODEL" in command("train_stages.sh", status=1, DATA="my", TEXT="org/qwen")[-1]
