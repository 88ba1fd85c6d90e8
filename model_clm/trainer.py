"""The stock Trainer on batches assigned by their tokens, its loss over the supervised tokens of the global batch."""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from batch import BalancedBatchSampler, collate, pack_best_fit
from callbacks import CompleteCheckpoints
from data import IGNORE_INDEX, column
from rows import UserError

NOT_TAKEN = {
    "compute_loss_func": "change SFTTrainer.loss_of_logits, which needs no mean of its own",
    "compute_metrics": "evaluate measures loss and perplexity; add yours to its metrics",
}


class SFTTrainer(Trainer):
    """The stock Trainer on batches assigned by their tokens, its loss over the supervised tokens of the global batch.

    - `loss_of_logits`, `summed_loss`, `compute_loss`: the plain step, one loss for any number of ranks, accumulation
      steps and bins; `fast_path.FastPath` puts a faster one in the place of `summed_loss`
    - `get_train_dataloader`, `get_eval_dataloader`: one share for each rank
    - `evaluate`: the exact mean over all supervised tokens of the validation rows, or of other rows

    Raises:
        FloatingPointError: the loss is not a number.
        NotImplementedError: an argument or a method of Trainer's that would not be used.
    """

    batch_columns = ["input_ids", "labels"]

    def __init__(self, *args, packing: int | None = None, data_collator=collate, **kwargs):
        """packing: tokens of a bin, or None."""
        for name, reason in NOT_TAKEN.items():
            if kwargs.get(name) is not None:
                raise NotImplementedError(f"{name} is not taken: {reason}")
        super().__init__(*args, data_collator=data_collator, **kwargs)
        self.packing, self.collate_rows = packing, data_collator
        self.model_accepts_loss_kwargs = True  # the loss below is divided by num_items_in_batch
        self.add_callback(CompleteCheckpoints(self.accelerator, self.args.save_total_limit))
        # The stock rotation removes the old checkpoint before the new one is complete.
        self.args.save_total_limit = None
        self.add_callback(CheckPadding(self))

    def loss_of_logits(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy, a scalar in fp32; another loss is written here, and the fast path keeps to it.

        Args:
            logits: shape (..., vocabulary).
            targets: shape (...), the token that each position predicts, -100 where nothing is supervised.
        """
        logits, targets = logits.flatten(0, -2).float(), targets.flatten()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")

    def summed_loss(self, model, batch: dict) -> torch.Tensor:
        """The loss of a batch of `collate`, summed over its supervised tokens."""
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits
        return self.loss_of_logits(logits[:, :-1], batch["labels"][:, 1:])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the supervised tokens of the global batch, of which this rank adds its share.

        Args:
            num_items_in_batch: supervised tokens over all ranks and accumulation steps.
        """
        # Gradients are averaged over the ranks, so each share is as many times larger.
        return self.summed_loss(model, inputs) / num_items_in_batch * self.args.world_size

    def build_dataloader(self, dataset, batch_size: int, num_batches_per_step: int, shuffle: bool) -> DataLoader:
        """This rank's batches; the sampler has shared them out already, so Accelerate must not do so again."""
        lengths = column(dataset, "length")
        sampler = BalancedBatchSampler(
            lengths,
            pack_best_fit(lengths, self.packing) if self.packing and shuffle else [[i] for i in range(len(lengths))],
            batch_size,
            num_batches_per_step,
            self.args.world_size,
            self.args.process_index,
            self.args.seed,
            shuffle,
        )
        loader = DataLoader(
            dataset.select_columns(self.batch_columns),
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # its own, so that opening a loader never moves the model's random numbers
        )
        return prepare_data_loader(
            loader, device=self.args.device, num_processes=1, process_index=0, put_on_device=True
        )

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        return self.build_dataloader(
            self.train_dataset, args.per_device_train_batch_size, args.gradient_accumulation_steps, shuffle=True
        )

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return self.build_dataloader(dataset, self.args.per_device_eval_batch_size, 1, shuffle=False)

    def _run_epoch(self, *args, **kwargs):
        """One epoch; none after a checkpoint that is the run's last, where the Trainer would take a step more."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Loss and perplexity over all supervised tokens of the rows, whatever rank holds them.

        Args:
            eval_dataset: other rows than the validation rows, as `data.load_encoded` returns them.
        """
        metrics = self.metrics_of(self.eval_dataset if eval_dataset is None else eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def metrics_of(self, rows) -> dict[str, float]:
        loss_sum, tokens = self.sum_losses(rows)
        loss = loss_sum / tokens
        return {"loss": loss, "perplexity": math.exp(min(loss, 700))}  # no float holds more

    def sum_losses(self, rows) -> tuple[float, float]:
        """The summed loss of rows on all ranks, and their supervised tokens."""
        self.model_wrapped.eval()
        total = torch.zeros(2, device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in self.get_eval_dataloader(rows):
                total[0] += self.summed_loss(self.model_wrapped, batch)
                total[1] += (batch["labels"] != IGNORE_INDEX).sum()
        loss_sum, tokens = self.accelerator.reduce(total).tolist()
        return loss_sum, tokens

    def evaluate_at_the_end(self) -> None:
        """The validation loss of the last step, unless it is known; the best checkpoint's is."""
        measured = {entry["step"] for entry in self.state.log_history if "eval_loss" in entry}
        step = self.state.best_global_step if self.args.load_best_model_at_end else self.state.global_step
        if self.eval_dataset is not None and step not in measured:
            self.evaluate()

    def predict(self, *args, **kwargs):
        raise NotImplementedError("predict is not taken: infer.py asks the trained model, evaluate measures other rows")

    def rows_apart(self, batch: dict) -> Iterator[dict]:
        """The examples of a batch, each as a batch of its own without padding."""
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            yield {name: values[row : row + 1, :length] for name, values in batch.items()}

    def shorten(self, row: dict, tokens: int) -> dict:
        """A training row cut to its first tokens, all of them supervised."""
        ids = row["input_ids"][:tokens]
        return {"input_ids": ids, "labels": ids}

    def short_examples(self) -> list[dict]:
        return [self.shorten(row, 64) for row in itertools.islice(self.train_dataset, 3)]

    def refuse_padding_that_changes_the_loss(self) -> None:
        """Raises UserError where padded batches are not their rows: CPM-Ant hides id 0 wherever it stands, say."""
        args, batch = self.args, self._prepare_inputs(self.collate_rows(self.short_examples()))
        self.model_wrapped.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            apart = sum(self.summed_loss(self.model_wrapped, row) for row in self.rows_apart(batch))
            padded = self.summed_loss(self.model_wrapped, batch)
        if not torch.allclose(padded, apart, rtol=1e-2 if args.bf16 or args.fp16 else 1e-4):
            raise UserError(
                f"this model has another loss on padded batches ({padded:.5g} in place of {apart:.5g}). Give "
                "--per_device_train_batch_size 1 --per_device_eval_batch_size 1, and --gradient_accumulation_steps."
            )

    def log(self, logs, start_time=None):
        """Tensors become their numbers, since trainer_state.json can't hold them (transformers#30038)."""
        logs = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in logs.items()}
        if not math.isfinite(logs.get("loss", logs.get("eval_loss", 0))):
            raise FloatingPointError("the loss is not a number: lower --learning_rate, or use bf16 in place of fp16")
        super().log(logs, start_time)


class CheckPadding(TrainerCallback):
    """Before the first step: padded batches must be their rows."""

    def __init__(self, trainer: SFTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if max(args.per_device_train_batch_size, args.per_device_eval_batch_size) > 1 or self.trainer.packing:
            self.trainer.refuse_padding_that_changes_the_loss()
