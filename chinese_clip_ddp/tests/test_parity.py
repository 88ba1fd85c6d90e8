"""The loss and the step are one and the same, however the pairs are shared out and whoever computes them."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from made_pairs import data_settings
from ranks import losses, run_train, train_here
from safetensors.torch import load_file, save_file

from batch import PairBatchSampler, PairCollator, Pixels
from data import column, load_splits
from model import load_model, load_processors
from trainer import MAX_LOGIT_SCALE

COMMON = [
    "--lr_scheduler_type",
    "constant",
    "--save_strategy",
    "no",
    "--num_train_epochs",
    "2",
    "--weight_decay",
    "0.1",
]


def plain_loss(images, texts, scale, batch) -> torch.Tensor:
    """The whole matrix; pairs of one caption or image are no negatives."""
    logits = scale * images @ texts.T
    ids = torch.stack([batch["image_ids"], batch["caption_ids"]], 1)
    same = (ids[:, None] == ids[None]).any(-1).fill_diagonal_(False)
    logits, target = logits.masked_fill(same, -torch.inf), torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def plain_loop(folder: str, data_file: str, batch_size: int, accumulation: int = 1) -> tuple[list[float], dict]:
    """Losses of two epochs by one process with the whole batch, without the trainer; and the weights at the end."""
    tokenizer, processor = load_processors(folder)
    rows = load_splits(data_settings(data_file, max_seq_length=64), tokenizer, 42, None)[0]
    collate = PairCollator(Pixels(processor), tokenizer.pad_token_id)
    model = load_model(folder).train()
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and "norm" not in name.lower()
        (decayed if is_matrix else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))
    sampler, step_losses = PairBatchSampler(column(rows, "group"), batch_size, 1, 0, 42), []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        micro_batches = list(sampler)
        for start in range(0, len(micro_batches), accumulation):
            step = [collate(list(rows.select(indices))) for indices in micro_batches[start : start + accumulation]]
            pairs, loss = sum(len(batch["rows"]) for batch in step), 0
            for batch in step:
                towers = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
                loss += plain_loss(*model(**towers)[:3], batch) * len(batch["rows"]) / pairs
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)
            step_losses.append(loss.item())
    return step_losses, model.state_dict()


@pytest.fixture(scope="module")
def hot_folder(tiny_folder, tmp_path_factory) -> str:
    """A model whose temperature is beyond its bound, and then falls: a copy of it that isn't clamped would show."""
    folder = tmp_path_factory.mktemp("hot") / "model"
    shutil.copytree(tiny_folder, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"logit_scale": torch.tensor(5.0)}, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def expected(hot_folder, data_file):
    """By the pairs of a step: 8 leave one of two ranks without any at last, 10 leave uneven shares of 2 and 3."""
    found = {size: plain_loop(hot_folder, data_file, size) for size in (8, 10)}
    assert all(weights["logit_scale"] < MAX_LOGIT_SCALE - 3e-3 for _, weights in found.values())
    assert [len(step_losses) for step_losses, _ in found.values()] == [8, 6] and found[10][0][-1] < found[10][0][0]
    return found


def assert_equal(output, expected) -> None:
    """The same losses, and weights that are as near as AdamW lets them: it scales gradients of 0 up to its rate."""
    step_losses, weights = expected
    assert losses(output) == pytest.approx(step_losses, rel=5e-5, abs=2e-5)
    found = load_file(output / "model.safetensors")
    assert {name: weight.shape for name, weight in found.items()} == {n: weight.shape for n, weight in weights.items()}
    difference = sum((found[name] - weights[name]).abs().sum() for name in weights)
    assert difference < 1e-4 * sum(weight.abs().sum() for weight in weights.values())
    assert found["logit_scale"].item() == pytest.approx(weights["logit_scale"].item(), abs=1e-6)


@pytest.mark.parametrize(
    "layout", ["", "--cross_embedding local --gradient_checkpointing true --dataloader_num_workers 1"]
)
def test_one_process_equals_the_plain_loop(layout, expected, hot_folder, paths, tmp_path, monkeypatch):
    more = ["--per_device_train_batch_size", "8", *layout.split()]
    train_here(monkeypatch, *paths(tmp_path, hot_folder), *COMMON, *more)
    assert_equal(tmp_path, expected[8])


def test_micro_batches_count_by_their_pairs(hot_folder, data_file, paths, tmp_path, monkeypatch):
    expected = plain_loop(hot_folder, data_file, 8, accumulation=2)
    assert len(expected[0]) == 4  # of 8 + 8 and 8 + 1 pairs
    more = ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2"]
    train_here(monkeypatch, *paths(tmp_path, hot_folder), *COMMON, *more)
    assert_equal(tmp_path, expected)


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (10, "--loss_block_size 3"),
        (8, "--gradcache_chunk_size 2"),
        (8, "--deepspeed ds_zero2_no_offload.json"),
        (8, "--deepspeed ds_zero3_no_offload.json"),
    ],
)
def test_two_processes_equal_the_plain_loop(size, layout, expected, hot_folder, paths, tmp_path):
    more = ["--per_device_train_batch_size", size // 2, *layout.split()]
    run_train(*paths(tmp_path, hot_folder), *COMMON, *more, processes=2)
    assert_equal(tmp_path, expected[size])
