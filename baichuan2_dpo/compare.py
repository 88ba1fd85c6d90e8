"""A model before and after its preference training: which two they are, and what they make of a pair.

The way of a pair: score_pair -> encode_pair (data.py, as in training) -> log_probability, before and after -> rewards.
"""

import json
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F

from data import encode_pair
from infer import check_model_path, context_length, load_trained_model
from preference_loss import ROUNDING
from rows import UserError

RECIPE = Path(__file__).parent
COLUMNS, REPLIES = ("训练前", "训练后"), ("回答一", "回答二")


def find_before(path: str) -> str | None:
    """The model before the preference training; None where that is the one in `path` with its adapter switched off.

    It is what the training began with by the folder's run.json; without one, the folder `path`_sft beside a full model.

    Raises:
        UserError: it is not there.
    """
    check_model_path(path)
    folder = Path(path).absolute()
    run, adapter = folder / "run.json", folder / "adapter_config.json"
    start = json.loads(run.read_text(encoding="utf-8"))["model"] if run.is_file() else None
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        if start in (None, base):  # else the training went on with an adapter
            return None
    start = start or f"{folder.name}_sft"
    places = (place / start for place in (folder.parent, Path(), RECIPE))
    start = str(next(filter(Path.is_dir, places), start))
    try:
        check_model_path(start)
    except UserError:
        raise UserError(
            f"{path}: the model before its preference training is not there ({start}). Name its folder or its hub id: "
            f"python demo.py {path} --before my_model"
        ) from None
    return start


def load_models(path: str, before: str | None, trust_remote_code: bool = False):
    """The models before and after the training and their tokenizer; `before` None is handed on.

    Raises:
        UserError: one of them is not there, or their token ids don't mean the same.
    """
    after, tokenizer = load_trained_model(path, trust_remote_code)
    if before is None:
        return None, after, tokenizer
    model, its_tokenizer = load_trained_model(before, trust_remote_code)
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{before}: has another tokenizer than {path}. Name the model that its training began with.")
    return model, after, tokenizer


@contextmanager
def model_of(column: int, before, after):
    """The model before (0) or after the training (1), while the context lasts."""
    with after.disable_adapter() if column == 0 and before is None else nullcontext():
        yield after if column == 1 or before is None else before


def log_probability(model, prompt: list[int], reply: list[int]) -> float:
    """Of a reply's token ids after those of a prompt, in nats, summed over the reply."""
    ids = torch.tensor([prompt + reply], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return -F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()


@torch.no_grad()
def score_pair(before, after, tokenizer, prompt: str, replies: tuple[str, str], beta: float = 0.1) -> dict:
    """What the models before and after the training give two replies, and DPO's rewards (Rafailov et al., 2023).

    Args:
        before: None stands for `after` with its adapter switched off.

    Returns:
        Two numbers each, by reply: `tokens`, the stop token included; `before` and `after`, log-probabilities summed
        over these, in nats; `rewards`, beta x (after - before). And `margin`, the first reward less the second;
        `preferred`, 0 or 1, or None where rounding decides.

    Raises:
        UserError: a text is empty, the replies are the same, or they can't be encoded as in training.
    """
    if not all(text.strip() for text in (prompt, *replies)):
        raise UserError("请填写问题和两个回答。")
    if replies[0] == replies[1]:
        raise UserError("两个回答完全相同，没有可比较的。")
    if not beta or beta < 0:
        raise UserError("β 必须大于 0。")
    messages, limit = [{"role": "user", "content": prompt}], context_length(after)
    answers = [{"role": "assistant", "content": reply} for reply in replies]
    pair = encode_pair(messages, answers, tokenizer, max_length=limit, max_prompt_length=limit)
    if pair["tokens_cut"]:
        raise UserError(f"问题加回答超过了模型的上下文长度（{limit} 个词元），请缩短。")
    ids, start = pair["input_ids"], pair["prompt_length"]
    end = start + pair["chosen_length"]
    encoded = ids[start:end], ids[end:]
    scores = {"tokens": [len(reply) for reply in encoded]}
    for column, name in enumerate(("before", "after")):
        with model_of(column, before, after) as model:
            scores[name] = [log_probability(model, ids[:start], reply) for reply in encoded]
    rewards = [beta * (after - before) for before, after in zip(scores["before"], scores["after"], strict=True)]
    margin = rewards[0] - rewards[1]
    preferred = None if abs(margin) < beta * ROUNDING else int(margin < 0)
    return scores | {"rewards": rewards, "margin": margin, "preferred": preferred}


def describe_scores(scores: dict) -> str:
    """What `score_pair` returns, as a table in Markdown and a sentence."""
    lines = ["| | 词元数 | 训练前 (nat) | 每词元 | 训练后 (nat) | 每词元 | 奖励 |", "|---|--:|--:|--:|--:|--:|--:|"]
    for number, name in enumerate(REPLIES):
        tokens, before, after, reward = (scores[key][number] for key in ("tokens", "before", "after", "rewards"))
        sums = f"{before:.2f} | {before / tokens:.3f} | {after:.2f} | {after / tokens:.3f}"
        lines.append(f"| {name} | {tokens} | {sums} | {reward:+.3f} |")
    choice = "分不出高下" if scores["preferred"] is None else f"更偏好**{REPLIES[scores['preferred']]}**"
    return "\n".join([*lines, "", f"奖励差（回答一减回答二）：{scores['margin']:+.3f}，训练后的模型{choice}。"])
