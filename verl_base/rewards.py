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


def add(x: int, y: int) -> tuple[str, str, str]:
    """Question, worked example and answer of a sum, units before tens."""
    units = x % 10 + y % 10
    carry = units // 10
    tens = x // 10 + y // 10
    work = f"{DIGITS[x % 10]}加{DIGITS[y % 10]}得{to_chinese(units)}，"
    work += f"{DIGITS[x // 10]}加{DIGITS[y // 10]}得{to_chinese(tens)}，"
    work += f"进一得{to_chinese(tens + 1)}，" * carry
    return f"{to_chinese(x)}加{to_chinese(y)}等于几？", f"{work}答案：{to_chinese(x + y)}", to_chinese(x + y)


def subtract(x: int, y: int) -> tuple[str, str, str]:
    """Question, worked example and answer of a difference that is not negative."""
    borrow = int(x % 10 < y % 10)
    upper = x % 10 + 10 * borrow
    work = f"{to_chinese(upper)}减{DIGITS[y % 10]}得{DIGITS[upper - y % 10]}，"
    tens = x // 10 - borrow
    work += f"{DIGITS[x // 10]}借一得{DIGITS[tens]}，" * borrow
    work += f"{DIGITS[tens]}减{DIGITS[y // 10]}得{DIGITS[tens - y // 10]}，"
    return f"{to_chinese(x)}减{to_chinese(y)}等于几？", f"{work}答案：{to_chinese(x - y)}", to_chinese(x - y)


NUMBERS = {to_chinese(number): number for number in range(100)}
NUMBER = "[零一二三四五六七八九十百]+"
QUESTION = re.compile(rf"({NUMBER})([加减])({NUMBER})等于几？")
FORMAT = re.compile(rf"[^答]*答案：({NUMBER})")  # the work, then the answer, then nothing more
WORK_REWARD = 0.5
FORMAT_REWARD = 0.1


def steps_to_take(question: str) -> list[str]:
    """The steps that lead to the answer, such as 三加五得八; none for a question of another kind."""
    match = QUESTION.fullmatch(question)
    if match is None or not {match[1], match[3]} <= NUMBERS.keys():
        return []
    x, y = NUMBERS[match[1]], NUMBERS[match[3]]
    if match[2] == "减" and x < y:
        return []
    _, worked, _ = add(x, y) if match[2] == "加" else subtract(x, y)
    return worked.split("，")[:-1]


def score_arithmetic(completion: str, ground_truth: object, question: str) -> dict[str, float]:
    """Whether the answer is right and the form kept, and the share of the question's steps in their places.

    A step that is true but not the question's counts for nothing: rewarded, it is what a model learns to write.
    """
    match = FORMAT.fullmatch(completion)
    expected, written = steps_to_take(question), completion.split("，")
    return {
        "acc": float(match is not None and match[1] == str(ground_truth)),
        "format": float(match is not None),
        "work": sum(map(str.__eq__, written, expected)) / len(expected) if match and expected else 0.0,
    }


def score_exact_match(completion: str, ground_truth: object, question: str) -> dict[str, float]:
    """Whether the completion is the expected text; it is well-formed when it is one line that says something."""
    return {
        "acc": float(completion == str(ground_truth)),
        "format": float(bool(completion) and "\n" not in completion),
        "work": 0.0,
    }


def compute_score(data_source: str, solution_str: str, ground_truth: object, extra_info: dict | None = None, **_):
    """The reward of one completion, in verl's form.

    Args:
        data_source: which rule counts: "arithmetic", or anything else for an exact match.
        solution_str: the completion without its end-of-turn token.
        extra_info: what the data's row brought along, and `question`, what was asked (unless the row brought one);
            from `train.py` also `finished`, whether the completion came to its end before `max_response_length`.

    Returns:
        `score`, which is learned from (1 for a right answer, WORK_REWARD for the steps on the way, FORMAT_REWARD for
        the form), and its parts `acc`, `format` and `work` for the report.
    """
    completion = solution_str.strip()
    rule = score_arithmetic if data_source == "arithmetic" else score_exact_match
    extra_info = extra_info or {}
    parts = rule(completion, ground_truth, extra_info.get("question", ""))
    if not extra_info.get("finished", True):
        parts = dict.fromkeys(parts, 0.0)
    score = parts["acc"] + WORK_REWARD * parts["work"] + FORMAT_REWARD * parts["format"]
    return {"score": score, **parts}
