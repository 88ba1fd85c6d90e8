"""Checks that need a GPU: python -m pytest tests/gpu. Where there is none they are skipped."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path += [str(ROOT / "train_qwen" / "tests"), str(ROOT / "train_qwen"), str(ROOT / "benchmarks")]


@pytest.fixture(scope="session")
def device() -> str:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    return "cuda"
