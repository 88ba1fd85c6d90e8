"""The stock Trainer on padding-free batches, with the loss over the supervised tokens of the global batch."""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import math

import torch
import torch.nn.functional as F
from accelerate.data_loader import prepare_data_loader
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from batch import BalancedBatchSampler, collate_padding_free, pack_best_fit
from callbacks import CompleteCheckpoints
from data import IGNORE_INDEX, column
from layers import install_supervised_head, layers_attend_only, remember_less
from rows import UserError


class SFTTrainer(Trainer):
    """The stock Trainer on padding-free batches, with the loss over the supervised tokens of the global batch.

    - `get_train_dataloader`, `get_eval_dataloader`: batches assigned by tokens, one share for each rank
    - `summed_loss`, `compute_loss`: the same loss for any number of ranks, accumulation steps and bins
    - `evaluate`: the exact mean over all supervised tokens to validate on
    - `choose_fast_path`: keeps padding-free batches and the supervised head only where they give the model's own loss

    Raises:
        FloatingPointError: the loss is not a number.
    """

    def __init__(self, *args, packing: int | None = None, pad: bool = False, **kwargs):
        """packing: tokens of a bin, or None; pad: padded batches (slower, same loss)."""
        super().__init__(*args, data_collator=collate_padding_free, **kwargs)
        self.packing, self.padding_free, self.try_padding_free = packing, not pad, not pad
        self.model_accepts_loss_kwargs = True  # the loss below is divided by num_items_in_batch
        self.head = install_supervised_head(self.model)
        if not self.args.gradient_checkpointing:  # which remembers less still
            remember_less(self.model, self.head)
        self.add_callback(CompleteCheckpoints(self.accelerator, self.args.save_total_limit))
        self.args.save_total_limit = (
            None  # the stock rotation removes the old checkpoint before the new one is complete
        )
        self.add_callback(ChooseFastPath(self))

    def _run_epoch(self, *args, **kwargs):
        """One epoch; none after a checkpoint that is the run's last, where the Trainer would take a step more."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

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
            dataset.select_columns(["input_ids", "labels"]),
            batch_sampler=sampler,
            collate_fn=collate_padding_free,
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
        return self.build_dataloader(self.eval_dataset, self.args.per_device_eval_batch_size, 1, shuffle=False)

    def summed_loss(self, model, inputs: dict) -> torch.Tensor:
        """Summed cross-entropy of a batch of `collate_padding_free`, a scalar in fp32."""
        inputs = dict(inputs)
        targets = F.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORE_INDEX)
        lengths = inputs["cu_seq_lens_q"].diff().tolist()
        if self.padding_free:
            inputs["sequence_lengths"] = lengths
        else:
            unpack = [(inputs["input_ids"], 0), (torch.ones_like(targets), 0), (targets, IGNORE_INDEX)]
            input_ids, attention_mask, targets = (
                pad_sequence(flat[0].split(lengths), batch_first=True, padding_value=padding)
                for flat, padding in unpack
            )
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.head is None:
            logits = model(**inputs, use_cache=False).logits.float()
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        self.head.targets = targets
        try:
            return model(**inputs, use_cache=False).logits
        finally:
            self.head.targets = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the supervised tokens of the global batch, of which this rank adds its share.

        Args:
            num_items_in_batch: supervised tokens over all ranks and accumulation steps.
        """
        # Gradients are averaged over the ranks, so each share is as many times larger.
        return self.summed_loss(model, inputs) / num_items_in_batch * self.args.world_size

    def choose_fast_path(self) -> None:
        """Compares the fast ways with the model's own loss on a few examples and drops what is not the same.

        Raises:
            UserError: --packing, and this model's examples contaminate each other in a bin.
        """
        examples = [{"input_ids": ids[:128], "labels": ids[:128]} for ids in self.train_dataset[:3]["input_ids"]]
        batch = self._prepare_inputs(collate_padding_free(examples))
        self.model_wrapped.eval()
        model, head = self.model_wrapped, self.head
        self.own_attention = self.model.config._attn_implementation
        half = self.args.bf16 or self.args.fp16

        def same_loss() -> bool:
            return torch.allclose(self.summed_loss(model, batch), own_loss, rtol=1e-2 if half else 1e-4)

        with torch.no_grad(), self.compute_loss_context_manager():
            self.padding_free, self.head = False, None
            own_loss = self.summed_loss(model, batch)
            self.head = head
            if head is not None and not same_loss():
                self.head = None
            if self.try_padding_free and layers_attend_only(self.model.config) and self.model.is_backend_compatible():
                try:
                    if not self.own_attention.startswith("flash"):
                        self.model.set_attn_implementation("packed_sdpa")
                    self.padding_free = True
                    if not same_loss() or self.examples_contaminate(rtol=1e-3 if half else 1e-5):
                        self.leave_fast_path()
                except (NotImplementedError, ValueError):  # it has what SDPA lacks, or refuses another function
                    self.leave_fast_path()
        if self.packing and not self.padding_free:
            raise UserError(
                "--packing true: this model's attention can't be kept within an example of a bin; leave it out"
            )

    def examples_contaminate(self, rtol: float) -> bool:
        """Whether the first tokens of an example have another loss once another example stands before them."""
        before = self.train_dataset[0]["input_ids"][:32]
        after = self.train_dataset[-1]["input_ids"][:32]
        loss = []
        for neighbour in (before, before[::-1]):
            unsupervised = {"input_ids": neighbour, "labels": [IGNORE_INDEX] * len(neighbour)}
            batch = collate_padding_free(
                [unsupervised, {"input_ids": after, "labels": after[:4] + [IGNORE_INDEX] * len(after[4:])}]
            )
            loss.append(self.summed_loss(self.model_wrapped, self._prepare_inputs(batch)))
        return not torch.allclose(*loss, rtol=rtol)

    def leave_fast_path(self) -> None:
        """Padded batches and the model's own attention, with which it also generates."""
        self.padding_free = False
        if self.model.config._attn_implementation != self.own_attention:
            self.model.set_attn_implementation(self.own_attention)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Loss and perplexity over all supervised tokens of the validation rows, whatever rank holds them."""
        self.model_wrapped.eval()
        total = torch.zeros(2, device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in self.get_eval_dataloader():
                total[0] += self.summed_loss(self.model_wrapped, batch)
                total[1] += (batch["labels"] != IGNORE_INDEX).sum()
        loss_sum, tokens = self.accelerator.reduce(total).tolist()
        loss = loss_sum / tokens
        metrics = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700))}  # no float holds more
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluate_at_the_end(self) -> None:
        """The validation loss of the last step, unless it is known; the best checkpoint's is."""
        measured = {entry["step"] for entry in self.state.log_history if "eval_loss" in entry}
        step = self.state.best_global_step if self.args.load_best_model_at_end else self.state.global_step
        if self.eval_dataset is not None and step not in measured:
            self.evaluate()

    def log(self, logs, start_time=None):
        """Tensors become their numbers, since trainer_state.json can't hold them."""
        logs = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in logs.items()}
        if not math.isfinite(logs.get("loss", logs.get("eval_loss", 0))):
            raise FloatingPointError("the loss is not a number: lower --learning_rate, or use bf16 in place of fp16")
        super().log(logs, start_time)


class ChooseFastPath(TrainerCallback):
    """Takes the fast path once the model is wrapped for its devices, and leaves the model as it was found."""

    def __init__(self, trainer: SFTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.choose_fast_path()
        if state.is_world_process_zero and self.trainer.try_padding_free and not self.trainer.padding_free:
            print("note        this model's attention can't be kept within a sequence: padded batches")
        if state.is_world_process_zero and self.trainer.head is None:
            print("note        this model's head does more than a matrix product: logits of whole batches")

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.leave_fast_path()
