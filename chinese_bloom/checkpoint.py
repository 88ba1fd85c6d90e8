"""One run in one folder: nobody else writes there, only complete checkpoints count, and only the same run goes on."""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rows import UserError

LOCK, MANIFEST, RUN_FILE, REPORT = ".lock", "manifest.json", "run.json", "train_results.json"

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


def errno_of(error: Exception) -> int | None:
    """The system's number of a write that failed; None for an error of another kind.

    safetensors has it in its text only; torch.save loses it, and what stops its writer is almost always a full disk.
    """
    if isinstance(error, OSError):
        return error.errno
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        return int(number[1])
    return errno.ENOSPC if re.search("inline_container.*(unexpected pos|PytorchStreamWriter)", str(error)) else None


@contextmanager
def explain_write_errors(folder: str, flag: str = "--output_dir / OUTPUT") -> Iterator[None]:
    """A UserError for what a full disk or a missing permission raises, whichever library was writing.

    The other processes lose their connection (gloo) to the one that it happened to; they have nothing to add.

    Args:
        folder: where it writes, for an error that doesn't say.
        flag: how the user names another folder.
    """
    try:
        yield
    except Exception as error:
        if re.search("gloo.*(Connection closed|Connection reset|Broken pipe)", str(error)):
            raise UserError("another process of this run has ended; what it said tells why.") from error
        number = errno_of(error)
        if number not in FULL_DISK + NO_PERMISSION:
            raise
        path = (isinstance(error, OSError) and error.filename) or folder
        if number in FULL_DISK:
            advice = "Free some space and start again; a training goes on from its last complete checkpoint, if any."
        else:
            advice = f"Change its permissions, or give {flag} a folder that can be written to."
        message = f"{path}: {os.strerror(number)}. {advice}"
        if os.environ.get("LOCAL_RANK", "0") != "0":  # the first process, which speaks for all, may not have failed
            print(f"error: {message}", file=sys.stderr)
        raise UserError(message) from error


def lock_output_dir(output_dir: str):
    """Takes the folder for this process; the lock is the open file and ends with the process, however it ends.

    Raises:
        UserError: another run holds it, or nothing can be written there.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        lock = Path(output_dir, LOCK).open("w")  # noqa: SIM115  (held open for as long as the process lives)
    except OSError as error:
        raise UserError(
            f"{output_dir}: can't be written to ({error.strerror}). Give another --output_dir / OUTPUT."
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{output_dir}: another run is writing there. Wait for it, or give --output_dir / OUTPUT."
        ) from None
    return lock


def identify_run_folder(output_dir: str) -> int | None:
    """Another number once a folder was removed, even if it was made again; None where no run is at home.

    The process that holds the lock keeps it open, so that its inode can't become another file's.
    """
    lock = Path(output_dir, LOCK)
    return lock.stat().st_ino if lock.exists() and Path(output_dir, RUN_FILE).exists() else None


def list_checkpoints(folder: Path, prefix: str = "") -> list[Path]:
    """The newest first; what else a user keeps there (checkpoint-best, ...) is none of them.

    Args:
        prefix: "incomplete-" for those that `newest_complete_checkpoint` has put aside.
    """
    prefix += "checkpoint-"
    found = [path for path in folder.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path | str) -> int:
    return int(Path(checkpoint).name.rpartition("-")[2])


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


def replace_file(path: Path, text: str) -> None:
    """Writes a file aside first: half a manifest or half a run.json would cost the checkpoints that it speaks for."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text)
    write_through(unfinished)
    os.replace(unfinished, path)


def share_weights(folder: Path) -> None:
    """Gives weights the permissions of any new file; safetensors writes them for their owner alone (its #782)."""
    umask = os.umask(0)  # it can't be read otherwise
    os.umask(umask)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~umask)


def seal_checkpoint(checkpoint: Path, save_total_limit: int | None, best: Path | None = None) -> None:
    """Writes the manifest of a checkpoint that all processes have finished; then the oldest ones may go.

    Args:
        save_total_limit: checkpoints that are kept, this one and `best` among them; None for all. Incomplete ones
            that were put aside count too and are the first to go.
    """
    share_weights(checkpoint)
    sizes = list_file_sizes(checkpoint)
    for name in sizes:
        write_through(checkpoint / name)
    replace_file(checkpoint / MANIFEST, json.dumps(sizes))
    write_through(checkpoint)
    kept = {checkpoint, best or checkpoint}
    others = [old for old in list_checkpoints(checkpoint.parent) if old not in kept]
    others += list_checkpoints(checkpoint.parent, "incomplete-")
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

    Args:
        run: what makes the run itself (model, data, adapters, batch, schedule); kept in the folder as run.json.

    Raises:
        UserError: the folder holds what another run, or another program, has trained.
    """
    folder = Path(output_dir)
    report = folder / REPORT
    if overwrite:
        remove_run(folder)
    is_new = is_another_run(folder, run)
    if not is_new and report.exists():
        end = f"nothing is left to train: this run came to its end ({report})"
        return None, True, [f"{end}. Start it afresh by --overwrite_output_dir true."]
    if is_new:
        replace_file(folder / RUN_FILE, json.dumps(run, indent=2, ensure_ascii=False))
    checkpoint, messages = newest_complete_checkpoint(folder)
    return checkpoint, False, messages


def remove_run(folder: Path) -> None:
    for checkpoint in [*list_checkpoints(folder), *list_checkpoints(folder, "incomplete-")]:
        shutil.rmtree(checkpoint)
    for name in (RUN_FILE, REPORT):
        (folder / name).unlink(missing_ok=True)


def is_another_run(folder: Path, run: dict) -> bool:
    """Whether a folder's run.json speaks of another run, or is not there.

    Raises:
        UserError: the folder holds what that other run, or another program, has trained.
    """
    run_file, checkpoints = folder / RUN_FILE, list_checkpoints(folder)
    # A run that keeps no checkpoints (--save_strategy no) leaves its model, and a report once that is whole.
    held = "checkpoints" if checkpoints else "the finished model" if (folder / REPORT).exists() else None
    if held and not run_file.exists():
        raise UserError(f"{folder} holds {held} of another program; give another --output_dir.")
    before = json.loads(run_file.read_text()) if run_file.exists() else {}
    changed = [f"{name} was {before.get(name)}, is {value}" for name, value in run.items() if before.get(name) != value]
    if held and changed:
        raise UserError(
            f"{folder} holds {held} of another run: {'; '.join(changed)}. "
            "Give another --output_dir / OUTPUT, or start afresh by --overwrite_output_dir true."
        )
    return bool(changed)


def newest_complete_checkpoint(folder: Path) -> tuple[str | None, list[str]]:
    """The checkpoint to go on from, if there is one, and what there is to say.

    Incomplete ones after it are renamed, since Transformers takes each folder of that name for a good one
    (transformers#35782).
    """
    messages = []
    for checkpoint in list_checkpoints(folder):
        if is_complete(checkpoint):
            return str(checkpoint), [*messages, f"resuming from {checkpoint}"]
        aside = checkpoint.with_name(f"incomplete-{checkpoint.name}")
        messages.append(
            f"{checkpoint} is incomplete (its save never ended): now {aside.name}; going back to the one before"
        )
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
    return None, messages
