"""Loss, rewards and gradients are those of TRL's DPOTrainer on the same pairs, with a reference that differs."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import load_encoded
from dpo_arguments import DPOArguments
from dpo_trainer import DPOTrainer, collate_pairs
from prefix_sharing import PrefixSharing

# Not in requirements-test.txt, since verl does not start where TRL is; `make test` installs it where this runs.
trl = pytest.importorskip("trl.trainer.dpo_trainer")

COMMON = {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 8, "max_steps": 1}
COMMON |= {"save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-3, "warmup_steps": 0, "disable_tqdm": True}
NAMES = ["loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
NAMES += ["logps/chosen", "logps/rejected"]


class OnIds(trl.DPOTrainer):
    """On token ids as they are."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def read_models(folder: str):
    """The policy, and a reference that differs from it."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for weight in policy.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    return policy, reference


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "sigmoid"},
        {"loss_type": "hinge", "beta": 0.3},
        {"loss_type": "ipo"},
        {"loss_type": "robust", "label_smoothing": 0.2},
    ],
    ids=lambda settings: settings["loss_type"],
)
def test_a_step_is_trls(settings, tiny_folder, data_file, tokenizer, tmp_path):
    rows, _ = load_encoded(data_file, tokenizer, (512, 512))
    rows = rows.select(range(8))
    policy, reference = read_models(tiny_folder)
    args = DPOArguments(
        **COMMON, **settings, output_dir=str(tmp_path / "ours"), eval_strategy="no", eval_on_start=False
    )
    ours = DPOTrainer(policy, args, train_dataset=rows)
    batch = collate_pairs(list(rows))
    values = ours.log_probabilities(reference, batch).detach().view(-1, 2)
    assert ours.args.precompute_ref_log_probs  # so that these are taken
    ours.references.add(batch["pair"].numpy(), values.numpy())
    ours.add_callback(PrefixSharing(ours))
    ours.train()

    policy, reference = read_models(tiny_folder)
    pairs = []
    for row in rows:
        start, end = row["prompt_length"], row["prompt_length"] + row["chosen_length"]
        parts = (row["input_ids"][:start], row["input_ids"][start:end], row["input_ids"][end:])
        pairs.append(dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), parts, strict=True)))
    config = trl.DPOConfig(**COMMON, **settings, output_dir=str(tmp_path / "trl"), gradient_checkpointing=False)
    theirs = OnIds(
        model=policy,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(tiny_folder),
    )
    theirs.train()
    (found,), (expected,) = (
        [entry for entry in trainer.state.log_history if "loss" in entry] for trainer in (ours, theirs)
    )
    if settings["loss_type"] == "ipo":  # whose rewards TRL reports by the sum, here by the mean that the loss is on
        expected = {name: expected[name] for name in ("loss", "grad_norm", "logps/chosen", "rewards/accuracies")}
    assert abs(found["rewards/margins"]) > 1e-3
    for name in set(NAMES) & set(expected):
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name
