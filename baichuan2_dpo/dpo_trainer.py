"""The Trainer's step on pairs: log-probabilities of both replies, the reference's beside them, one loss a pair.

A batch has two rows a pair, the chosen reply and then the rejected one, each behind its prompt; `prefix_sharing.py`
puts a faster way in the place of `log_probabilities`.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from tqdm import tqdm
from transformers import TrainerCallback

from batch import collate
from data import IGNORE_INDEX, column
from dpo_arguments import decide_precomputing
from preference_loss import ROUNDING, WITHOUT_REFERENCE, preference_losses
from rows import UserError
from trainer import SFTTrainer

MEASURED = ("preference_loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
MEASURED += ("logps/chosen", "logps/rejected", "kl")
PAIRS_KEPT_AT_ONCE = 4096  # a pass that is stopped goes on behind these
BY_FILE = ("rewards/accuracies", "logps/chosen")


def name_of_file(source: str) -> str:
    """`helpful` of `folder/helpful.jsonl:12`."""
    return Path(source.rpartition(":")[0]).name.split(".")[0]


def collate_pairs(pairs: list[dict]) -> dict[str, torch.Tensor]:
    """Both sides of each pair as rows of `batch.collate`: prompt and chosen reply, prompt and rejected reply, ...

    Returns:
        `input_ids`, `attention_mask`, `labels` of shape (2 x pairs, longest), `pair` of shape (pairs,), and `source`, a
        list. No pair at all gives two rows without labels.
    """
    sides = []
    for pair in pairs:
        prompt_length, end = pair["prompt_length"], pair["prompt_length"] + pair["chosen_length"]
        prompt, chosen, rejected = (
            list(pair["input_ids"][part])
            for part in (slice(prompt_length), slice(prompt_length, end), slice(end, None))
        )
        for reply in (chosen, rejected):
            sides.append({"input_ids": prompt + reply, "labels": [IGNORE_INDEX] * prompt_length + reply})
    nothing = {"input_ids": [0, 0], "labels": [IGNORE_INDEX, IGNORE_INDEX]}
    batch = collate(sides or [nothing, nothing]) | {"pair": torch.tensor([pair["pair"] for pair in pairs] or [0])}
    return batch | {"source": [pair["source"] for pair in pairs] or [":0"]}


def disable_dropout(model: torch.nn.Module) -> None:
    """Else policy and reference would differ before the first step."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


class DPOTrainer(SFTTrainer):
    """SFTTrainer's batches and checkpoints, with a loss on pairs: the mean over the pairs of the global batch.

    `args` has, beside TrainingArguments, `beta`, `loss_type`, `label_smoothing`, `simpo_gamma`, `rpo_alpha` and
    `precompute_ref_log_probs`.
    """

    batch_columns = ["input_ids", "prompt_length", "chosen_length", "pair", "source"]

    def __init__(self, *args, reference_file=None, adapter_is_new: bool = False, **kwargs):
        """
        Args:
            reference_file: where the reference's log-probabilities are kept, a pathlib.Path ending in .npz.
            adapter_is_new: the model without its adapter is the reference; else it is the model before the first step.
        """
        super().__init__(*args, **kwargs)
        self.data_collator = collate_pairs
        disable_dropout(self.model)
        self.adapter_is_new = adapter_is_new
        decide_precomputing(self.args, adapter_is_new)
        self.needs_reference = self.args.loss_type not in WITHOUT_REFERENCE
        self.references = ReferenceLogProbabilities(reference_file)
        self.sums = torch.zeros(len(MEASURED) + 1, device=self.args.device)

    def log_probabilities(self, model, batch: dict) -> torch.Tensor:
        """The log-probability of each row's reply, summed over its tokens: shape (rows,), fp32."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        logits, targets = logits[:, :-1].transpose(1, 2).float(), batch["labels"][:, 1:]
        return -F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none").sum(1)

    def summed_loss(self, model, batch: dict) -> torch.Tensor:
        """Cross-entropy over both replies, by which the ways of computing are compared before the first step."""
        return -self.log_probabilities(model, batch).sum()

    def rows_apart(self, batch: dict) -> Iterator[dict]:
        return super().rows_apart({name: batch[name] for name in ("input_ids", "attention_mask", "labels")})

    def reference_log_probabilities(self, model, batch: dict) -> torch.Tensor:
        """What the reference gives both replies, shape (pairs, 2); 0 for a loss without a reference."""
        if not self.needs_reference:
            return torch.zeros(len(batch["pair"]), 2, device=self.args.device)
        if self.args.precompute_ref_log_probs:
            return torch.from_numpy(self.references.find(batch["pair"].cpu().numpy())).to(self.args.device)
        return self.compute_reference(model, batch)

    @torch.no_grad()
    def compute_reference(self, model, batch: dict) -> torch.Tensor:
        with self.model.disable_adapter() if self.adapter_is_new else nullcontext():
            return self.log_probabilities(model, batch).view(-1, 2)

    def precompute_references(self, rows: Dataset) -> None:
        """Computes the reference's log-probabilities of all pairs that are not known yet.

        Raises:
            UserError: there are some, and the model is no longer what they were to be computed with.
        """
        references, is_main_process = self.references, self.args.process_index == 0
        missing = np.flatnonzero(~np.isin(column(rows, "pair"), references.keys))
        if len(missing) and not self.adapter_is_new and self.state.global_step > 0:
            raise UserError(
                f"{references.file}: lacks the reference's log-probabilities of {len(missing)} pairs, and the model is "
                "no longer what they were to be computed with. Start afresh: --overwrite_output_dir true."
            )
        self.model_wrapped.eval()
        starts = range(0, len(missing), PAIRS_KEPT_AT_ONCE)
        for start in tqdm(starts, "reference", disable=not is_main_process or len(starts) < 2):
            found = []
            with self.compute_loss_context_manager():
                for batch in self.get_eval_dataloader(rows.select(missing[start : start + PAIRS_KEPT_AT_ONCE])):
                    values = self.compute_reference(self.model_wrapped, batch)
                    found += zip(batch["pair"].tolist(), values.tolist(), strict=True)
            keys, values = zip(*gather_object(found), strict=True)
            references.add(np.array(keys, np.int64), np.array(values, np.float32))
            if is_main_process and references.file is not None:
                references.save()

    def losses_of(self, model, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of a batch: its pairs' losses, summed; the chosen replies' cross-entropy, summed; and what is measured.

        The last has shape (pairs, len(MEASURED) + 1), without gradient, and ends with 1 for a pair, 0 for none.
        """
        reference = self.reference_log_probabilities(model, batch)
        policy = self.log_probabilities(model, batch).view(-1, 2)
        tokens = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(1).view(-1, 2)
        losses, rewards = preference_losses(policy, reference, tokens, self.args)
        is_pair = (tokens[:, 0] > 0).float()
        loss, cross_entropy, policy = (losses * is_pair).sum(), -policy[:, 0].sum(), policy.detach()
        margins = rewards[:, 0] - rewards[:, 1]
        is_tie = margins.abs() < self.args.beta * ROUNDING
        accuracies = torch.where(is_tie, 0.5, (margins > 0).float())
        measured = [losses.detach(), *rewards.T, margins, accuracies, *policy.T, (policy - reference).mean(1)]
        return loss, cross_entropy, torch.stack([*measured, torch.ones_like(is_pair)], 1) * is_pair[:, None]

    def _get_num_items_in_batch(self, batch_samples: list[dict], device) -> torch.Tensor:
        """Pairs and tokens of chosen replies over all ranks and accumulation steps, shape (2,)."""
        targets = [batch["labels"][::2, 1:] != IGNORE_INDEX for batch in batch_samples]
        counts = [(chosen.any(1).sum(), chosen.sum()) for chosen in targets]
        return self.accelerator.reduce(torch.tensor(counts, dtype=torch.float, device=device).sum(0))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the pairs of the global batch, of which this rank adds its share.

        Args:
            num_items_in_batch: what `_get_num_items_in_batch` counts.
        """
        loss, cross_entropy, measured = self.losses_of(model, inputs)
        self.sums += measured.sum(0)
        pairs, chosen_tokens = num_items_in_batch
        loss = loss / pairs + self.args.rpo_alpha * cross_entropy / chosen_tokens
        # Gradients are averaged over the ranks, so each share is as many times larger.
        return loss * self.args.world_size

    def means_of(self, sums: torch.Tensor) -> dict[str, float]:
        """What was measured, as means over the pairs of all ranks."""
        *totals, pairs = self.accelerator.reduce(sums).tolist()
        return {name: total / pairs for name, total in zip(MEASURED, totals, strict=True)} if pairs else {}

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """The means of MEASURED over all pairs, whatever rank holds them, and the chosen replies' perplexity.

        Where the pairs are of several files, each file's reward accuracy and log-probabilities too.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        files = sorted(set(map(name_of_file, rows["source"])))
        if self.needs_reference and self.args.precompute_ref_log_probs:
            self.precompute_references(rows)
        self.model_wrapped.eval()
        sums = torch.zeros(len(files), len(MEASURED) + 1, device=self.args.device)
        cross_entropy = torch.zeros(2, device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in self.get_eval_dataloader(rows):
                _, chosen, measured = self.losses_of(self.model_wrapped, batch)
                for source, of_pair in zip(batch["source"], measured, strict=True):
                    if of_pair[-1]:
                        sums[files.index(name_of_file(source))] += of_pair
                cross_entropy += torch.stack([chosen, (batch["labels"][::2, 1:] != IGNORE_INDEX).sum()])
        chosen, tokens = self.accelerator.reduce(cross_entropy).tolist()
        means = self.means_of(sums.sum(0))
        means["loss"] = means["preference_loss"] + self.args.rpo_alpha * chosen / tokens
        means["perplexity"] = math.exp(min(chosen / tokens, 700))  # no float holds more
        if len(files) > 1:
            for name, of_file in zip(files, sums, strict=True):
                means |= {f"{name}/{key}": value for key, value in self.means_of(of_file).items() if key in BY_FILE}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs, start_time=None):
        if "loss" in logs:
            means = self.means_of(self.sums)
            self.sums.zero_()
            logs = means | logs
        super().log(logs, start_time)


class ReferenceLogProbabilities:
    """The reference's log-probabilities by pair, kept in a file: keys of shape (pairs,), values of (pairs, 2), fp32.

    Key 0 is that of an empty batch, which has 0 for its values.
    """

    def __init__(self, file):
        self.file, self.keys, self.values = file, np.zeros(1, np.int64), np.zeros((1, 2), np.float32)
        if file is not None and file.exists():
            with np.load(file) as saved:
                self.add(saved["keys"], saved["values"])

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The values of these pairs, shape (pairs, 2).

        Raises:
            KeyError: one is unknown.
        """
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        if (self.keys[places] != keys).any():
            raise KeyError("a pair whose reference log-probabilities were not computed")
        return self.values[places]

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        self.keys, first = np.unique(np.concatenate([self.keys, keys]), return_index=True)
        self.values = np.concatenate([self.values, values])[first]

    def save(self) -> None:
        """Under its name once it is whole, so that a crash leaves no half of it."""
        unfinished = self.file.with_suffix(".unfinished.npz")
        np.savez(unfinished, keys=self.keys, values=self.values)
        unfinished.replace(self.file)


class PrecomputeReferences(TrainerCallback):
    """Before the first step: the reference's log-probabilities of all pairs.

    They depend on the pair's ids and the model alone, so they are found again after shuffling, in another run and on
    another number of ranks. No random number is drawn.
    """

    def __init__(self, trainer: DPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        references = self.trainer.references  # the first process's, of which other machines have no copy
        references.keys, references.values = broadcast_object_list([references.keys, references.values])
        for rows in (self.trainer.train_dataset, self.trainer.eval_dataset):
            if rows is not None:
                self.trainer.precompute_references(rows)
