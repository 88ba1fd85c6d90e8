"""One run in one folder: nobody else writes there, only whole checkpoints count, and only the same run goes on."""

import fcntl
import json
import os
import shutil
from pathlib import Path

from transformers import TrainerCallback

from rows import UserError

MANIFEST = "manifest.json"


def lock_output_dir(output_dir: str):
    """Takes the folder for this process; the lock is the open file and ends with the process, however it ends.

    Raises:
        UserError: another run holds it.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    lock = Path(output_dir, ".lock").open("w")  # noqa: SIM115  (held open for as long as the process lives)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{output_dir}: another run is writing there. Wait for it, or give --output_dir / OUTPUT."
        ) from None
    return lock


def list_file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, the manifest left out."""
    return {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }


def is_whole(checkpoint: Path) -> bool:
    """Whether the save came to its end and every file still has the size that it had then."""
    manifest = checkpoint / MANIFEST
    sizes = list_file_sizes(checkpoint)
    return manifest.exists() and all(sizes.get(name) == size for name, size in json.loads(manifest.read_text()).items())


class WholeCheckpoints(TrainerCallback):
    """Writes a checkpoint's manifest once all processes have finished their part of it."""

    def __init__(self, accelerator):
        self.accelerator = accelerator

    def on_save(self, args, state, control, **kwargs):
        self.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            unfinished = checkpoint / f".{MANIFEST}"
            unfinished.write_text(json.dumps(list_file_sizes(checkpoint)))
            os.replace(unfinished, checkpoint / MANIFEST)


def find_checkpoint(output_dir: str, run: dict, overwrite: bool) -> tuple[str | None, list[str]]:
    """The newest whole checkpoint of this run, torn ones after it removed, and what there is to say about it.

    Args:
        run: what makes the run itself (model, data, adapters, batch); kept in the folder as run.json.

    Raises:
        UserError: the folder holds checkpoints of another run, or of another program.
    """
    folder, messages = Path(output_dir), []
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    if overwrite:
        for checkpoint in checkpoints:
            shutil.rmtree(checkpoint)
        checkpoints = []
    run_file = folder / "run.json"
    if checkpoints:
        if not run_file.exists():
            raise UserError(f"{output_dir} holds checkpoints that were not written here; give another --output_dir.")
        before = json.loads(run_file.read_text())
        changed = [
            f"{name} was {before.get(name)}, is {value}" for name, value in run.items() if before.get(name) != value
        ]
        if changed:
            raise UserError(
                f"{output_dir} holds checkpoints of another run: {'; '.join(changed)}. "
                "Give another --output_dir / OUTPUT, or start afresh by --overwrite_output_dir true."
            )
    run_file.write_text(json.dumps(run, indent=2, ensure_ascii=False))
    for checkpoint in checkpoints:
        if is_whole(checkpoint):
            return str(checkpoint), [*messages, f"resuming from {checkpoint}"]
        messages.append(f"{checkpoint} is torn (its save never ended): removed, going back to the one before")
        shutil.rmtree(checkpoint)
    return None, messages
