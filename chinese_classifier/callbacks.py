"""What the Trainer calls on its way: complete checkpoints, early stopping that outlives a resume, speed."""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import time
from pathlib import Path

from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback

from checkpoint import seal_checkpoint


class CompleteCheckpoints(TrainerCallback):
    """Seals a checkpoint once all processes have finished their part of it; then old ones may go."""

    def __init__(self, accelerator, save_total_limit: int | None):
        self.accelerator, self.save_total_limit = accelerator, save_total_limit

    def on_save(self, args, state, control, **kwargs):
        self.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            best = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None
            seal_checkpoint(Path(args.output_dir, f"checkpoint-{state.global_step}"), self.save_total_limit, best)


class EarlyStopping(EarlyStoppingCallback):
    """Transformers' own; a resumed run goes on counting the evaluations without a better loss."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.get(type(self).__name__, self.state())
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]


class SpeedProgress(ProgressCallback):
    """The Trainer's progress bar, with the loss and the tokens per second beside the remaining time."""

    def __init__(self, tokens_per_epoch: int):
        super().__init__()
        self.tokens_per_epoch = tokens_per_epoch

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.start, self.start_epoch = time.time(), state.epoch or 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None:
            return
        if "loss" in logs:
            tokens = (state.epoch - self.start_epoch) * self.tokens_per_epoch
            speed = tokens / (time.time() - self.start)
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", tokens_per_s=f"{speed:,.0f}")
        elif "eval_loss" in logs:
            self.training_bar.write(f"epoch {state.epoch or 0:5.2f}   validation loss {logs['eval_loss']:.4f}")
