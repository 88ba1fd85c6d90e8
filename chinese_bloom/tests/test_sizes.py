"""A round over several sizes: the way of ZeRO by the memory, one run after the other, and the table at the end.

Fake scripts stand for the training, and a fake torch for the cards: what is tested is the round.
"""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from ranks import RECIPE

from sizes import SIZES, choose, read_sizes

TRAIN = """
echo "$0 MODEL=$MODEL DATA=${DATA:-} flags=$*"
if [[ "$OUTPUT" == *"/${FAILS:-none}" ]]; then
    printf " 1%% [0s]error: my_data: no such file.\\n"
    echo "torchrun's own"
    exit 3
fi
if [[ "$OUTPUT" == *"/${HANGS:-none}" ]]; then echo hangs; sleep 60; fi
if [[ -e $OUTPUT/train_results.json ]]; then echo "nothing is left to train: ..."; exit; fi
cat > $OUTPUT/train_results.json <<END
{"eval_loss_before": 5.25, "eval_loss_after": 4.5, "tokens_per_second": 1234.5, "peak_memory_gb": 1.5, "seconds": 90}
END
"""
TINY = """import pathlib, sys
print("tiny.py", *sys.argv[1:])
pathlib.Path(sys.argv[1]).mkdir(exist_ok=True)
"""
TORCH = """import os, types
get_device_properties = lambda index: types.SimpleNamespace(total_memory=float(os.environ["CARD_GB"]) * 1e9)
cuda = types.SimpleNamespace(device_count=lambda: int(os.environ["CARDS"]), get_device_properties=get_device_properties)
"""


@pytest.fixture
def recipe(tmp_path):
    folder = tmp_path / "recipe"
    folder.mkdir()
    for name in ("ds_all.sh", "sizes.py"):
        shutil.copy(RECIPE / name, folder)
    for name, text in {"train_zero2.sh": TRAIN, "train_zero3.sh": TRAIN, "tiny.py": TINY, "torch.py": TORCH}.items():
        (folder / name).write_text(text)
    return folder


def start(recipe, *flags, cards: int = 0, card_gb: float = 24, **variables) -> subprocess.Popen:
    """ds_all.sh, called from the folder above; what it prints can be read."""
    variables = {"OUTPUTS": "runs", "CARDS": str(cards), "CARD_GB": str(card_gb)} | variables
    return subprocess.Popen(
        ["bash", f"{recipe}/ds_all.sh", *flags],
        cwd=recipe.parent,
        env={name: value for name, value in (os.environ | variables).items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a suite that was started in the background ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def run_round(recipe, *flags, status: int = 0, **options) -> tuple[str, list[dict]]:
    """What the round prints, and the rows of sizes.json."""
    process = start(recipe, *flags, **options)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == status, printed
    table = recipe.parent / "runs/sizes.json"
    return printed, json.loads(table.read_text()) if table.exists() else []


@pytest.mark.parametrize(
    ("size", "cards", "card_gb", "host_gb", "script", "config", "reason"),
    [
        # 2 x 0.559 + 18 x 0.559 = 11.2
        ("560m", 1, 24, 256, 2, "no_offload", "ZeRO-2, which needs 11.2 GB of a card that has 24.0"),
        # 20 x 1.065 = 21.3 and 18 x 1.065 + 4.1 = 23.3, of which 19.2 may be used; 4 x 1.065 on the card
        (
            "1b1",
            1,
            24,
            256,
            2,
            "offload",
            "ZeRO-2 + offload, since ZeRO-2 needs 21.3 GB, ZeRO-3 needs 23.3 GB of a card",
        ),
        # 20 x 3.003 = 60.1
        ("3b", 1, 80, 256, 2, "no_offload", "ZeRO-2, which needs 60.1 GB of a card that has 80.0"),
        # 2 x 7.069 + 18 x 7.069 / 8 = 30.0
        ("7b1", 8, 80, 1000, 2, "no_offload", "ZeRO-2, which needs 30.0 GB of a card that has 80.0"),
        # 14.1 + 31.8 = 45.9; 31.8 + 4.1 = 35.9 of 38.4
        ("7b1", 4, 48, 1000, 3, "no_offload", "ZeRO-3, since ZeRO-2 needs 45.9 GB of a card that has 48.0"),
        # 4 x 7.069 = 28.3 on the card are too much with one, (2 + 2 / 4) x 7.069 = 17.7 are not with four
        (
            "7b1",
            1,
            24,
            256,
            3,
            "offload",
            "ZeRO-3 + offload, since ZeRO-2 needs 141.4 GB, ZeRO-3 needs 131.3 GB, ZeRO-2",
        ),
        (
            "7b1",
            4,
            24,
            256,
            2,
            "offload",
            "ZeRO-2 + offload, since ZeRO-2 needs 45.9 GB, ZeRO-3 needs 35.9 GB of a card",
        ),
        # 26 + 29.25 = 55.2; 29.25 + 4.1 = 33.4
        ("13b", 8, 80, 1000, 2, "no_offload", "ZeRO-2, which needs 55.2 GB of a card that has 80.0"),
        ("13b", 8, 48, 1000, 3, "no_offload", "ZeRO-3, since ZeRO-2 needs 55.2 GB of a card that has 48.0"),
        # 18 x 13 = 234 of 204.8 in the host
        ("13b", 1, 24, 256, 3, "offload", "ZeRO-3 + offload, though nothing is sure to fit: ZeRO-2 needs 260.0 GB"),
    ],
)
def test_the_first_way_that_fits_is_taken(size, cards, card_gb, host_gb, script, config, reason):
    found = choose(SIZES[size][0], cards, card_gb, host_gb)
    assert found[:2] == (f"train_zero{script}.sh", f"ds_zero{script}_{config}.json")
    assert found[2].startswith(reason)
    assert (RECIPE / found[0]).exists() and (RECIPE / found[1]).exists()


def test_the_host_must_hold_what_is_offloaded():
    assert choose(3e9, 1, 24, 48)[2] == (
        "ZeRO-3 + offload, though nothing is sure to fit: ZeRO-2 needs 60.0 GB, ZeRO-3 needs 58.1 GB of a card that "
        "has 24.0; ZeRO-2 + offload needs 48.0 GB, ZeRO-3 + offload needs 54.0 GB of a host that has 48.0"
    )


@pytest.mark.parametrize("size", SIZES)
def test_more_memory_never_means_a_later_way(size):
    order = ["ds_zero2_no_offload.json", "ds_zero3_no_offload.json", "ds_zero2_offload.json", "ds_zero3_offload.json"]
    ways = [order.index(choose(SIZES[size][0], 8, card_gb, 4000)[1]) for card_gb in range(1, 200)]
    assert ways == sorted(ways, reverse=True) and (ways[0], ways[-1]) == (3, 0)


def test_an_unknown_size_is_refused_before_anything_runs(recipe):
    printed, _ = run_round(recipe, status=1, SIZES="560m 5b")
    assert printed.splitlines()[-1] == "error: SIZES: 5b: known are 560m 1b1 1b7 3b 7b1 13b, with a space between two."
    assert not (recipe.parent / "runs").exists()


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("SIZES", "560m,3b", "error: SIZES: 560m,3b: known are"),
        ("MODEL", "my_model", "error: MODEL is of a single run. Unset it; here MODELS names the folder of all."),
        ("OUTPUT", "my_run", "error: OUTPUT is of a single run. Unset it; here OUTPUTS names the folder of all."),
    ],
)
def test_variables_that_cannot_be_meant(monkeypatch, name, value, error):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=error):
        read_sizes()


def test_without_a_gpu_all_sizes_are_tiny_ones(recipe):
    (recipe.parent / "my_data").mkdir()
    printed, rows = run_round(recipe, "--seed", "7", DATA="my_data")
    assert [row["size"] for row in rows] == ["560m", "1b1", "1b7", "3b", "7b1", "13b"]
    assert {row["status"] for row in rows} == {"trained"}
    assert [row["way"] for row in rows] == ["ZeRO-2"] * 4 + [
        "ZeRO-3"
    ] * 2  # what runs here: there is nothing to offload
    assert "7b1: ZeRO-3 + offload, since ZeRO-2 needs 141.4 GB" in printed
    tiny, data = f"{recipe.parent}/runs/7b1/tiny", f"{recipe.parent}/my_data"
    assert (recipe.parent / "runs/7b1/run.log").read_text().splitlines() == [
        f"tiny.py {tiny} --hidden_size 128 --num_hidden_layers 2 --data_path {data}",
        f"train_zero3.sh MODEL={tiny} DATA={data} flags=--max_steps 20 --save_strategy no --learning_rate 2e-3 "
        "--adam_beta2 0.95 --seed 7",
    ]
    table = printed.splitlines()[-8:-1]
    assert " ".join(table[0].split()) == "size way loss before -> after tokens/s memory GB minutes status"
    assert " ".join(table[1].split()) == "560m ZeRO-2 5.25 4.50 1,234.50 1.50 1.50 trained"

    printed, rows = run_round(recipe, SIZES="3b")
    assert rows[0]["status"] == "was finished" and rows[0]["eval_loss_after"] == 4.5


def test_models_of_a_folder_and_what_is_missing_there(recipe):
    (recipe.parent / "my_models/bloom-560m").mkdir(parents=True)
    (recipe.parent / "my_models/bloom-560m/config.json").touch()
    (recipe.parent / "my_models/bloom-1b1").mkdir()
    printed, rows = run_round(recipe, MODELS="my_models", SIZES="1b1 560m 13b", cards=2, card_gb=24)
    assert rows[0] == {"size": "1b1", "status": f"missing: {recipe.parent}/my_models/bloom-1b1/config.json"}
    assert rows[1]["status"] == "trained" and rows[1]["way"] == "ZeRO-2"
    assert rows[2]["status"].endswith("bloom-13b/config.json")
    flags = f"MODEL={recipe.parent}/my_models/bloom-560m DATA= flags=--deepspeed ds_zero2_no_offload.json\n"
    assert flags in printed
    assert "memory: 2 x 24.0 GB" in printed


def test_models_of_the_hub_and_an_own_13b(recipe):
    printed, _ = run_round(recipe, SIZES="3b", cards=1, card_gb=8)  # which needs at least ZeRO-3, whatever the host has
    assert "train_zero3.sh MODEL=bigscience/bloom-3b DATA= flags=--deepspeed ds_zero3_offload.json" in printed
    _, rows = run_round(recipe, SIZES="13b", cards=1, status=1)  # since nothing was trained
    assert rows == [{"size": "13b", "status": "missing: BLOOM has no 13b; MODEL_13B names a folder"}]
    (recipe.parent / "my_13b").mkdir()
    (recipe.parent / "my_13b/config.json").touch()
    printed, rows = run_round(recipe, SIZES="13b", MODEL_13B="my_13b", cards=8, card_gb=80)
    assert f"MODEL={recipe.parent}/my_13b" in printed and rows[0]["status"] == "trained"


def test_a_run_that_fails_does_not_stop_the_others(recipe):
    printed, rows = run_round(recipe, SIZES="560m 1b1 3b", FAILS="1b1", status=1)
    assert [row["status"] for row in rows] == ["trained", "failed (exit 3): my_data: no such file.", "trained"]
    assert "eval_loss_after" not in rows[1]
    assert "torchrun's own" in printed and "torchrun's own" in (recipe.parent / "runs/1b1/run.log").read_text()


def test_ctrl_c_ends_the_run_and_shows_the_table_so_far(recipe):
    process = start(recipe, SIZES="560m 1b1 3b", HANGS="1b1")
    begin, printed = time.monotonic(), ""
    while not printed.endswith("hangs\n"):
        printed += process.stdout.readline()
        assert process.poll() is None, printed
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and time.monotonic() - begin < 30
    rows = json.loads((recipe.parent / "runs/sizes.json").read_text())
    assert [row["status"] for row in rows] == ["trained", "interrupted"]
    assert printed.splitlines()[-2].split() == ["1b1", "ZeRO-2", "interrupted"]
