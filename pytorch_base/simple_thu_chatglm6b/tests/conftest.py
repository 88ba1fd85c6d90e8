"""Runs of train.py, in this process or by torchrun, on a tiny model and a handful of conversations."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parent.parent
sys.path.insert(0, str(RECIPE))
os.environ.setdefault("OMP_NUM_THREADS", "1")

WORDS = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳"


def make_conversations(count: int, seed: int = 0) -> list[dict]:
    """Conversations of 1 to 3 exchanges and 5 to 60 characters a message; every third has a system message."""
    rng = random.Random(seed)

    def say():
        return "".join(rng.choices(WORDS, k=rng.randint(5, 60)))

    rows = []
    for index in range(count):
        messages = [{"role": "system", "content": say()}] if index % 3 == 0 else []
        for _ in range(rng.randint(1, 3)):
            messages += [{"role": "user", "content": say()}, {"role": "assistant", "content": say()}]
        rows.append({"messages": messages})
    return rows


def write_rows(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def tiny_glm(tmp_path_factory) -> str:
    """A saved tiny GLM-4 with its tokenizer."""
    from model import build_tiny_glm

    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_glm([message["content"] for row in make_conversations(50) for message in row["messages"]], str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def glm_tokenizer(tiny_glm):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_glm)


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> str:
    """25 training rows: with 8 rows a step the last step has a single one, so that a second rank has none."""
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", make_conversations(25))


@pytest.fixture(scope="session")
def eval_file(tmp_path_factory) -> str:
    """A single held-out row, so that a second rank has none."""
    return write_rows(tmp_path_factory.mktemp("data") / "eval.jsonl", make_conversations(1, seed=1))


def read_history(output_dir) -> list[dict]:
    return json.loads(Path(output_dir, "trainer_state.json").read_text())["log_history"]


def losses(output_dir, key: str = "loss") -> list[float]:
    return [entry[key] for entry in read_history(output_dir) if key in entry]


def train_here(monkeypatch, *flags) -> None:
    """train.main() in this process on the CPU; Accelerate's process-wide state is taken down afterwards."""
    from accelerate.state import AcceleratorState, GradientState

    import train

    monkeypatch.setattr(sys, "argv", ["train.py", "--use_cpu", "true", *map(str, flags)])
    try:
        train.main()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def train_command(*flags, processes: int = 1) -> list[str]:
    launch = [sys.executable]
    if processes > 1:
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    return [*launch, "train.py", "--use_cpu", "true", *map(str, flags)]


def run_train(*flags, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    """train.py in processes of its own."""
    result = subprocess.run(
        train_command(*flags, processes=processes), cwd=RECIPE, capture_output=True, text=True, timeout=180
    )
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result
