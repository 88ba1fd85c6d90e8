"""Families of causal models through train_qwen: those that most people know, or that stand for a mechanism."""

import pytest

from check_families import check_family
from families import KNOWN


@pytest.mark.parametrize("family", KNOWN)
def test_one_step_adapters_and_saving(family):
    check_family(family)
