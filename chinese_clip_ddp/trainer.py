"""The stock Trainer on global batches of pairs: the contrastive loss over all ranks, retrieval as its validation."""

import math
import time

import numpy as np
import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from batch import BATCH_COLUMNS, PairBatchSampler
from callbacks import CompleteCheckpoints, SpeedProgress
from contrastive import contrastive_loss
from data import column
from evaluate_retrieval import evaluate_galleries
from freeze import frozen_modules
from gradcache import gradcache_backward
from zero import batch_norms_in_fp32, clamp_master, scalars_as_vectors, whole

NOT_TAKEN = {
    "compute_loss_func": "change contrastive.contrastive_loss",
    "compute_metrics": "evaluate_retrieval.evaluate_galleries measures retrieval; add yours to its metrics",
}
MAX_LOGIT_SCALE = math.log(100)  # Radford et al., "Learning Transferable Visual Models" (2021), 2.5
FOR_THE_LOSS = ("image_ids", "caption_ids", "rows", "share_of_step")


class CLIPTrainer(Trainer):
    """The stock Trainer on global batches of pairs, with the contrastive loss over all ranks.

    - `build_dataloader`: each rank's share of a global batch, which no batch is short of but an epoch's last
    - `compute_loss`: one loss for any number of ranks, micro-batches weighted by their pairs
    - `create_optimizer`: a rate for each tower, no weight decay for scalars, biases and norms
    - `evaluate`: recall in each gallery

    Raises:
        FloatingPointError: a tower's output, or the loss, is not a number.
        NotImplementedError: an argument or a method of Trainer's that would not be used.
    """

    def __init__(self, *args, image_processor, pixels, **kwargs):
        """
        Args:
            eval_dataset: name -> pairs, of each gallery; None without any.
            pixels: batch.Pixels, for the galleries.
        """
        for name, reason in NOT_TAKEN.items():
            if kwargs.get(name) is not None:
                raise NotImplementedError(f"{name} is not taken: {reason}")
        super().__init__(*args, **kwargs)
        self.image_processor, self.pixels = image_processor, pixels
        self.features = {}  # "image_features" or "text_features" -> features.Features of a frozen tower
        self.frozen = frozen_modules(self.model)
        self.scalars = scalars_as_vectors(self.model) if self.args.deepspeed else {}
        if self.args.deepspeed:
            batch_norms_in_fp32(self.model)
        self.loss_is_scaled_for_ga = True  # by share_of_step
        self.counts, self.evaluation_seconds = {}, 0.0
        self.add_callback(CompleteCheckpoints(self.accelerator, self.args.save_total_limit))
        self.args.save_total_limit = None  # the stock rotation removes the old before the new one is complete
        if self.args.cross_embedding != "sigmoid":  # whose scale has no bound: SigLIP's own is 118
            self.add_callback(ClampLogitScale())

    # -------------------------------------------------------------------------------------------------- batches
    def build_dataloader(self, dataset, batch_size: int, shuffle: bool) -> DataLoader:
        """This rank's batches; the sampler has shared them out already, so Accelerate must not do so again."""
        sampler = PairBatchSampler(
            column(dataset, "group"),
            batch_size,
            self.args.world_size,
            self.args.process_index,
            self.args.seed,
            shuffle,
        )
        loader = DataLoader(
            dataset.select_columns(BATCH_COLUMNS),
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
        return self.build_dataloader(self.train_dataset, self.args.per_device_train_batch_size, shuffle=True)

    def get_batch_samples(self, epoch_iterator, num_batches: int, device):
        """The micro-batches of a step, each with the share of the step's pairs that it has over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        shares = [1.0]
        if len(batches) > 1:
            pairs = torch.tensor([len(batch["image_ids"]) for batch in batches], device=device)
            pairs = self.accelerator.reduce(pairs, "sum")
            shares = (pairs / pairs.sum()).tolist()
        for batch, share in zip(batches, shares, strict=True):
            batch["share_of_step"] = share
        return batches, None

    def _run_epoch(self, *, epoch: int, **kwargs):
        """One epoch; none after a checkpoint that is the run's last, where the Trainer would take a step more."""
        if not self.control.should_training_stop:
            self.data_collator.set_epoch(epoch)
            super()._run_epoch(epoch=epoch, **kwargs)

    # -------------------------------------------------------------------------------------------------- the step
    def split_batch(self, batch: dict) -> tuple[dict, dict]:
        """What goes into the towers, and what the loss needs; a frozen tower's features take its input's place."""
        of_loss = {name: batch[name] for name in FOR_THE_LOSS}
        of_towers = {name: value for name, value in batch.items() if name not in FOR_THE_LOSS}
        for name, features in self.features.items():
            of_towers[name] = self._prepare_input(features.of(batch["rows"]))
        return of_towers, of_loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the pairs of the global batch, of which this rank adds its share."""
        for module in self.frozen:  # no dropout and no new statistics there, as in its cached features
            module.eval()
        of_towers, of_loss = self.split_batch(inputs)
        return self.loss_of_embeddings(*model(**of_towers), of_loss)

    def loss_of_embeddings(self, image_embeds, text_embeds, logit_scale, logit_bias, of_loss: dict) -> torch.Tensor:
        """This rank's share of the loss of a step, as many times larger as DDP's averaging makes it smaller.

        Args:
            image_embeds, text_embeds: (n, d), or (1, d) of a dummy where this rank has no pair.
        """
        pairs = len(of_loss["image_ids"])
        image_embeds, text_embeds = image_embeds[:pairs], text_embeds[:pairs]
        self.refuse_numbers_that_are_none(image_embeds, text_embeds, of_loss["rows"])
        share, counts = contrastive_loss(
            self.args.cross_embedding,
            image_embeds,
            text_embeds,
            logit_scale,
            logit_bias,
            of_loss["image_ids"],
            of_loss["caption_ids"],
            self.args.same_caption,
            self.args.loss_block_size,
        )
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count.detach()
        return share * of_loss["share_of_step"] * self.args.world_size

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The Trainer's; or by GradCache, which has done the backward passes when it returns."""
        if self.args.gradcache_chunk_size is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        for module in self.frozen:
            module.eval()
        of_towers, of_loss = self.split_batch(self._prepare_inputs(inputs))
        loss = gradcache_backward(
            model,
            lambda towers, chunk: towers(**chunk),
            of_towers,
            self.args.gradcache_chunk_size,
            lambda *embeddings: self.loss_of_embeddings(*embeddings, of_loss),
        )
        return loss

    def refuse_numbers_that_are_none(self, image_embeds, text_embeds, rows) -> None:
        """Raises FloatingPointError that names the tower, the step and the rows of the batch."""
        if torch.isfinite(image_embeds.sum() + text_embeds.sum()):
            return
        tower = "vision" if not torch.isfinite(image_embeds).all() else "text"
        places = np.searchsorted(column(self.train_dataset, "row"), rows.cpu().numpy())
        sources = self.train_dataset.select(places)["source"][:]
        raise FloatingPointError(
            f"step {self.state.global_step + 1}: the output of the {tower} encoder is not a number. An earlier step "
            f"broke its weights (lower --learning_rate or --{tower}_learning_rate; use bf16 in place of fp16), or one "
            f"of this batch does it: {', '.join(sources[:8])}{', ...' if len(sources) > 8 else ''}"
        )

    def create_optimizer(self, model=None):
        """The Trainer's optimizer with a rate for each tower; no weight decay for scalars, vectors, biases and norms.

        Source: weight decay on the temperature pulls it to 1 (open_clip leaves it out too).
        """
        if self.optimizer is None:
            args, decayed = self.args, set(self.get_decay_parameter_names(self.model))
            rates = {"vision": args.vision_learning_rate, "text": args.text_learning_rate}
            groups = {}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    is_matrix = parameter.ndim > 1
                    rate = rates.get(name.split("_model.")[0])
                    decay = args.weight_decay if is_matrix and name in decayed else 0.0
                    groups.setdefault((args.learning_rate if rate is None else rate, decay), []).append(parameter)
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(args, self.model)
            self.optimizer = optimizer_class(
                [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()],
                **settings,
            )
        return self.optimizer

    def floating_point_ops(self, inputs):
        return 0  # Transformers' estimate knows one tower only

    # -------------------------------------------------------------------------------------------------- validation
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Recall and more in each gallery (evaluate_retrieval.py), and `eval_mean_recall`, the mean over the galleries.

        Args:
            eval_dataset: other galleries than those to validate on, name -> pairs.
        """
        if dist.is_initialized():  # the statistics of batch norms are each rank's own under ZeRO
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        start, batch_size = time.perf_counter(), self.args.per_device_eval_batch_size
        galleries = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics = evaluate_galleries(self.model, self.processing_class, self.pixels, galleries, batch_size)
        recalls = [value for name, value in metrics.items() if name.endswith("/mean_recall")]
        metrics["eval_mean_recall"] = sum(recalls) / len(recalls)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.evaluation_seconds += time.perf_counter() - start
        return metrics

    def evaluate_at_the_end(self) -> None:
        """The galleries after the last step, unless they are known; the best checkpoint's are."""
        measured = {entry["step"] for entry in self.state.log_history if "eval_mean_recall" in entry}
        step = self.state.best_global_step if self.args.load_best_model_at_end else self.state.global_step
        if self.eval_dataset and step not in measured:
            self.evaluate()

    def predict(self, *args, **kwargs):
        raise NotImplementedError("predict is not taken: infer.py asks the trained model")

    # -------------------------------------------------------------------------------------------------- the log
    def log(self, logs, start_time=None):
        """Beside the loss: in-batch accuracy both ways, pairs of one caption or image, the temperature.

        Tensors become their numbers, since trainer_state.json can't hold them.
        """
        if "loss" in logs and self.counts:
            logs |= self.summed_counts()
        logs = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in logs.items()}
        if not math.isfinite(logs.get("loss", 0)):
            raise FloatingPointError(
                f"step {self.state.global_step}: the loss is not a number though both encoders' outputs are: look at "
                "logit_scale in the log; lower --learning_rate, or use bf16 in place of fp16"
            )
        super().log(logs, start_time)

    def summed_counts(self) -> dict[str, float]:
        """What the steps since the last entry have counted, over all ranks."""
        names = ("pairs", "correct_texts", "correct_images", "same_caption_pairs")
        sums = self.accelerator.reduce(torch.stack([self.counts[name].double() for name in names]), "sum").tolist()
        pairs, texts, images, same = sums
        self.counts = {}
        with whole(self.model.logit_scale), torch.no_grad():
            scale = self.model.logit_scale.exp().item()
        return {
            "accuracy_i2t": texts / pairs,
            "accuracy_t2i": images / pairs,
            "same_caption_pairs": same / pairs,
            "logit_scale": scale,
        }

    def _save(self, output_dir=None, state_dict=None):
        """The Trainer's, and the image processor beside the tokenizer."""
        if state_dict is not None:  # of DeepSpeed
            state_dict = {
                name: weight.reshape(self.scalars[name]) if name in self.scalars else weight
                for name, weight in state_dict.items()
            }
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.image_processor.save_pretrained(output_dir or self.args.output_dir)


# ------------------------------------------------------------------------------------------------------ scalars
def start_logit_bias(model, mode: str, batch_size: int) -> None:
    """Sets a bias that was never trained to log(1 / (N - 1)), at which each pair of a batch of N is as likely as it is.

    Source: -10 in Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023), is that of a batch of 22,000.
    """
    if mode == "sigmoid" and batch_size > 1 and model.logit_bias.item() == 0:
        model.logit_bias.data.fill_(-math.log(batch_size - 1))


class ClampLogitScale(TrainerCallback):
    """After each step."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not model.logit_scale.requires_grad:
            return
        if args.deepspeed:
            clamp_master(model.logit_scale, MAX_LOGIT_SCALE)
        with whole(model.logit_scale, modify=True), torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)


class CLIPProgress(SpeedProgress):
    """SpeedProgress, with what the galleries gave."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and "eval_mean_recall" in logs:
            self.training_bar.write(f"epoch {state.epoch or 0:5.2f}   {describe_metrics(logs)}")


def describe_metrics(metrics: dict) -> str:
    """scenes: i2t_r1 0.970, t2i_r1 0.980; pairs: choices_form 0.950, ...: of each gallery what is looked at first."""
    galleries = {}
    for name, value in metrics.items():
        gallery, _, metric = name.removeprefix("eval_").partition("/")
        if metric.endswith("_r1") or metric.startswith("choices"):
            galleries.setdefault(gallery, []).append(f"{metric} {value:.3f}")
    shown = {name: [part for part in parts if "choices" in part] or parts for name, parts in galleries.items()}
    return "; ".join(f"{name}: {', '.join(parts)}" for name, parts in shown.items())
