"""What is said to be trained is trained, and nothing else; each part at its own rate, with and without pictures."""

import pytest
from ranks import losses, run_train, train_here
from transformers import LlavaConfig, LlavaForConditionalGeneration

from conftest import make_rows, write_rows
from tower import unused_in_tower

PARTS = ("vision_tower", "multi_modal_projector", "language_model")
TRAINED = {
    "projector": {"multi_modal_projector"},
    "freeze_vision": {"multi_modal_projector", "language_model"},
    "none": set(PARTS),
}


def flags(model, data, output, *more):
    paths = ["--model_name_or_path", model, "--data_path", data, "--output_dir", output, "--validation_split", "0"]
    common = "--save_strategy no --logging_steps 1 --learning_rate 1e-2 --lr_scheduler_type constant --warmup_steps 0"
    return [*paths, *common.split(), *more]


def changes(before: str, after) -> dict[str, dict[str, float]]:
    """The largest change of each tensor, by part; `lm_head` is one with the embedding."""
    states = []
    for folder in (before, after):  # DeepSpeed's checkpoints have other names, which from_pretrained knows
        model, loading = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"]
        states.append({name: weight.detach() for name, weight in model.named_parameters()})
    old, new = states
    found = {part: {} for part in PARTS}
    for name in old:
        part = next(part for part in PARTS if part in name)
        found[part][name] = (old[name] - new[name]).abs().max().item()
    return found


@pytest.mark.parametrize(
    ("train_type", "tower"),
    [("projector", "tiny_folder"), ("freeze_vision", "levit_folder"), ("none", "tiny_folder")],
)
def test_what_is_said_to_be_trained_is_trained(train_type, tower, data_file, tmp_path, monkeypatch, capsys, request):
    folder = request.getfixturevalue(tower)
    train_here(monkeypatch, *flags(folder, data_file, tmp_path, "--train_type", train_type, "--max_steps", "2"))
    printed = capsys.readouterr().out
    moved = changes(folder, tmp_path)
    for part, tensors in moved.items():
        if part not in TRAINED[train_type]:
            assert set(tensors.values()) == {0.0}, part
            continue
        still = {name for name, change in tensors.items() if change == 0}
        if part == "vision_tower":  # what the chosen layer doesn't use, which the screen counts
            assert f"{len(still)} tensors of the tower give nothing to the chosen features: frozen" in printed
            unused = unused_in_tower(LlavaConfig.from_pretrained(folder))
            still = {name.partition("vision_tower.")[2] for name in still} ^ unused
        assert not still
    assert ("no step decodes a picture or asks the tower" in printed) == (train_type != "none")


def test_each_part_moves_at_its_own_rate(tiny_folder, data_file, tmp_path, monkeypatch):
    rates = "--train_type none --projector_learning_rate 1e-3 --vision_learning_rate 1e-4 --max_steps 1"
    train_here(monkeypatch, *flags(tiny_folder, data_file, tmp_path, *rates.split()))
    largest = {part: max(tensors.values()) for part, tensors in changes(tiny_folder, tmp_path).items()}
    expected = {"vision_tower": 1e-4, "multi_modal_projector": 1e-3, "language_model": 1e-2}  # Adam's first step
    assert largest == pytest.approx(expected, rel=0.01)


def test_rates_that_deepspeed_would_not_hear_of_are_refused(tiny_folder, data_file, tmp_path):
    more = ["--projector_learning_rate", "1e-3", "--deepspeed", "ds_zero2_offload.json"]
    printed = run_train(*flags(tiny_folder, data_file, tmp_path, *more), status=1)
    assert "the optimizer of DeepSpeed's config has one rate" in printed


NO_PICTURE = ["--train_type", "none", "--num_train_epochs", "1"]


@pytest.fixture(scope="module")
def texts(tiny_folder, tmp_path_factory) -> tuple[str, str]:
    """5 rows without any picture, and the run of one process on them in steps of 4."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [row for row in make_rows(20, folder) if "images" not in row]
    data = write_rows(folder / "texts.jsonl", rows)
    with pytest.MonkeyPatch.context() as monkeypatch:
        one = [*NO_PICTURE, "--per_device_train_batch_size", "4"]
        train_here(monkeypatch, *flags(tiny_folder, data, folder / "one", *one))
    return data, str(folder / "one")


@pytest.mark.parametrize("deepspeed", ["", "ds_zero2_no_offload.json", "ds_zero3_no_offload.json"])
def test_rows_without_any_picture_leave_no_rank_waiting(deepspeed, texts, tiny_folder, tmp_path):
    """No rank has a picture, and in the second step one has no row either; DDP doesn't look for unused parameters."""
    data, one = texts
    alone = ["--deepspeed", deepspeed] if deepspeed else ["--ddp_find_unused_parameters", "false"]
    two = ["--per_device_train_batch_size", "2", *alone]
    run_train(*flags(tiny_folder, data, tmp_path, *NO_PICTURE, *two), processes=2)
    assert len(losses(one)) == 2 and losses(tmp_path) == pytest.approx(losses(one), abs=1e-5)
    for tensors in changes(one, tmp_path).values():  # a number that is none is not below it either
        assert all(change < 1e-3 for change in tensors.values())
