"""The reward function of a run: found by its name, and asked about one reply."""

import importlib.util
import math
import numbers
import sys
from pathlib import Path

import numpy as np

from data import Prompt
from rows import UserError


def load_reward_function(path_and_name: str):
    """The function of `file.py:name`.

    Raises:
        UserError: no such file, or no such function in it.
    """
    path, _, name = path_and_name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"--reward_function {path_and_name}: give file.py:function; there is no file {path or name}.")
    spec = importlib.util.spec_from_file_location(f"reward_function_{Path(path).stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look for theirs there
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise UserError(f"--reward_function {path_and_name}: {path} has no function {name}.")
    return getattr(module, name)


def call_reward_function(reward_function, prompt: Prompt, reply: str, finished: bool) -> dict[str, float]:
    """`score` of one reply, and what else the function returns that is a number.

    Raises:
        UserError: the function fails, or gives no finite score; with the sample.
    """
    try:
        result = reward_function(
            data_source=prompt.data_source,
            solution_str=reply,
            ground_truth=prompt.ground_truth,
            extra_info={"question": prompt.messages[-1]["content"], **prompt.extra_info, "finished": finished},
        )
        result = dict(result) if isinstance(result, dict) else {"score": result}
        parts = {name: float(value) for name, value in result.items() if isinstance(value, numbers.Real | np.bool_)}
        parts["score"] = float(result["score"])
        if not math.isfinite(parts["score"]):
            raise ValueError(f"the score is {parts['score']}")
    except Exception as error:  # noqa: BLE001  (the user's code: whatever it raises is reported with its sample)
        question = prompt.messages[-1]["content"]
        raise UserError(
            f"{prompt.source}: the reward function failed on the reply {reply!r} to {question!r}: "
            f"{type(error).__name__}: {error}. Mend it, or train without such replies: --skip_bad_rewards true."
        ) from error
    return parts
