"""Completions -> scores, by the reward function of a run, which is asked about many of them side by side."""

import importlib.util
import math
import numbers
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import Prompt
from rows import UserError


@dataclass
class Scored:
    """Completions and what the reward function says of them, one entry a completion, a prompt's n completions in a row.

    Args:
        scores: what is learned from; NaN where the reward function failed.
        parts: the other figures that it returned (`acc`, `format`, ...), NaN likewise.
        lengths: tokens of each completion, its stop token among them.
        finished: whether it came to a stop token.
    """

    prompts: list[Prompt]
    completions: list[str]
    scores: np.ndarray
    parts: dict[str, np.ndarray]
    lengths: np.ndarray
    finished: np.ndarray

    def groups(self, values: np.ndarray) -> np.ndarray:
        """The values as [prompts, n]."""
        return values.reshape(len(self.prompts), -1)

    @property
    def right(self) -> np.ndarray:
        """`acc` where the reward function returns it, else the score."""
        return self.parts.get("acc", self.scores)


def score_completions(rollout, prompts: list[Prompt], tokenizer, reward_function, data_args) -> Scored:
    """Decodes every completion and asks the reward function about it.

    With --skip_bad_rewards a completion on which the function raises, gives no finite number or nothing in time, gets
    NaN instead of ending the run.

    Raises:
        UserError: the reward function failed, with the sample; or it failed on every completion.
    """
    responses, mask = rollout.batch["responses"], rollout.batch["response_mask"].bool()
    n = len(responses) // len(prompts)
    ended = rollout.batch["finished"].tolist()
    said = [ids[here][: -1 if end else None] for ids, here, end in zip(responses, mask, ended, strict=True)]
    completions, results = tokenizer.batch_decode(said), [{"score": math.nan}] * len(said)
    asked = [(prompts[number // n], completion, ended[number]) for number, completion in enumerate(completions)]
    workers, timeout = data_args.reward_num_workers, data_args.reward_timeout
    for number, result in call_side_by_side(reward_function, asked, workers, timeout):
        if not isinstance(result, UserError):
            results[number] = result
        elif data_args.skip_bad_rewards:
            last_error = result
        else:
            raise result
    scores = np.array([result["score"] for result in results])
    if np.isnan(scores).all():
        raise UserError(f"the reward function failed on every completion of a step, last on {last_error}")
    names = {name for result in results for name in result} - {"score"}
    parts = {name: np.array([result.get(name, math.nan) for result in results]) for name in sorted(names)}
    return Scored(prompts, completions, scores, parts, mask.sum(1).numpy(), np.array(ended))


def load_reward_function(path_and_name: str):
    """The function of `file.py:name`.

    Raises:
        UserError: no such file, no such function in it, or the file ends the program.
    """
    path, _, name = path_and_name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"--reward_function {path_and_name}: give file.py:function; there is no file {path or name}.")
    spec = importlib.util.spec_from_file_location(f"reward_function_{Path(path).stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look for theirs there
    try:
        spec.loader.exec_module(module)
    except SystemExit as error:  # as libraries do that miss a key or a model
        raise UserError(f"--reward_function {path_and_name}: {path} ended the program: SystemExit: {error}.") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"--reward_function {path_and_name}: {path} has no function {name}.")
    return getattr(module, name)


def call_reward_function(reward_function, prompt: Prompt, completion: str, finished: bool) -> dict[str, float]:
    """`score` of one completion, and what else the function returns that is a number.

    Raises:
        UserError: the function fails, or gives no finite score; with the sample.
    """
    try:
        result = reward_function(
            data_source=prompt.data_source,
            solution_str=completion,
            ground_truth=prompt.ground_truth,
            extra_info={"question": prompt.messages[-1]["content"], **prompt.extra_info, "finished": finished},
        )
        result = dict(result) if isinstance(result, dict) else {"score": result}
        parts = {name: float(value) for name, value in result.items() if isinstance(value, numbers.Real | np.bool_)}
        parts["score"] = float(result["score"])
        if not math.isfinite(parts["score"]):
            raise ValueError(f"the score is {parts['score']}")
    except (Exception, SystemExit) as error:  # noqa: BLE001  (the user's code: what it raises is reported with its sample)
        raise describe_failure(prompt, completion, error) from error
    return parts


def describe_failure(prompt: Prompt, completion: str, error: BaseException) -> UserError:
    """What there is to say of a completion that has no score."""
    question = prompt.messages[-1]["content"]
    return UserError(
        f"{prompt.source}: the reward function failed on the completion {completion!r} to {question!r}: "
        f"{type(error).__name__}: {error}. Mend it, or train without such completions: --skip_bad_rewards true."
    )


def call_side_by_side(
    reward_function, asked: list[tuple[Prompt, str, bool]], workers: int, timeout: float
) -> Iterator[tuple[int, dict[str, float] | UserError]]:
    """Yields (number, what `call_reward_function` returns or raises) for each of the completions, as they come.

    Args:
        asked: what `call_reward_function` asks about.
        workers: threads; a judge that waits for a network waits for so many completions at once.
        timeout: seconds. A call that takes longer has failed; its thread can't be ended, and another takes its place.
    """
    waiting, results, started = deque(range(len(asked))), queue.SimpleQueue(), {}

    def work() -> None:
        while waiting:
            try:
                number = waiting.popleft()
            except IndexError:  # another thread was faster
                return
            started[number] = time.monotonic()
            try:
                result = call_reward_function(reward_function, *asked[number])
            except UserError as error:
                result = error
            if started.pop(number, None) is None:  # given up
                return
            results.put((number, result))

    def start() -> None:
        threading.Thread(target=work, daemon=True).start()  # a daemon doesn't keep the program from ending

    for _ in range(min(workers, len(asked))):
        start()
    try:
        missing = len(asked)
        while missing:
            try:
                yield results.get(timeout=min(1.0, timeout))
                missing -= 1
            except queue.Empty:
                overdue = [number for number, begun in list(started.items()) if time.monotonic() - begun > timeout]
                for number in overdue:
                    if started.pop(number, None) is not None:
                        prompt, completion, _ = asked[number]
                        late = TimeoutError(f"no score after {timeout:g} seconds (--reward_timeout)")
                        results.put((number, describe_failure(prompt, completion, late)))
                        start()
    finally:
        waiting.clear()  # whoever left early needs no more of them
