"""What the Trainer calls on its way: complete checkpoints, early stopping that outlives a resume, speed."""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import time
from pathlib import Path

from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback

from checkpoint import identify_run_folder, seal_checkpoint
from rows import UserError


class CompleteCheckpoints(TrainerCallback):
    """Seals a checkpoint once all processes have finished their part of it; then old ones may go.

    A run that goes on from a checkpoint of its last step has nothing left to train: `should_training_stop` is set
    before the first epoch.
    """

    def __init__(self, accelerator, save_total_limit: int | None):
        self.accelerator, self.save_total_limit = accelerator, save_total_limit

    def on_train_begin(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= state.max_steps
        self.run_folder = identify_run_folder(args.output_dir)

    def on_step_end(self, args, state, control, **kwargs):
        # The losses since the last entry of the history would be lost to whoever goes on from here.
        control.should_log |= control.should_save or control.should_evaluate or control.should_training_stop
        # The Trainer would make the folder again, without its lock and run.json. A notebook has neither.
        is_watched = control.should_save and state.is_world_process_zero and self.run_folder is not None
        if is_watched and identify_run_folder(args.output_dir) != self.run_folder:
            raise UserError(f"{args.output_dir}: was removed while the run went on. Start it again.")

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, **kwargs):
        self.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            best = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None
            seal_checkpoint(Path(args.output_dir, f"checkpoint-{state.global_step}"), self.save_total_limit, best)


class EarlyStopping(EarlyStoppingCallback):
    """Transformers' own; a resumed run goes on counting the evaluations without a better loss (transformers#28544)."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.get(type(self).__name__, self.state())
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience


class SpeedProgress(ProgressCallback):
    """The Trainer's progress bar, with the loss and the tokens, or pairs, per second beside the remaining time."""

    def __init__(self, units_per_epoch: int, unit: str = "tokens"):
        super().__init__()
        self.units_per_epoch, self.unit = units_per_epoch, unit

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.start, self.start_epoch = time.time(), state.epoch or 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None:
            return
        if "loss" in logs:
            units = (state.epoch - self.start_epoch) * self.units_per_epoch
            speed = units / (time.time() - self.start)
            self.training_bar.set_postfix({"loss": f"{logs['loss']:.3f}", f"{self.unit}_per_s": f"{speed:,.0f}"})
        elif "eval_loss" in logs:
            self.training_bar.write(f"epoch {state.epoch or 0:5.2f}   validation loss {logs['eval_loss']:.4f}")
