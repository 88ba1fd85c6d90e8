"""What a step does between sampling and learning: judge the replies, compare them within their group, count."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from verl import DataProto
from verl.protocol import pad_dataproto_to_divisor
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

from data import Prompt
from judge import call_reward_function
from rows import UserError


@dataclass
class Judged:
    """Replies and what the reward function says of them, one entry a reply, a prompt's n replies in a row.

    Args:
        scores: what is learned from; NaN where the reward function failed.
        parts: the other figures that it returned (`acc`, `format`, ...), NaN likewise.
    """

    prompts: list[Prompt]
    replies: list[str]
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


def judge_replies(rollout: DataProto, prompts: list[Prompt], tokenizer, reward_function, skip_bad: bool) -> Judged:
    """Decodes every reply and asks the reward function about it.

    Args:
        skip_bad: a reply on which the function raises, or gives no finite number, gets NaN instead of ending the run.

    Raises:
        UserError: the reward function failed, with the sample; or it failed on every reply.
    """
    responses, mask = rollout.batch["responses"], rollout.batch["response_mask"].bool()
    n = len(responses) // len(prompts)
    ended = (responses == tokenizer.eos_token_id).logical_and(mask).any(1).tolist()
    said = [ids[here][: -1 if end else None] for ids, here, end in zip(responses, mask, ended, strict=True)]
    replies, results = tokenizer.batch_decode(said), []
    for number, (reply, finished) in enumerate(zip(replies, ended, strict=True)):
        try:
            results.append(call_reward_function(reward_function, prompts[number // n], reply, finished))
        except UserError as error:
            if not skip_bad:
                raise
            results.append({"score": math.nan})
            last_error = error
    scores = np.array([result["score"] for result in results])
    if np.isnan(scores).all():
        raise UserError(f"the reward function failed on every reply of a step, last on {last_error}")
    names = {name for result in results for name in result} - {"score"}
    parts = {name: np.array([result.get(name, math.nan) for result in results]) for name in sorted(names)}
    return Judged(prompts, replies, scores, parts, mask.sum(1).numpy(), np.array(ended))


def add_advantages(rollout: DataProto, judged: Judged, adv_estimator: str) -> None:
    """Puts `advantages` and `returns` [replies, length] into the rollout, by verl's estimator of that name.

    A reply without a score takes no part: it is masked out, and its group is compared without it.
    """
    mask = rollout.batch["response_mask"]
    bad = np.isnan(judged.scores)
    mask[torch.from_numpy(bad)] = 0
    numbers = np.arange(len(judged.scores))
    n = len(numbers) // len(judged.prompts)
    index = np.where(bad, -1 - numbers, numbers // n)
    # In double precision, since the rounding of a mean of equal scores is large beside their standard deviation of 0.
    rewards = torch.zeros(mask.shape, dtype=torch.float64)
    rewards[numbers, judged.lengths - 1] = torch.from_numpy(np.nan_to_num(judged.scores))
    advantages, returns = get_adv_estimator_fn(adv_estimator)(
        token_level_rewards=rewards, response_mask=mask, index=index, config=AlgoConfig(adv_estimator=adv_estimator)
    )
    rollout.batch["advantages"], rollout.batch["returns"] = advantages.float(), returns.float()


def find_equal_groups(judged: Judged) -> np.ndarray:
    """[prompts]: whether all scores of the group are the same, so that there is nothing to learn from it."""
    scores = judged.groups(judged.scores)
    known = ~np.isnan(scores)
    return ~(np.where(known, scores, -np.inf).max(1) > np.where(known, scores, np.inf).min(1))


def select_groups(rollout: DataProto, judged: Judged, chosen: np.ndarray) -> tuple[DataProto, Judged]:
    """The groups of these numbers only."""
    n = len(judged.scores) // len(judged.prompts)
    rows = (chosen[:, None] * n + np.arange(n)).reshape(-1)
    parts = {name: values[rows] for name, values in judged.parts.items()}
    prompts, replies = [judged.prompts[group] for group in chosen], [judged.replies[row] for row in rows]
    fields = prompts, replies, judged.scores[rows], parts, judged.lengths[rows], judged.finished[rows]
    return rollout.select_idxs(rows), Judged(*fields)


def join_rollouts(pairs: list[tuple[DataProto, Judged]]) -> tuple[DataProto, Judged]:
    """Several rollouts one after the other, their prompts padded on the left to the longest."""
    width = max(rollout.batch["prompts"].shape[1] for rollout, _ in pairs)
    for rollout, _ in pairs:
        missing = width - rollout.batch["prompts"].shape[1]
        for name in ("prompts", "input_ids", "attention_mask", "position_ids"):
            rollout.batch[name] = torch.nn.functional.pad(rollout.batch[name], (missing, 0))
    all_judged = [judged for _, judged in pairs]
    names = sorted({name for judged in all_judged for name in judged.parts})
    parts = {
        name: np.concatenate([judged.parts.get(name, np.full(len(judged.scores), np.nan)) for judged in all_judged])
        for name in names
    }
    joined = Judged(
        prompts=[prompt for judged in all_judged for prompt in judged.prompts],
        replies=[reply for judged in all_judged for reply in judged.replies],
        scores=np.concatenate([judged.scores for judged in all_judged]),
        parts=parts,
        lengths=np.concatenate([judged.lengths for judged in all_judged]),
        finished=np.concatenate([judged.finished for judged in all_judged]),
    )
    return DataProto.concat([rollout for rollout, _ in pairs]), joined


def rollout_statistics(rollout: DataProto, judged: Judged) -> dict[str, float]:
    """Means over the replies that have a score; entropy is estimated by the sampled tokens' own log-probabilities."""
    mask = rollout.batch["response_mask"].bool()
    log_probs = rollout.batch["old_log_probs"][mask]
    return {
        "reward": float(np.nanmean(judged.scores)),
        "reward_std": float(np.nanstd(judged.scores)),
        **{name: float(np.nanmean(values)) for name, values in judged.parts.items()},
        "reply_length": float(judged.lengths.mean()),
        "longest_reply": int(judged.lengths.max()),
        "finished": float(judged.finished.mean()),
        "entropy": -log_probs.mean().item(),
        "equal_groups": int(find_equal_groups(judged).sum()),
        "bad_rewards": int(np.isnan(judged.scores).sum()),
    }


def collate_prompts(prompts: list[Prompt], pad_token_id: int) -> DataProto:
    """Left-padded `input_ids` and `attention_mask` [prompts, longest]."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt.input_ids) :] = torch.tensor(prompt.input_ids)
        attention_mask[row, longest - len(prompt.input_ids) :] = 1
    return DataProto.from_dict(tensors={"input_ids": input_ids, "attention_mask": attention_mask})


def sample(policy, prompts: list[Prompt], pad_token_id: int, n: int, temperature: float, seed: int) -> DataProto:
    """n replies to each prompt, from all workers."""
    batch = collate_prompts(prompts, pad_token_id)
    batch.meta_info |= {"n": n, "temperature": temperature, "seed": seed}
    padded, added = pad_dataproto_to_divisor(batch, policy.world_size)
    rollout = policy.generate_sequences(padded)
    return rollout[: len(rollout) - added * n]


def evaluate(policy, prompts: list[Prompt], tokenizer, reward_function, data_args, args):
    """Validation prompts, `val_n` replies each: pass@1 is the mean of `acc`, pass@n whether one of the n is right.

    Returns:
        These figures by name, and what they were made of (Judged).
    """
    rollout = sample(policy, prompts, tokenizer.pad_token_id, args.val_n, args.val_temperature, args.seed)
    judged = judge_replies(rollout, prompts, tokenizer, reward_function, data_args.skip_bad_rewards)
    right = judged.groups(np.nan_to_num(judged.right))
    statistics = rollout_statistics(rollout, judged)
    scores = {"pass@1": float(right.mean()), f"pass@{args.val_n}": float(right.max(1).mean())}
    shown = ("format", "reply_length", "finished")
    return scores | {name: statistics[name] for name in shown if name in statistics}, judged
