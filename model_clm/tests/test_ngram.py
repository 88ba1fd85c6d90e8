"""Counted n-grams are probabilities, equal to a plain loop's, and help a network."""

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import VALIDATION
from ngram import KneserNey, compare, main, network_probabilities
from windows import ValidationRows


def test_the_probabilities_are_those_of_the_plain_recursion():
    rng = np.random.default_rng(0)
    text, vocab_size, order = rng.integers(0, 5, 60), 7, 3
    model = KneserNey(text, vocab_size, order)
    full = {size: {tuple(text[i : i + size]) for i in range(61 - size)} for size in range(1, order + 1)}
    counts = {order: Counter(tuple(text[i : i + order]) for i in range(61 - order))}
    for size in range(1, order):
        counts[size] = Counter(gram[1:] for gram in full[size + 1])

    def probability(context: tuple, token: int) -> float:
        size = len(context) + 1
        lower = probability(context[1:], token) if context else 1 / vocab_size
        after = {gram[-1]: count for gram, count in counts[size].items() if gram[:-1] == context}
        if not after:
            return lower
        once, twice = (sum(count == n for count in counts[size].values()) for n in (1, 2))
        discount = once / max(once + 2 * twice, 1)
        backed = max(after.get(token, 0) - discount, 0) + discount * len(after) * lower
        return backed / sum(after.values())

    held_out = rng.integers(0, 7, 30)
    found = model.probabilities(held_out)
    padded = [held_out[0]] * (order - 1) + held_out.tolist()
    for place in range(1, 30):
        context = tuple(padded[place : place + order - 1])
        assert found[place - 1] == pytest.approx(probability(context, held_out[place]), rel=1e-9)
        total = sum(probability(context, token) for token in range(vocab_size))
        assert total == pytest.approx(1, rel=1e-9)


def test_many_tokens_lower_the_order():
    assert KneserNey(np.arange(100), 8000).order == 4 and KneserNey(np.arange(100), 150_000).order == 3


def test_a_network_and_the_n_grams_are_measured_on_the_same_tokens(scratch_folder, prepared, capsys):
    model = AutoModelForCausalLM.from_pretrained(scratch_folder).eval()
    rows = ValidationRows(f"{prepared}/validation", 24, "news")
    assert len(network_probabilities(model, rows)) == sum(map(len, VALIDATION["news"]))
    found = compare(model, prepared, 24)
    assert list(found) == ["news", "idioms"]
    for of_source in found.values():
        assert of_source["mixed"] < of_source["network"] and of_source["ngrams"] < of_source["network"]
    with torch.no_grad():
        main([scratch_folder, prepared, "--stride", "8"])
    assert "news: bits per byte: ngrams" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--stride 64: from 1 to 63"):
        main([scratch_folder, prepared, "--stride", "64"])
