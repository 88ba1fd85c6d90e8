"""The loss is one and the same, however rows and pictures are laid out and whoever computes them."""

import pytest
import torch
from ranks import losses, run_train, train_here
from transformers import LlavaForConditionalGeneration

from batch import BalancedBatchSampler
from collator import LlavaCollator
from data import column, load_encoded
from pixels import Pixels, count_image_tokens

COMMON = "--learning_rate 1e-3 --lr_scheduler_type constant --logging_steps 1 --save_strategy no --num_train_epochs 1"
RATES = "--train_type none --projector_learning_rate 2e-3 --vision_learning_rate 3e-4"
NO_CACHE = "--feature_cache_gb 0"


def flags(model, data_file, eval_file, output, *more):
    paths = ["--model_name_or_path", model, "--data_path", data_file, "--eval_data_path", eval_file]
    return [*paths, "--output_dir", output, *COMMON.split(), *more]


def plain_loop(model_folder, data_file, processor, rates: dict[str, float]) -> list[float]:
    """The losses of an epoch by nothing but `model(labels=...)` on padded batches with their pixels."""
    rows, _ = load_encoded(data_file, processor, 2048)
    model = LlavaForConditionalGeneration.from_pretrained(model_folder, attn_implementation="eager")
    parts = {"vision_tower": [], "multi_modal_projector": [], "": []}
    for name, parameter in model.named_parameters():
        parts[next(part for part in parts if part in name)].append(parameter)
    groups = [{"params": parts[part], "lr": rate} for part, rate in rates.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    collate = LlavaCollator(
        Pixels(processor.image_processor), processor.image_token_id, count_image_tokens(processor), always_image=False
    )
    step_losses = []
    for indices in BalancedBatchSampler(column(rows, "length"), [[i] for i in range(len(rows))], 8, 1, 1, 0, seed=42):
        loss = model(**collate(list(rows.select(indices)))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([parameter for group in groups for parameter in group["params"]], 1.0)
        optimizer.step()
        model.zero_grad()
        step_losses.append(loss.item())
    return step_losses


@pytest.fixture(scope="module")
def expected(tiny_folder, data_file, processor):
    rates = {"multi_modal_projector": 1e-3, "": 1e-3}
    step_losses = plain_loop(tiny_folder, data_file, processor, rates)
    assert len(step_losses) == 4 and step_losses[2] < step_losses[0]
    return pytest.approx(step_losses, abs=1e-5)


@pytest.fixture(scope="module")
def expected_of_all(tiny_folder, data_file, processor):
    rates = {"vision_tower": 3e-4, "multi_modal_projector": 2e-3, "": 1e-3}
    return pytest.approx(plain_loop(tiny_folder, data_file, processor, rates), abs=1e-5)


@pytest.mark.parametrize(
    "layout",
    [
        "--per_device_train_batch_size 8",
        f"--per_device_train_batch_size 8 {NO_CACHE}",
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 2",
        f"--per_device_train_batch_size 8 --gradient_checkpointing true --fast_path false {NO_CACHE}",
        "--per_device_train_batch_size 8 --attn_implementation sdpa --dataloader_num_workers 2",
    ],
)
def test_one_process_equals_the_plain_loop(layout, expected, tiny_folder, data_file, eval_file, tmp_path, monkeypatch):
    train_here(monkeypatch, *flags(tiny_folder, data_file, eval_file, tmp_path, *layout.split()))
    assert losses(tmp_path) == expected


@pytest.fixture(scope="module")
def expected_validation(tiny_folder, data_file, eval_file, expected_of_all, tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as monkeypatch:
        layout = f"{RATES} --per_device_train_batch_size 8".split()
        train_here(monkeypatch, *flags(tiny_folder, data_file, eval_file, output, *layout))
    assert losses(output) == expected_of_all
    return {name: pytest.approx(losses(output, name), abs=1e-5) for name in ("eval_loss", "eval_loss_exchanged")}


@pytest.mark.parametrize("deepspeed", ["", "ds_zero2_no_offload.json", "ds_zero3_no_offload.json"])
def test_two_processes_that_train_all_equal_the_plain_loop(
    deepspeed, expected_of_all, expected_validation, tiny_folder, data_file, eval_file, tmp_path
):
    more = [*RATES.split(), "--per_device_train_batch_size", "4", *(["--deepspeed", deepspeed] if deepspeed else [])]
    run_train(*flags(tiny_folder, data_file, eval_file, tmp_path, *more), processes=2)
    assert losses(tmp_path) == expected_of_all
    for name, values in expected_validation.items():
        assert losses(tmp_path, name) == values
