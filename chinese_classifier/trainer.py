"""The stock Trainer on batches of equal token counts, with the loss and the metrics over all examples of all ranks."""

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.data_loader import prepare_data_loader
from sklearn.utils.class_weight import compute_class_weight
from torch.utils.data import DataLoader
from transformers import Trainer

from batch import TokenBudgetSampler, collate_padded
from callbacks import CompleteCheckpoints
from classification_metrics import score_classes
from data import IGNORE_INDEX, column
from rows import UserError


class ClassificationTrainer(Trainer):
    """What is not the stock Trainer's: batches by tokens, one loss for any number of ranks, each row measured once.

    Raises:
        UserError: the loss is not a number, or more than a hundred times that of guessing.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, data_collator=partial(collate_padded, tokenizer=kwargs["processing_class"]), **kwargs)
        self.class_weights = None  # else of mean 1 over the training rows, so that all classes count alike
        if self.args.class_weights == "balanced":
            labels, classes = column(self.train_dataset, "labels"), np.arange(self.model.config.num_labels)
            weights = compute_class_weight("balanced", classes=classes, y=labels)
            self.class_weights = torch.tensor(weights, dtype=torch.float32, device=self.args.device)
        self.model_accepts_loss_kwargs = True  # the loss below is divided by num_items_in_batch
        self.add_callback(CompleteCheckpoints(self.accelerator, self.args.save_total_limit))
        self.args.save_total_limit = None  # the stock rotation removes the old before the new one is complete

    def _run_epoch(self, *args, **kwargs):
        """One epoch; none after a checkpoint that is the run's last, where the Trainer would take a step more."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def build_dataloader(self, dataset, batch_size: int, num_batches: int, shuffle: bool) -> DataLoader:
        """This rank's batches; the sampler has shared them out already, so Accelerate must not do so again."""
        args = self.args
        sampler = TokenBudgetSampler(
            column(dataset, "length"), batch_size, num_batches, args.world_size, args.process_index, args.seed, shuffle
        )
        loader = DataLoader(
            dataset.remove_columns(["length", "cut"]),
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            generator=torch.Generator(),  # its own, so that opening a loader never moves the model's random numbers
        )
        return prepare_data_loader(loader, device=args.device, num_processes=1, process_index=0, put_on_device=True)

    def get_train_dataloader(self) -> DataLoader:
        batch_size, accumulation = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        return self.build_dataloader(self.train_dataset, batch_size, accumulation, shuffle=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the examples of the global batch, of which this rank adds its share.

        Args:
            num_items_in_batch: examples over all ranks and accumulation steps.
        """
        labels = inputs.pop("labels")
        loss = F.cross_entropy(
            model(**inputs).logits.float(),
            labels,
            self.class_weights,
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            label_smoothing=self.args.label_smoothing_factor,
        )
        # Gradients are averaged over the ranks, so each share is as many times larger.
        return loss / num_items_in_batch * self.args.world_size

    def predict_logits(self, dataset) -> np.ndarray:
        """Logits of each row in the order of the dataset, shape (rows, num_labels), fp32, on every rank."""
        numbered = dataset.add_column("row", np.arange(len(dataset)))
        loader = self.build_dataloader(numbered, self.args.per_device_eval_batch_size, 1, shuffle=False)
        logits = torch.zeros(len(dataset), self.model.config.num_labels, device=self.args.device)
        self.model_wrapped.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in loader:
                rows, labels = batch.pop("row", None), batch.pop("labels")
                predicted = self.model_wrapped(**batch).logits.float()
                if labels[0] != IGNORE_INDEX:
                    logits[rows] = predicted
        return self.accelerator.reduce(logits).cpu().numpy()

    def measure(self, logits: np.ndarray, labels: np.ndarray) -> dict:
        """Loss (plain cross-entropy, nats a row), and what classification_metrics.py measures."""
        loss = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)).item()
        return {"loss": loss, **score_classes(labels, logits.argmax(1), self.model.config.num_labels)}

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Loss, accuracy and macro-F1 over all validation rows."""
        scores = self.measure(self.predict_logits(self.eval_dataset), column(self.eval_dataset, "labels"))
        metrics = {f"eval_{name}": scores[name] for name in ("loss", "accuracy", "macro_f1")}
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
        loss, guessing = logs.get("loss", logs.get("eval_loss", 0)), math.log(self.model.config.num_labels)
        if not loss <= 100 * guessing:
            raise UserError(
                f"a loss of {loss:.3g}, where guessing has {guessing:.2f}: lower --learning_rate, or use bf16, not fp16"
            )
        super().log(logs, start_time)
