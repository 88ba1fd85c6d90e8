"""Completions -> scores, by the reward function of a run, which is asked about many of them side by side.

A thread couldn't be ended: a regular expression that backtracks for hours holds Python's lock all the while, so that
neither a time limit nor Ctrl-C would be heard. So there are processes (`judge.py`).
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
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


def score_completions(
    rollout, prompts: list[Prompt], tokenizer, reward_function, data_args, may_all_fail: bool = False
) -> Scored:
    """Decodes every completion and asks the reward function about it.

    With --skip_bad_rewards a completion on which the function raises, gives no finite number or nothing in time, gets
    NaN instead of ending the run.

    Args:
        reward_function: a `RewardFunction`.
        may_all_fail: nothing is learned from them, so it is enough to count those without a score.

    Raises:
        UserError: the reward function failed, with the sample; or it failed on every completion.
    """
    responses, mask = rollout.batch["responses"], rollout.batch["response_mask"].bool()
    n = len(responses) // len(prompts)
    ended = rollout.batch["finished"].tolist()
    said = [ids[here][: -1 if end else None] for ids, here, end in zip(responses, mask, ended, strict=True)]
    completions = tokenizer.batch_decode(said)
    asked = [(prompts[number // n], completion, ended[number]) for number, completion in enumerate(completions)]
    results = reward_function.ask(asked, skip_failures=data_args.skip_bad_rewards)
    failures = [result for result in results if isinstance(result, UserError)]
    if len(failures) == len(results) and not may_all_fail:
        raise UserError(f"the reward function failed on every completion of a step, last on {failures[-1]}")
    results = [{"score": math.nan} if isinstance(result, UserError) else result for result in results]
    scores = np.array([result["score"] for result in results])
    names = {name for result in results for name in result} - {"score"}
    parts = {name: np.array([result.get(name, math.nan) for result in results]) for name in sorted(names)}
    return Scored(prompts, completions, scores, parts, mask.sum(1).numpy(), np.array(ended))


def load_reward_function(path_and_name: str, workers: int = 1, timeout: float = 300.0) -> "RewardFunction":
    """The function of `file.py:name`, in so many processes; see `RewardFunction`."""
    return RewardFunction(path_and_name, workers, timeout)


def arguments_of(prompt: Prompt, completion: str, finished: bool) -> dict:
    """What a reward function is called with."""
    extra_info = {"question": prompt.messages[-1]["content"], **prompt.extra_info, "finished": finished}
    arguments = {"data_source": prompt.data_source, "solution_str": completion, "ground_truth": prompt.ground_truth}
    return arguments | {"extra_info": extra_info}


class Judge:
    """A process that has the reward function, and which completion it is asked about.

    It has a session of its own: Ctrl-C at the terminal isn't sent to it, and what it has started is ended with it.
    """

    def __init__(self, path_and_name: str):
        self.connection, theirs = Pipe()
        script = str(Path(__file__).with_name("judge.py"))
        self.process = subprocess.Popen(
            [sys.executable, script, path_and_name, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self.loaded, self.number, self.asked_at = False, None, math.inf

    def ask(self, number: int, prompt: Prompt, completion: str, finished: bool) -> None:
        self.connection.send(arguments_of(prompt, completion, finished))
        self.number, self.asked_at = number, time.monotonic()

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()

    def how_it_ended(self) -> str:
        """Of a process whose connection is closed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        status = self.process.poll()
        how = f"by {signal.Signals(-status).name}" if status and status < 0 else f"with exit status {status}"
        return f"the process that asked it ended {how}"


class RewardFunction:
    """The function of `file.py:name`, in processes that are started once.

    One that takes longer than `timeout` is killed, and one that dies is a failure too; another takes its place.

    Args:
        workers: processes; a judge that waits for a network waits for so many completions at once.
        timeout: seconds for a completion.

    Raises:
        UserError: no such file, no such function in it, or the file fails.
    """

    def __init__(self, path_and_name: str, workers: int, timeout: float):
        self.path_and_name, self.workers, self.timeout = path_and_name, workers, timeout
        self.judges = [Judge(path_and_name) for _ in range(workers)]
        try:
            while not any(judge.loaded for judge in self.judges):
                list(self.hear())
        except BaseException:
            self.end(self.judges)
            raise

    def ask(
        self, asked: list[tuple[Prompt, str, bool]], skip_failures: bool = False
    ) -> list[dict[str, float] | UserError]:
        """`score` of each completion, and what else the function returns that is a number.

        Args:
            asked: prompt, completion, whether it is finished.
            skip_failures: what failed stands in the list as a UserError; else the first of them is raised.

        Raises:
            UserError: the function failed, with the sample.
        """
        results, waiting = {}, deque(range(len(asked)))
        try:
            while len(results) < len(asked):
                self.hand_out(asked, waiting)
                for number, said in self.hear():
                    results[number] = describe_failure(*asked[number][:2], said) if isinstance(said, str) else said
                    if isinstance(said, str) and not skip_failures:
                        raise results[number]
        finally:  # whoever leaves early needs no more of them
            self.end([judge for judge in self.judges if judge.number is not None])
        return [results[number] for number in range(len(asked))]

    def hand_out(self, asked: list[tuple[Prompt, str, bool]], waiting: deque[int]) -> None:
        """Gives the idle something to do, and starts anew as many as are missing and needed."""
        for judge in [judge for judge in self.judges if judge.loaded and judge.number is None]:
            if waiting:
                try:
                    judge.ask(waiting[0], *asked[waiting[0]])
                    waiting.popleft()
                except OSError:  # it has died meanwhile
                    self.end([judge])
        loading = sum(not judge.loaded for judge in self.judges)
        for _ in range(min(self.workers - len(self.judges), len(waiting) - loading)):
            self.judges.append(Judge(self.path_and_name))

    def hear(self) -> Iterator[tuple[int, dict[str, float] | str]]:
        """Waits until a judge says something, at most for a second; yields number and result, or text of a failure.

        Raises:
            UserError: the file can't be loaded.
        """
        latest = min(judge.asked_at for judge in self.judges) + self.timeout
        ready = wait([judge.connection for judge in self.judges], max(0.0, min(1.0, latest - time.monotonic())))
        for judge in list(self.judges):
            if judge.connection in ready:
                try:
                    said = judge.connection.recv()
                except (EOFError, OSError):
                    said = judge.how_it_ended()
                    self.end([judge])
            elif time.monotonic() - judge.asked_at > self.timeout:
                said = f"TimeoutError: no score after {self.timeout:g} seconds (--reward_timeout)"
                self.end([judge])
            else:
                continue
            if not judge.loaded:
                if said is not None:
                    raise UserError(f"--reward_function {self.path_and_name}: {said}")
                judge.loaded = True
            elif judge.number is not None:  # else it died in between, which is no completion's fault
                number, judge.number, judge.asked_at = judge.number, None, math.inf
                yield number, said

    def end(self, judges: list[Judge]) -> None:
        self.judges = [judge for judge in self.judges if judge not in judges]
        for judge in judges:
            judge.end()

    def close(self) -> None:
        """Lets the idle come to their own end; the program's end would do so, too."""
        for judge in self.judges:
            judge.connection.close()
        for judge in self.judges:
            with contextlib.suppress(subprocess.TimeoutExpired):
                judge.process.wait(timeout=5)
        self.end(self.judges)


def describe_failure(prompt: Prompt, completion: str, what: str) -> UserError:
    """What there is to say of a completion that has no score."""
    question = prompt.messages[-1]["content"]
    return UserError(
        f"{prompt.source}: the reward function failed on the completion {completion!r} to {question!r}: "
        f"{what}. Mend it, or train without such completions: --skip_bad_rewards true."
    )
