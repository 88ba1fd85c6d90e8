"""Rule-based rewards. `train.py`, the demo and verl's own trainer (`base03_main_ppo/`) all call `compute_score`.

Your own rewards are a function with these arguments in a file of yours: `--reward_function my_rewards.py:my_function`.
"""

import re

DIGITS = "零一二三四五六七八九"


def to_chinese(number: int) -> str:
    """A number from 0 to 199 as it is written out: 十二, 四十, 一百零五, 一百一十."""
    hundreds, tens, units = number // 100, number // 10 % 10, number % 10
    if hundreds:
        rest = DIGITS[tens] + "十" if tens else "零" if units else ""
        return DIGITS[hundreds] + "百" + rest + (DIGITS[units] if units else "")
    if tens:
        return (DIGITS[tens] if tens > 1 else "") + "十" + (DIGITS[units] if units else "")
    return DIGITS[units]


NUMBERS = {to_chinese(number): number for number in range(200)}
NUMBER = "[零一二三四五六七八九十百]+"
FORMAT = re.compile(rf"[^答]*答案：({NUMBER})")  # the work, then the answer, then nothing more
EQUATION = re.compile(rf"({NUMBER})(借一)?([加减])({NUMBER})(进一)?得({NUMBER})")
WORK_REWARD = 0.5
FORMAT_REWARD = 0.1
LENGTH_LIMIT = 32  # characters; each one more costs LENGTH_COST
LENGTH_COST = 0.01


def holds(left: str, borrow: str, sign: str, right: str, carry: str, result: str) -> bool:
    """Whether a step such as 四加一进一得六 or 九借一减四得四 is true."""
    if not {left, right, result} <= NUMBERS.keys():
        return False
    sum_or_difference = NUMBERS[left] - bool(borrow) + (1 if sign == "加" else -1) * NUMBERS[right] + bool(carry)
    return sum_or_difference == NUMBERS[result]


def score_arithmetic(reply: str, ground_truth: str) -> dict[str, float]:
    """Whether the answer is right and the reply well-formed, and the share of its steps (at least two) that is true."""
    match = FORMAT.fullmatch(reply)
    steps = EQUATION.findall(reply)
    return {
        "acc": float(match is not None and match[1] == ground_truth),
        "format": float(match is not None),
        "work": sum(holds(*step) for step in steps) / max(2, len(steps)) if match else 0.0,
    }


def score_exact_match(reply: str, ground_truth: str) -> dict[str, float]:
    """Whether the reply is the expected text; it is well-formed when it is one line that says something."""
    return {"acc": float(reply == ground_truth), "format": float(bool(reply) and "\n" not in reply), "work": 0.0}


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None, **_) -> dict:
    """The reward of one reply, in verl's form.

    Args:
        data_source: which rule counts: "arithmetic", or anything else for an exact match.
        solution_str: the reply without its end-of-turn token.
        extra_info: what the data's row brought along, and from `train.py` `finished`: whether the reply came to its
            end before `max_response_length`.

    Returns:
        `score`, which is learned from (1 for a right answer, WORK_REWARD for true steps on the way, FORMAT_REWARD for
        the form, less what is too long), and its parts `acc`, `format`, `work` and `length` for the report.
    """
    reply = solution_str.strip()
    rule = score_arithmetic if data_source == "arithmetic" else score_exact_match
    parts = rule(reply, ground_truth)
    if extra_info and not extra_info.get("finished", True):
        parts = dict.fromkeys(parts, 0.0)
    parts["length"] = LENGTH_COST * min(0, LENGTH_LIMIT - len(reply))
    score = parts["acc"] + WORK_REWARD * parts["work"] + FORMAT_REWARD * parts["format"] + parts["length"]
    return {"score": score, **parts}
