"""SFTTrainer on rows with pictures: learning rates of the parts, and what the pictures are worth on held-out rows."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset, Features, concatenate_datasets
from datasets.table import InMemoryTable

from callbacks import SpeedProgress
from collator import LlavaCollator
from pixels import count_image_tokens
from rows import UserError
from trainer import SFTTrainer


class LlavaTrainer(SFTTrainer):
    """SFTTrainer whose batches hold pictures, or a frozen tower's features of them.

    - `create_optimizer`: rates of their own for projector and vision tower
    - `metrics_of`: beside the loss the blind check, the same rows with each other's pictures

    Raises:
        UserError: a rate of a part, and DeepSpeed's config brings an optimizer that would not hear of it.
    """

    batch_columns = ["input_ids", "labels", "images", "image_ids"]

    def __init__(self, *args, data_collator: LlavaCollator, **kwargs):
        super().__init__(*args, data_collator=data_collator, **kwargs)
        args = self.args
        self.rates = {"vision_tower": args.vision_learning_rate, "multi_modal_projector": args.projector_learning_rate}
        self.rates = {part: rate for part, rate in self.rates.items() if rate is not None}
        if self.rates and args.deepspeed and "optimizer" in args.hf_deepspeed_config.config:
            raise UserError(
                "--projector_learning_rate, --vision_learning_rate: the optimizer of DeepSpeed's config has one rate "
                "for all. Take the part `optimizer` out of it, or give ds_zero2_no_offload.json."
            )

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The Trainer's, its groups split by the parts that have a rate of their own; the others come first."""
        optimizer = super().create_optimizer(model)
        part_of = {}
        for name, parameter in self.model.named_parameters():
            part_of[parameter] = next((part for part in self.rates if f"{part}." in name), None)
        groups = []
        for part in (None, *self.rates):
            for group in optimizer.param_groups:
                params = [parameter for parameter in group["params"] if part_of[parameter] == part]
                if params:
                    groups.append(group | {"params": params, "lr": self.rates.get(part, group["lr"])})
        optimizer.param_groups = groups
        return optimizer

    def shorten(self, row: dict, tokens: int) -> dict:
        """A training row cut to its first tokens of text, all supervised; the pictures among them stay whole."""
        collator, ids = self.data_collator, np.array(row["input_ids"])
        end = np.searchsorted((ids != collator.image_token_id).cumsum(), tokens, side="right")
        pictures = (ids[:end] == collator.image_token_id).sum() // collator.image_tokens
        kept = {name: row[name][:pictures] for name in ("images", "image_ids")}
        return kept | {"input_ids": ids[:end].tolist(), "labels": ids[:end].tolist()}

    def rows_apart(self, batch: dict) -> Iterator[dict]:
        """The examples of a batch, each as a batch of its own with its pictures."""
        texts, start = {name: values for name, values in batch.items() if name != "pixel_values"}, 0
        for row in super().rows_apart(texts):
            of_pictures = (row["input_ids"] == self.data_collator.image_token_id).sum().item()
            end = start + of_pictures // self.data_collator.image_tokens
            yield row | ({"pixel_values": batch["pixel_values"][start:end]} if end > start else {})
            start = end

    def metrics_of(self, rows: Dataset) -> dict[str, float]:
        """Loss and perplexity of rows, and, where pictures can be exchanged among them, what these are worth.

        Returns:
            `loss_exchanged`: the loss with other rows' pictures; `image_worth`: by how many nats a supervised token of
            a row with pictures costs more then. A model that doesn't look has 0.
        """
        with_pictures, exchanged, others = exchange_pictures(rows)
        if not len(with_pictures):
            return super().metrics_of(rows)
        own, tokens = self.sum_losses(with_pictures)
        foreign, _ = self.sum_losses(exchanged)
        rest, other_tokens = self.sum_losses(others) if len(others) else (0, 0)
        loss, loss_exchanged = ((some + rest) / (tokens + other_tokens) for some in (own, foreign))
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),
            "loss_exchanged": loss_exchanged,
            "image_worth": (foreign - own) / tokens,
        }


def exchange_pictures(rows: Dataset) -> tuple[Dataset, Dataset, Dataset]:
    """Rows with pictures, the same rows with those of other rows, and the rows for which there are none.

    Always the same ones; none that a row has itself, nor an equal one (its id is that of its content).
    """
    ids_of, images_of = rows["image_ids"][:], rows["images"][:]
    every = [picture for row in zip(ids_of, images_of, strict=True) for picture in zip(*row, strict=True)]
    pool = list({picture[0]: picture for picture in every}.values())
    order = np.random.default_rng(0).permutation(len(pool)).tolist()
    chosen, new, taken = [], [], 0
    for number, own in enumerate(ids_of):
        found = []
        for _ in own:  # as good as a permutation: the next one in a random order that isn't the row's own
            places = (order[(taken + i) % len(order)] for i in range(len(order)))
            found += [next((pool[place] for place in places if pool[place][0] not in own), None)]
            taken += 1
        if own and None not in found:
            chosen.append(number)
            new.append(found)
    others = np.setdiff1d(np.arange(len(rows)), chosen)
    with_pictures = rows.select(chosen)
    if not chosen:
        return with_pictures, with_pictures, rows
    columns = {
        "image_ids": [[number for number, _ in found] for found in new],
        "images": [[image for _, image in found] for found in new],
    }
    pictures = Dataset.from_dict(columns, Features({name: rows.features[name] for name in columns}))
    texts = with_pictures.remove_columns(list(columns)).with_format("arrow")[:]
    exchanged = concatenate_datasets([Dataset(InMemoryTable(texts)), pictures], axis=1)
    return with_pictures, exchanged, rows.select(others)


class LlavaProgress(SpeedProgress):
    """SpeedProgress, with what the pictures are worth."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and "eval_image_worth" in logs:
            exchanged, worth = logs["eval_loss_exchanged"], logs["eval_image_worth"]
            self.training_bar.write(
                f"{' ' * 13}with other rows' pictures {exchanged:.4f}: the image is worth {worth:.4f} nats a token"
            )


class OneMark:
    """Decodes ids as a tokenizer does, a picture's many tokens as one mark."""

    def __init__(self, processor):
        self.tokenizer, self.mark = processor.tokenizer, processor.image_token
        self.whole = self.mark * count_image_tokens(processor)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids).replace(self.whole, self.mark)
