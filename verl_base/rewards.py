"""Rule-based rewards. `train.py`, the demo and verl's own trainer (`base03_main_ppo/`) all call `compute_score`.

Your own rewards are a function with these arguments in a file of yours: `--reward_function my_rewards.py:my_function`.
"""

import re

NUMBER = "[零一二三四五六七八九十百]+"
FORMAT = re.compile(rf"[^答]*答案：({NUMBER})")  # the work, then the answer, then nothing more
FORMAT_REWARD = 0.1
LENGTH_LIMIT = 32  # characters; each one more costs LENGTH_COST
LENGTH_COST = 0.01


def score_arithmetic(reply: str, ground_truth: str) -> tuple[float, float]:
    """Whether the answer is right, and whether the reply is well-formed."""
    match = FORMAT.fullmatch(reply)
    return float(match is not None and match[1] == ground_truth), float(match is not None)


def score_exact_match(reply: str, ground_truth: str) -> tuple[float, float]:
    """Whether the reply is the expected text; it is well-formed when it is one line that says something."""
    return float(reply == ground_truth), float(bool(reply) and "\n" not in reply)


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None, **_) -> dict:
    """The reward of one reply, in verl's form.

    Args:
        data_source: which rule counts: "arithmetic", or anything else for an exact match.
        solution_str: the reply without its end-of-turn token.
        extra_info: what the data's row brought along, and from `train.py` `finished`: whether the reply came to its
            end before `max_response_length`.

    Returns:
        `score`, which is learned from (1 for a right answer, FORMAT_REWARD for the form, less what is too long), and
        its parts `acc`, `format` and `length` for the report.
    """
    reply = solution_str.strip()
    rule = score_arithmetic if data_source == "arithmetic" else score_exact_match
    right, well_formed = rule(reply, ground_truth)
    if extra_info and not extra_info.get("finished", True):
        right = well_formed = 0.0
    excess = LENGTH_COST * min(0, LENGTH_LIMIT - len(reply))
    return {
        "score": right + FORMAT_REWARD * well_formed + excess,
        "acc": right,
        "format": well_formed,
        "length": excess,
    }
