"""The Trainer's step on windows of tokens: dealt by their number, measured in bits per byte, with WSD's decay."""

import math
import time

import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader

from clm_arguments import WSD
from data import IGNORE_INDEX
from fast_path import FastPath
from rows import UserError
from trainer import SFTTrainer
from windows import WindowSampler, window_collator


class CLMTrainer(SFTTrainer):
    """SFTTrainer's step and checkpoints, on rows that are a pure function of their number.

    `args` is a CLMArguments; `train_dataset` a `windows.TrainingRows`, `eval_dataset` what `windows.validation_rows`
    returns.
    """

    def __init__(self, *args, document_mask: bool = False, **kwargs):
        """document_mask: attention ends where a document does."""
        self.document_mask, self.evaluation_seconds = document_mask, 0.0
        super().__init__(*args, **kwargs)

    def build_window_loader(self, rows, batch_size: int, num_workers: int) -> DataLoader:
        """This rank's batches; the sampler has shared them out already, so Accelerate must not do so again."""
        loader = DataLoader(
            rows,
            batch_sampler=WindowSampler(len(rows), batch_size, self.args.world_size, self.args.process_index),
            collate_fn=window_collator(self.document_mask),
            num_workers=num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # its own, so that opening a loader never moves the model's random numbers
        )
        return prepare_data_loader(
            loader, device=self.args.device, num_processes=1, process_index=0, put_on_device=True
        )

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        return self.build_window_loader(
            self.train_dataset, args.per_device_train_batch_size, args.dataloader_num_workers
        )

    def loss_of_logits(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy; in training, plus z_loss x log(Z)^2, which keeps the logits' scale from drifting.

        Source: Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways" (2022).
        """
        loss = super().loss_of_logits(logits, targets)
        if self.args.z_loss and torch.is_grad_enabled():
            log_z = logits.float().logsumexp(-1)[targets != IGNORE_INDEX]
            loss = loss + self.args.z_loss * log_z.square().sum()
        return loss

    def create_optimizer(self, *args, **kwargs):
        """The Trainer's, with rates of their own for table and head where they are asked for."""
        optimizer = super().create_optimizer(*args, **kwargs)
        rates = {"embedding_learning_rate": self.model.get_input_embeddings().weight}
        rates["head_learning_rate"] = self.model.get_output_embeddings().weight
        for name, weight in rates.items():
            if (rate := getattr(self.args, name)) is not None:
                split_off(optimizer, weight, rate)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """The Trainer's; for WSD, with the steps of its decay."""
        if self.args.lr_scheduler_type == WSD:
            steps = self.args.decay_steps
            steps = math.ceil(num_training_steps * steps) if steps < 1 else int(steps)
            warmup = self.args.get_warmup_steps(num_training_steps)
            if warmup + steps > num_training_steps:
                raise UserError(
                    f"--decay_steps {steps}: with {warmup} of --warmup_steps, that is more than the run's "
                    f"{num_training_steps} steps."
                )
            kwargs = {"decay_type": "1-sqrt"} | (self.args.lr_scheduler_kwargs or {})
            self.args.lr_scheduler_kwargs = kwargs | {"num_decay_steps": steps}
        return super().create_scheduler(num_training_steps, optimizer)

    def measure(self, rows) -> dict[str, float]:
        """Loss, perplexity and bits per byte of one source's validation rows, whatever rank holds them."""
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in self.build_window_loader(rows, self.args.per_device_eval_batch_size, num_workers=0):
                total[0] += self.summed_loss(self.model_wrapped, batch)
                total[1] += (batch["labels"] != IGNORE_INDEX).sum()
        nats, tokens = self.accelerator.reduce(total).tolist()
        return {"nats": nats, "tokens": tokens, "bytes": rows.bytes}

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Loss, perplexity and bits per byte over every validation token, of each source and of all of them."""
        start = time.perf_counter()
        self.model_wrapped.eval()
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        sums = {source: self.measure(rows) for source, rows in dataset.items()}
        means = means_of(list(sums.values()))
        for source, of_source in sums.items():
            means |= {f"{source}/{name}": value for name, value in means_of([of_source]).items()}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.evaluation_seconds += time.perf_counter() - start
        return metrics


def means_of(sums: list[dict]) -> dict[str, float]:
    """Sources together: loss a token, perplexity, and bits per byte of the raw texts."""
    nats, tokens, size = (sum(of_source[name] for of_source in sums) for name in ("nats", "tokens", "bytes"))
    loss = nats / max(tokens, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": nats / math.log(2) / size}


def split_off(optimizer: torch.optim.Optimizer, weight: nn.Parameter, rate: float) -> None:
    """Moves a parameter into a group of its own, with another learning rate."""
    for group in optimizer.param_groups:
        kept = [parameter for parameter in group["params"] if parameter is not weight]
        if len(kept) < len(group["params"]):
            own = {name: value for name, value in group.items() if name != "params"}
            group["params"] = kept
            optimizer.add_param_group(own | {"params": [weight], "lr": rate})
            return


class CLMFastPath(FastPath):
    """FastPath, whose head knows the cross-entropy alone."""

    def chunk_head(self, undo) -> None:
        if self.trainer.args.z_loss:
            raise ValueError("--z_loss needs them")
        super().chunk_head(undo)


@torch.no_grad()
def continue_texts(trainer: CLMTrainer, tokenizer, count: int, length: int) -> list[dict]:
    """Continuations of the beginnings of some validation windows, sampled, with what really follows.

    All ranks take part: under ZeRO-3 each has a part of the model.
    """
    texts = []
    rows = list(trainer.eval_dataset.values())
    prompt, new = max(1, min(32, length // 4)), min(96, length // 2)
    trainer.model.eval()
    for number in range(count):
        of_source = rows[number % len(rows)]
        ids = of_source[(number + 1) * len(of_source) // (count + 1)]["input_ids"][: prompt + new]
        if len(ids) < 2:
            continue
        start = torch.tensor([ids[:prompt]], device=trainer.args.device)
        torch.manual_seed(trainer.args.seed)
        found = trainer.model.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=new,
            do_sample=True,
            temperature=0.8,
            top_p=0.9,
            pad_token_id=tokenizer.eos_token_id,
            synced_gpus=trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3,
        )
        parts = ids[:prompt], found[0, len(start[0]) :].tolist(), ids[prompt:]
        texts.append(dict(zip(("prompt", "continuation", "original"), map(tokenizer.decode, parts), strict=True)))
    return texts
