"""The loss is one and the same, however the rows of a step are laid out and whoever computes them."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import losses, read_history, run_train, train_here
from transformers import AutoModelForCausalLM

from batch import collate
from conftest import STEPS, TRAIN, VALIDATION
from data import Windows, WindowsInOrder
from fast_path import remove_padding
from windows import ValidationRows, WindowSampler, cut_at_borders

LENGTH, ROWS_PER_STEP = 24, 8


def flags(model, prepared, output, *more):
    paths = ["--model_name_or_path", model, "--data_path", prepared, "--output_dir", output]
    return [*paths, *STEPS.split(), "--model_max_length", LENGTH, "--num_train_epochs", "1", "--samples", "0", *more]


def plain_loop(model_folder, prepared, document_mask: bool, z_loss: float = 0.0) -> list[float]:
    """The losses of an epoch by nothing but the model's logits, one document or one row at a time."""
    windows = Windows(f"{prepared}/train", LENGTH, seed=42)
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="eager")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    step_losses = []
    for first in range(0, len(windows), ROWS_PER_STEP):
        total, tokens, extra = 0.0, 0, 0.0
        for number in range(first, min(first + ROWS_PER_STEP, len(windows))):
            ids = windows[number]["input_ids"]
            starts = [i for i, token in enumerate(ids) if token == 2] if document_mask else []
            edges = [0, *(i for i in starts if 0 < i < len(ids) - 1), len(ids) - 1]
            for start, end in zip(edges, edges[1:], strict=False):
                piece = torch.tensor([ids[start : end + 1]])
                logits = model(input_ids=piece).logits[0, :-1]
                total = total + F.cross_entropy(logits, piece[0, 1:], reduction="sum")
                extra = extra + logits.exp().sum(1).log().square().sum()
                tokens += end - start
        loss = (total + z_loss * extra) / tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step_losses.append(loss.item())
    return step_losses


@pytest.fixture(scope="module")
def expected(scratch_folder, prepared):
    found = {mask: plain_loop(scratch_folder, prepared, mask) for mask in (False, True)}
    assert len(found[False]) == 7 and found[False][5] < found[False][0] - 0.1
    assert abs(found[True][0] - found[False][0]) > 1e-4
    return {mask: pytest.approx(values, abs=2e-5) for mask, values in found.items()}


@pytest.mark.parametrize(
    "layout",
    [
        "--per_device_train_batch_size 8",
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 4",
        "--per_device_train_batch_size 8 --gradient_checkpointing true",
        "--per_device_train_batch_size 8 --attn_implementation sdpa",
        "--per_device_train_batch_size 8 --document_mask true",
        "--per_device_train_batch_size 8 --document_mask true --fast_path false",
        "--per_device_train_batch_size 8 --document_mask true --attn_implementation sdpa",
        "--per_device_train_batch_size 8 --dataloader_num_workers 2",
    ],
)
def test_one_process_equals_the_plain_loop(layout, expected, scratch_folder, prepared, tmp_path, monkeypatch):
    train_here(monkeypatch, *flags(scratch_folder, prepared, tmp_path, *layout.split()))
    assert losses(tmp_path) == expected["document_mask" in layout]


@pytest.mark.parametrize(
    "layout",
    [
        "",
        "--deepspeed ds_zero2_no_offload.json --document_mask true",
        "--deepspeed ds_zero3_no_offload.json --samples 2",
    ],
)
def test_two_processes_equal_the_plain_loop(layout, expected, scratch_folder, prepared, tmp_path):
    more = ["--per_device_train_batch_size", "4", *layout.split()]
    run_train(*flags(scratch_folder, prepared, tmp_path, *more), processes=2)
    assert losses(tmp_path) == expected["document_mask" in layout]
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for source, texts in VALIDATION.items():
        bits = plain_bits_per_byte(model, prepared, source, texts, "document_mask" in layout)
        assert losses(tmp_path, f"eval_{source}/bits_per_byte")[-1] == pytest.approx(bits, rel=1e-5)


def plain_bits_per_byte(model, prepared, source, texts, document_mask: bool) -> float:
    """Over the windows in order; how a document ends costs nothing, and has no bytes."""
    nats = 0.0
    for window in WindowsInOrder(f"{prepared}/validation", LENGTH, source):
        ids = window["input_ids"]
        start = 0
        for place in range(1, len(ids)):
            if document_mask and ids[place - 1] == 2:
                start = place - 1
            if ids[place] != 2:
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([ids[start:place]])).logits[0, -1]
                nats -= torch.log_softmax(logits, 0)[ids[place]].item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def test_the_z_loss_is_trained_on_and_left_out_of_the_validation(
    scratch_folder, prepared, tmp_path, monkeypatch, capsys
):
    layout = ["--per_device_train_batch_size", "8", "--z_loss", "0.01", "--max_steps", "3"]
    train_here(monkeypatch, *flags(scratch_folder, prepared, tmp_path, *layout))
    assert losses(tmp_path) == pytest.approx(plain_loop(scratch_folder, prepared, False, z_loss=0.01)[:3], abs=2e-5)
    assert "logits of whole batches: --z_loss needs them" in capsys.readouterr().out
    before = read_history(tmp_path)[0]
    train_here(monkeypatch, *flags(scratch_folder, prepared, tmp_path / "without", *layout[:2], "--max_steps", "1"))
    assert before["eval_loss"] == pytest.approx(read_history(tmp_path / "without")[0]["eval_loss"], rel=1e-6)


def test_the_rows_of_a_step_are_the_same_for_any_ranks_and_each_row_comes_once():
    for batch_size, ranks in ((8, 1), (4, 2), (2, 4), (3, 3)):
        samplers = [WindowSampler(53, batch_size, ranks, rank) for rank in range(ranks)]
        for epoch in (0, 2):
            for sampler in samplers:
                sampler.set_epoch(epoch)
            batches = [list(sampler) for sampler in samplers]
            assert {len(of_rank) for of_rank in batches} == {len(samplers[0])}
            dealt = [row for step in zip(*batches, strict=True) for batch in step for row in batch]
            assert dealt == list(range(epoch * 53, epoch * 53 + 53))


@pytest.mark.parametrize("packed", [False, True])
def test_no_document_is_read_by_its_neighbour(packed, scratch_folder):
    """Another text before it changes nothing of a document's logits under the mask, and does so without it."""
    attention = "packed_sdpa" if packed else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(scratch_folder, attn_implementation=attention)
    for mask in (True, False):
        found = []
        for before in ([5, 6, 7], [9, 8, 20]):
            ids = [2, *before, 2, 11, 12, 13, 2]
            batch = collate(cut_at_borders(ids, ids, [0, 4, 8] if mask else []))
            assert (batch["labels"][:, 1:] != -100).sum() == 8
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            if packed:
                inputs, _ = remove_padding(inputs, batch["labels"])
            with torch.no_grad():
                logits = model(**inputs, use_cache=False).logits
            if packed:  # under the mask the EOS between the two stands there twice
                found.append(logits[0, -5:])
            else:
                found.append(logits[-1, :5] if mask else logits[0, 4:])
        assert torch.equal(*found) == mask


@pytest.mark.parametrize("stride", [None, 23, 7, 1])
def test_every_validation_token_is_a_target_once(stride, prepared):
    rows = ValidationRows(f"{prepared}/validation", LENGTH, "news", stride)
    targets, longest = [], 0
    for number in range(len(rows)):
        row = rows[number]
        labels = row["labels"][1:]
        targets += [label for label in labels if label != -100]
        longest = max(longest, len(row["input_ids"]))
        if stride and number * stride > LENGTH and number < len(rows) - 1:  # the context is carried over
            assert len(row["input_ids"]) == LENGTH and set(row["labels"][: LENGTH - stride]) == {-100}
    stream = np.concatenate([np.fromfile(f, "<u2") for f in sorted(rows.windows.folder.glob("news-*.bin"))])
    assert targets == [token for token in stream[1:].tolist() if token != 2]
    assert longest == LENGTH and rows.bytes == sum(len(text.encode()) for text in VALIDATION["news"])


def test_a_mixture_is_what_is_trained_on(scratch_folder, prepared, tmp_path, monkeypatch):
    import json

    layout = ["--per_device_train_batch_size", "8", "--mixture", "news=0.25,idioms=0.75"]
    train_here(monkeypatch, *flags(scratch_folder, prepared, tmp_path, *layout))
    results = json.loads((tmp_path / "train_results.json").read_text())
    rows = {source: len(WindowsInOrder(f"{prepared}/train", LENGTH, source)) for source in TRAIN}
    total = sum(rows.values())
    assert results["mixture"] == {"news": 0.25, "idioms": 0.75}
    assert results["epochs"] == pytest.approx(
        {"news": total * 0.25 / rows["news"], "idioms": total * 0.75 / rows["idioms"]}
    )
