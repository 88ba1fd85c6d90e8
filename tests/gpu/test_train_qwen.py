"""train_qwen on a GPU: the losses of the CPU in every way, a resumed run bit for bit, the estimated memory."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SECONDS = 300  # for one run; the first one with DeepSpeed builds its operators
FLAGS = "--max_steps 5 --logging_steps 1 --learning_rate 1e-3 --lr_scheduler_type constant --validation_split 0"
FLAGS += " --save_strategy no --per_device_train_batch_size 4"
WAYS = {
    "plain": "",
    "sdpa": "--attn_implementation sdpa",
    "packing": "--packing true --model_max_length 512",
    "gradient checkpointing": "--gradient_checkpointing true",
    "LoRA": "--use_lora true --lora_dropout 0",
    "ZeRO-2": "--deepspeed ds_zero2_no_offload.json",
    "ZeRO-3": "--deepspeed ds_zero3_no_offload.json",
    "Liger": "--use_liger_kernel true",
}
SAME_AS_PLAIN = ("ZeRO-2", "ZeRO-3", "Liger")  # whose losses are the plain run's
TOLERANCES = {"fp32": 1e-4, "bf16": 1e-2}
RESUMED = "--max_steps 12 --save_strategy steps --save_steps 4 --full_determinism true --bf16 true"


def run_train(device: str, output: Path, flags: list[str], script: str | None = None) -> list[float]:
    """The losses of the tiny default's steps; `script` launches it by torchrun, as DeepSpeed needs it."""
    from ranks import Run, losses, start_script

    if script:
        process = start_script(script, output, *flags, NPROC="1")
        printed, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, printed[-5000:]
    else:
        run = Run([*["--use_cpu", "true"] * (device == "cpu"), "--output_dir", str(output), *flags], 1)
        assert run.wait(SECONDS) == 0, run.printed()[-5000:]
    return losses(output)


def run_way(way: str, device: str, precision: str, output: Path) -> list[float]:
    flags = [*FLAGS.split(), *WAYS[way].split(), "--bf16", "true" if precision == "bf16" else "false"]
    return run_train(device, output, flags, f"train_zero{way[-1]}.sh" if way.startswith("ZeRO") else None)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Way -> its losses on the CPU in fp32."""

    @cache
    def losses_of(way: str) -> list[float]:
        return run_way(way, "cpu", "fp32", tmp_path_factory.mktemp("cpu"))

    return lambda way: losses_of("plain" if way in SAME_AS_PLAIN else way)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("way", WAYS)
def test_the_losses_are_those_of_the_cpu(way, precision, device, expected, tmp_path):
    if way == "Liger":
        pytest.importorskip("liger_kernel")
    found = run_way(way, device, precision, tmp_path)
    assert len(found) == 5
    assert found[0] == pytest.approx(expected(way)[0], rel=TOLERANCES[precision])
    # Rounding grows from step to step.
    assert found == pytest.approx(expected(way), rel=10 * TOLERANCES[precision])


def test_a_killed_run_ends_like_one_that_was_never_stopped(device, tmp_path):
    import torch
    from ranks import Run
    from test_resume import final_state, kill_when

    def flags(output: Path) -> list[str]:
        place = ["--use_cpu", "true"] * (device == "cpu") + ["--output_dir", str(output)]
        return [*place, *FLAGS.split(), *RESUMED.split()]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run = Run(flags(whole), 1)
    assert run.wait(SECONDS) == 0, run.printed()[-5000:]
    kill_when(Run(flags(killed), 1), (killed / "checkpoint-8" / "manifest.json").exists)
    run = Run(flags(killed), 1)
    assert run.wait(SECONDS) == 0, run.printed()[-5000:]
    assert "resuming from" in run.printed()
    expected, resumed = final_state(whole), final_state(killed)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def estimate_benchmark(way: str, shape: str, batch_size: int) -> float:
    """What train_qwen's --estimate says of a run of benchmarks/bench_sft.py, GB."""
    from datasets import Dataset
    from transformers import Qwen2Config

    from arguments import ModelArguments
    from bench_sft import SHAPES, make_rows
    from fast_path import FastPath
    from memory import Plan, estimate

    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    names += ["vocab_size", "tie_word_embeddings"]
    plan = Plan(ModelArguments(), batch_size=batch_size, epochs=2)
    if way.endswith("packing"):
        plan = Plan(ModelArguments(), batch_size=batch_size // 4, packing=2048, epochs=2)
    config = Qwen2Config(**dict(zip(names, SHAPES[shape], strict=True)))
    return estimate(config, Dataset.from_list(make_rows("cuda")), plan, FastPath).peak / 1e9


@pytest.mark.parametrize("way", ["train_qwen", "train_qwen packing"])
def test_the_estimated_memory_is_what_a_run_takes(way, device):
    script = [sys.executable, ROOT / "benchmarks" / "bench_sft.py", "--way", way, "--batch_sizes", "8"]
    command = [*script, "--device", device, "--model", "0.5b"]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured = json.loads(printed.splitlines()[-1])["memory_gb"]
    assert estimate_benchmark(way, "0.5b", 8) == pytest.approx(measured, rel=0.15)
