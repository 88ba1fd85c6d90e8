"""The loss is one and the same, however the rows are laid out and whoever computes them; and so are the metrics."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from ranks import losses, run_train, train_here
from transformers import AutoModelForSequenceClassification

from batch import TokenBudgetSampler
from conftest import TELLING, make_reviews, write_table
from rows import read_table

COMMON = "--learning_rate 1e-3 --lr_scheduler_type constant --warmup_steps 0 --weight_decay 0 --logging_steps 1"
COMMON += " --save_strategy no --num_train_epochs 1 --test_split 0"


def flags(model, data_file, eval_file, output, *more):
    paths = ["--model_name_or_path", model, "--data_path", data_file, "--eval_data_path", eval_file]
    return [*paths, "--output_dir", output, *COMMON.split(), *more]


def plain_epoch(model_folder, data_file, tokenizer, weights=None, smoothing=0.0) -> list[float]:
    """The losses of an epoch by nothing but the model's logits on padded batches of the same rows."""
    table = read_table(data_file, "text", "label")
    labels = torch.tensor((table.label == "差评").astype(int).to_numpy())
    lengths = [len(ids) for ids in tokenizer(table.text.tolist(), truncation=True, max_length=64)["input_ids"]]
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    step_losses = []
    for rows in TokenBudgetSampler(lengths, 8, 1, 1, 0, seed=42):
        texts = table.text[rows].tolist()
        inputs = tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
        each = F.cross_entropy(
            model(**inputs).logits, labels[rows], weight=weights, label_smoothing=smoothing, reduction="none"
        )
        loss = each.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step_losses.append(loss.item())
    return step_losses


@pytest.fixture(scope="module")
def expected(classifier_folder, data_file, tokenizer):
    step_losses = plain_epoch(classifier_folder, data_file, tokenizer)
    assert len(step_losses) == 4
    return pytest.approx(step_losses, abs=1e-5)


@pytest.fixture(scope="module")
def expected_validation(classifier_folder, data_file, eval_file, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        output = tmp_path_factory.mktemp("one")
        layout = ["--per_device_train_batch_size", "8"]
        train_here(monkeypatch, *flags(classifier_folder, data_file, eval_file, output, *layout))
    return pytest.approx(losses(output, "eval_loss"), abs=1e-5)


@pytest.mark.parametrize(
    "layout",
    [
        "--per_device_train_batch_size 8",
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 2",
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 4",
        "--per_device_train_batch_size 8 --gradient_checkpointing true",
        "--per_device_train_batch_size 8 --dataloader_num_workers 2",
    ],
)
def test_one_process_equals_the_plain_loop(
    layout, expected, classifier_folder, data_file, eval_file, tmp_path, monkeypatch
):
    train_here(monkeypatch, *flags(classifier_folder, data_file, eval_file, tmp_path, *layout.split()))
    assert losses(tmp_path) == expected


@pytest.mark.parametrize("deepspeed", ["", "ds_zero2_no_offload.json", "ds_zero3_no_offload.json"])
def test_two_processes_equal_the_plain_loop(
    deepspeed, expected, expected_validation, classifier_folder, data_file, eval_file, tmp_path
):
    more = ["--per_device_train_batch_size", "4", *(["--deepspeed", deepspeed] if deepspeed else [])]
    run_train(*flags(classifier_folder, data_file, eval_file, tmp_path, *more), processes=2)
    assert losses(tmp_path) == expected
    assert losses(tmp_path, "eval_loss") == expected_validation


def test_weights_and_smoothing_equal_the_plain_loop(classifier_folder, eval_file, tokenizer, tmp_path, monkeypatch):
    rows = make_reviews(40)
    rows = [row for index, row in enumerate(rows) if row[1] == "好评" or index % 4 == 3]  # 20 and 10
    table = write_table(tmp_path / "train.csv", rows)
    more = ["--class_weights", "balanced", "--label_smoothing_factor", "0.1", "--per_device_train_batch_size", "8"]
    train_here(monkeypatch, *flags(classifier_folder, table, eval_file, tmp_path / "out", *more))
    weights = torch.tensor([30 / (2 * 20), 30 / (2 * 10)])
    assert losses(tmp_path / "out") == pytest.approx(
        plain_epoch(classifier_folder, table, tokenizer, weights, smoothing=0.1), abs=1e-5
    )


def test_metrics_equal_scikit_learn_s(classifier_folder, data_file, tmp_path, monkeypatch):
    from sklearn.metrics import accuracy_score, f1_score

    import trainer

    seen = {}
    measure = trainer.ClassificationTrainer.measure

    def keep(self, logits, labels):
        seen["last"] = measure(self, logits, labels), logits.argmax(1), labels
        return seen["last"][0]

    monkeypatch.setattr(trainer.ClassificationTrainer, "measure", keep)
    validation = write_table(tmp_path / "eval.csv", make_reviews(31, seed=5))
    train_here(monkeypatch, *flags(classifier_folder, data_file, validation, tmp_path / "out"))
    scores, predicted, labels = seen["last"]
    assert scores["accuracy"] == accuracy_score(labels, predicted)
    assert scores["macro_f1"] == f1_score(labels, predicted, average="macro", labels=[0, 1], zero_division=0)
    results = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert results["validation_accuracy"] == scores["accuracy"]


def test_the_baseline_has_the_same_macro_f1_which_leaves_out_what_was_not_tested():
    from sklearn.metrics import f1_score

    from baseline import score_baseline
    from classification_metrics import score_classes

    labels, predicted = np.array([0, 0, 1, 1, 1]), np.array([0, 2, 1, 1, 0])
    scores = score_classes(labels, predicted, 4)
    assert scores["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro", labels=[0, 1]))
    assert scores["per_class"]["support"].tolist() == [2, 3, 0, 0]
    rows = pd.DataFrame(make_reviews(300, labels=tuple(TELLING)), columns=["text", "label"])
    two_classes = rows[250:][rows[250:].label != "中评"].reset_index(drop=True)
    scores = score_baseline({"train": rows[:250], "test": two_classes})["test"]
    assert scores["macro_f1"] > 0.9 and scores["per_class"]["support"].tolist()[0] == 0
