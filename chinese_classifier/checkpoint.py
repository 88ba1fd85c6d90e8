"""One run in one folder: nobody else writes there, only complete checkpoints count, and only the same run goes on."""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

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


def list_checkpoints(folder: Path) -> list[Path]:
    """The newest first; what else a user keeps there (checkpoint-best, ...) is none of them."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path | str) -> int:
    return int(Path(checkpoint).name.removeprefix("checkpoint-"))


def list_file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, the manifest left out."""
    return {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }


def is_complete(checkpoint: Path) -> bool:
    """Whether the save came to its end and every file still has the size that it had then."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (FileNotFoundError, ValueError):
        return False
    sizes = list_file_sizes(checkpoint)
    return all(sizes.get(name) == size for name, size in manifest.items())


def write_through(path: Path) -> None:
    """Waits until a file, or the names in a folder, would outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def seal_checkpoint(checkpoint: Path, save_total_limit: int | None, best: Path | None = None) -> None:
    """Writes the manifest of a checkpoint that all processes have finished; then the oldest ones may go.

    Args:
        save_total_limit: checkpoints that are kept, this one and `best` among them; None for all.
    """
    sizes = list_file_sizes(checkpoint)
    for name in sizes:
        write_through(checkpoint / name)
    unfinished = checkpoint / f".{MANIFEST}"
    unfinished.write_text(json.dumps(sizes))
    write_through(unfinished)
    os.replace(unfinished, checkpoint / MANIFEST)
    write_through(checkpoint)
    kept = {checkpoint, best or checkpoint}
    others = [old for old in list_checkpoints(checkpoint.parent) if old not in kept]
    for old in others[max(0, save_total_limit - len(kept)) :] if save_total_limit else []:
        shutil.rmtree(old)


def hash_model_files(folder: str) -> str:
    """A hash of a model folder's files, of large ones by samples; empty for a hub id.

    Another model in the same folder is another run, though its files may have the same names and sizes.
    """
    digest, sample = hashlib.sha256(), 1 << 16
    for path in sorted(
        [*Path(folder).glob("*.json"), *Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")]
    ):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for position in range(0, size, max(sample, size // 64)):
                file.seek(position)
                digest.update(file.read(sample))
    return digest.hexdigest()[:16] if Path(folder).is_dir() else ""


def find_checkpoint(output_dir: str, run: dict, overwrite: bool) -> tuple[str | None, bool, list[str]]:
    """The newest complete checkpoint of this run, whether the run has come to its end, and what there is to say.

    Incomplete checkpoints after it are renamed, since Transformers takes each folder of that name for a good one.

    Args:
        run: what makes the run itself (model, data, adapters, batch, schedule); kept in the folder as run.json.

    Raises:
        UserError: the folder holds checkpoints of another run, or of another program.
    """
    folder, messages = Path(output_dir), []
    run_file, report = folder / "run.json", folder / "train_results.json"
    checkpoints = list_checkpoints(folder)
    if overwrite:
        for checkpoint in checkpoints:
            shutil.rmtree(checkpoint)
        checkpoints = []
        run_file.unlink(missing_ok=True)
    if checkpoints and not run_file.exists():
        raise UserError(f"{output_dir} holds checkpoints that were not written here; give another --output_dir.")
    before = json.loads(run_file.read_text()) if run_file.exists() else {}
    changed = [f"{name} was {before.get(name)}, is {value}" for name, value in run.items() if before.get(name) != value]
    if checkpoints and changed:
        raise UserError(
            f"{output_dir} holds checkpoints of another run: {'; '.join(changed)}. "
            "Give another --output_dir / OUTPUT, or start afresh by --overwrite_output_dir true."
        )
    if not changed and report.exists():
        end = f"nothing is left to train: this run came to its end ({report})"
        return None, True, [f"{end}. Start it afresh by --overwrite_output_dir true."]
    report.unlink(missing_ok=True)
    if changed:  # written aside first: half a file would cost the checkpoints that it speaks for
        unfinished = folder / f".{run_file.name}"
        unfinished.write_text(json.dumps(run, indent=2, ensure_ascii=False))
        write_through(unfinished)
        os.replace(unfinished, run_file)
    for checkpoint in checkpoints:
        if is_complete(checkpoint):
            return str(checkpoint), False, [*messages, f"resuming from {checkpoint}"]
        aside = checkpoint.with_name(f"incomplete-{checkpoint.name}")
        messages.append(
            f"{checkpoint} is incomplete (its save never ended): now {aside.name}; going back to the one before"
        )
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
    return None, False, messages
