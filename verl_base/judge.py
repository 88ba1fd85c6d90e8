"""The process in which a reward function is asked, since a process can be ended whatever the function does.

`reward_manager.py` starts several of them. It imports little; what the user's file imports is imported here only.
"""

import contextlib
import ctypes
import importlib.util
import math
import numbers
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from rows import UserError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
# What a row of the history, the report or a table of samples says by itself.
OWN_FIGURES = {"step", "reward", "reward_std", "completion", "completion_length", "longest_completion", "finished"}
OWN_FIGURES |= {"entropy", "zero_variance_groups", "bad_rewards", "rollout_is_mean", "kl", "clip_fraction", "loss"}
OWN_FIGURES |= {"skipped_updates", "learning_rate", "grad_norm", "memory_gb", "seconds", "completions_per_second"}
OWN_FIGURES |= {"overlong_reward"}


def import_reward_function(path_and_name: str):
    """The function of `file.py:name`.

    Raises:
        UserError: no such file, no such function in it, or the file fails, with the type and the line.
    """
    path, _, name = path_and_name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"give file.py:function; there is no file {path or name}.")
    spec = importlib.util.spec_from_file_location(f"reward_function_{Path(path).stem}", Path(path).absolute())
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look for theirs there
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # a SystemExit, too, as of libraries that miss a key or a model
        raise UserError(f"{path} can't be loaded: {describe_error(error, path)}. Mend it, or give another.") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"{path} has no function {name}.")
    return getattr(module, name)


def describe_error(error: BaseException, path: str) -> str:
    """Type and text of an error, and the last line of the user's file on the way to it."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{type(error).__name__}: {error.msg} ({error.filename}:{error.lineno})"
    place, trace = "", error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == str(Path(path).absolute()):
            place = f" ({path}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}{place}"


def is_number(value: object) -> bool:
    """Whether Python, or numpy where the user's file imports it, calls it a real number or a truth value."""
    numpy = sys.modules.get("numpy")
    return isinstance(value, numbers.Real) or (numpy is not None and isinstance(value, numpy.bool_))


def call_reward_function(reward_function, asked: dict) -> dict[str, float]:
    """`score` of one completion, and what else the function returns that is a number.

    A figure with a name that the report has itself (`step`, `reward`, `kl`, `pass@1` ...) is called `reward/step`.

    Args:
        asked: the function's arguments.

    Raises:
        BaseException: whatever the function raises; a ValueError for a score that isn't finite.
    """
    result = reward_function(**asked)
    result = dict(result) if isinstance(result, dict) else {"score": result}
    score = float(result.pop("score"))
    if not math.isfinite(score):
        raise ValueError(f"the score is {score}")
    parts = {str(name): float(value) for name, value in result.items() if is_number(value)}
    own = {name for name in parts if name in OWN_FIGURES or name.startswith("pass@")}
    return {"score": score} | {f"reward/{name}" if name in own else name: value for name, value in parts.items()}


def answer(connection: Connection, path_and_name: str) -> None:
    """Says None once the function is there, then what it gives each completion; in place of either a text: what failed.

    Raises:
        EOFError, OSError: the driver has ended, or needs it no more.
    """
    try:
        reward_function = import_reward_function(path_and_name)
    except UserError as error:
        return connection.send(str(error))
    connection.send(None)
    while True:
        asked = connection.recv()
        try:
            said = call_reward_function(reward_function, asked)
        except BaseException as error:  # of the user's code, some of which panics or cancels beside Exception
            said = describe_error(error, path_and_name.rpartition(":")[0])
        connection.send(said)


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # with the driver, even in the midst of a call
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver's to hear
    # Whole lines, though several processes write; Ray's environment asks for pieces of them.
    sys.stdout.reconfigure(line_buffering=True, write_through=False)
    os.set_inheritable(int(sys.argv[2]), False)
    with contextlib.suppress(EOFError, OSError):
        answer(Connection(int(sys.argv[2])), sys.argv[1])
