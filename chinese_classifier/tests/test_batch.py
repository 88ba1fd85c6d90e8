"""Examples are assigned by tokens: each once, hardly any padding, the same steps however many ranks there are."""

import numpy as np
import pandas as pd
import pytest

import data
from batch import TokenBudgetSampler, collate_padded, cut_by_tokens


def all_ranks(lengths, batch_size, accumulation, num_ranks, **options) -> list[list[list[int]]]:
    ranks = range(num_ranks)
    return [
        list(TokenBudgetSampler(lengths, batch_size, accumulation, num_ranks, rank, 0, **options)) for rank in ranks
    ]


@pytest.mark.parametrize(("batch_size", "accumulation", "num_ranks"), [(12, 1, 1), (6, 2, 1), (3, 2, 2), (1, 1, 12)])
def test_steps_depend_on_the_rows_of_a_step_alone(batch_size, accumulation, num_ranks):
    lengths = np.random.default_rng(0).integers(1, 200, 500)
    ranks = all_ranks(lengths, batch_size, accumulation, num_ranks)
    assert sorted(row for rank in ranks for batch in rank for row in batch) == list(range(500))
    assert {len(rank) for rank in ranks} == {accumulation * -(-500 // 12)}
    batches = [batch for turn in zip(*ranks, strict=True) for batch in turn]
    size = accumulation * num_ranks
    steps = [sorted(sum(batches[i : i + size], [])) for i in range(0, len(batches), size)]
    assert steps == [sorted(step) for step in all_ranks(lengths, 12, 1, 1)[0]]
    tokens = [lengths[step].sum() for step in steps]
    assert max(tokens) < 1.3 * np.mean(tokens)


def test_batches_are_hardly_padded_and_differ_between_epochs():
    lengths = np.random.default_rng(0).integers(1, 200, 2000)
    sampler = TokenBudgetSampler(lengths, 16, 1, 1, 0, seed=0)
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        padded = sum(lengths[batch].max() * len(batch) for batch in epochs[-1])
        assert 1 - lengths.sum() / padded < 0.06
    assert epochs[0] != epochs[1]
    assert {len(epoch) for epoch in epochs} == {len(sampler)}


@pytest.mark.parametrize("lengths", [[1] * 10, [1000] + [1] * 9, [1] * 9 + [1000], [5, 1, 1, 1, 1, 1, 1, 1, 1, 5]])
@pytest.mark.parametrize("num_parts", [1, 3, 10])
def test_no_part_is_empty_whatever_the_lengths(lengths, num_parts):
    ends = cut_by_tokens(np.array(lengths), num_parts)
    assert ends[-1] == 10 and len(ends) == num_parts
    assert (np.diff([0, *ends]) > 0).all()


def test_a_batch_without_rows_is_harmless(tokenizer):
    batch = collate_padded([], tokenizer)
    assert batch["labels"].tolist() == [-100] and batch["input_ids"].shape[1] > 0
    rows = [{**tokenizer(text), "labels": label} for text, label in (("天地", 0), ("天地玄黄宇宙洪荒", 1))]
    batch = collate_padded(rows, tokenizer)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    assert batch["labels"].tolist() == [0, 1]


def test_a_table_is_tokenised_once_by_whichever_rank_comes_first(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE_DIR", tmp_path)
    monkeypatch.setattr(tokenizer, "model_max_length", 64)
    table = pd.DataFrame({"text": ["天地玄黄", "宇宙"], "label": ["甲", "乙"]})
    for _ in range(2):  # for the second call, the tokenizer remembers where the first one had texts cut
        assert data.encode_table(table, {"甲": 0, "乙": 1}, tokenizer)["labels"][:] == [0, 1]
    assert len(list(tmp_path.glob("*.arrow"))) == 1
