"""What each token of a step's completions is worth: their scores, compared within their group by verl's estimators."""

import numpy as np
import torch
from verl import DataProto
from verl.trainer.config import AlgoConfig, RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, kl_penalty
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch

from reward_manager import Scored


def punish_length(scored: Scored, max_response_length: int, args) -> None:
    """DAPO's overlong shaping: the last `overlong_buffer_len` tokens that a completion may have cost more and more.

    From 0 up to `overlong_penalty_factor` at the limit; `overlong_reward` is reported as a part of the score.
    """
    buffer = args.overlong_buffer_len
    exceeded = np.maximum(0, scored.lengths - (max_response_length - buffer))
    scored.parts["overlong_reward"] = -exceeded / buffer * args.overlong_penalty_factor
    scored.scores += scored.parts["overlong_reward"]


def add_advantages(rollout: DataProto, scored: Scored, adv_estimator: str, args) -> None:
    """Puts `advantages` and `returns` [completions, length] into the rollout, by verl's estimator of that name.

    A completion without a score takes no part: it is masked out, and its group is compared without it. Nor does a
    group of one, which has nothing to be compared with; where none does, there are zeros and nothing to learn from. A
    completion that was cut off is compared and then masked out, where `mask_truncated_completions` asks for that.
    """
    mask = rollout.batch["response_mask"]
    known = scored.groups(~np.isnan(scored.scores))
    bad = ~(known & (known.sum(1, keepdims=True) > 1)).reshape(-1)
    mask[torch.from_numpy(bad)] = 0
    numbers = np.arange(len(scored.scores))
    index = np.where(bad, -1 - numbers, numbers // known.shape[1])
    # In double precision, since the rounding of a mean of equal scores is large beside their standard deviation of 0.
    rewards = torch.zeros(mask.shape, dtype=torch.float64)
    rewards[numbers, scored.lengths - 1] = torch.from_numpy(np.nan_to_num(scored.scores))
    if args.use_kl_in_reward:
        rewards -= args.kl_coef * mask * token_kl(rollout, args.kl_penalty)
    if not mask.any():  # what REINFORCE++ makes white is the batch, which it can't do to an empty one
        rollout.batch["advantages"] = rollout.batch["returns"] = torch.zeros(mask.shape)
        return
    options = {"norm_adv_by_std_in_grpo": args.norm_adv_by_std_in_grpo} if adv_estimator == "grpo" else {}
    advantages, returns = get_adv_estimator_fn(adv_estimator)(
        token_level_rewards=rewards,
        response_mask=mask,
        index=index,
        config=AlgoConfig(adv_estimator=adv_estimator),
        **options,
    )
    rollout.batch["advantages"], rollout.batch["returns"] = advantages.float(), returns.float()
    if args.mask_truncated_completions:
        mask[torch.from_numpy(~scored.finished)] = 0


def token_kl(rollout: DataProto, kind: str) -> torch.Tensor:
    """verl's estimate of the KL to the reference, token by token [completions, length], of what was sampled."""
    return kl_penalty(rollout.batch["old_log_probs"], rollout.batch["ref_log_prob"], kind)


def weigh_rollout(rollout: DataProto, args) -> float:
    """Puts `rollout_is_weights` [completions, length] into the rollout, by which verl's loss weighs the tokens.

    Truncated importance sampling: the trainer's probability over that by which the token was sampled (another kernel,
    another precision), at most `rollout_is_threshold`. Returns their mean.
    """
    correction = RolloutCorrectionConfig(rollout_is=args.rollout_is, rollout_is_threshold=args.rollout_is_threshold)
    weighed, metrics = compute_rollout_correction_and_add_to_batch(rollout, correction)
    rollout.batch["rollout_is_weights"] = weighed.batch["rollout_is_weights"]
    return metrics["rollout_corr/rollout_is_mean"]


def find_zero_variance_groups(scored: Scored, values: np.ndarray) -> np.ndarray:
    """[prompts]: whether all values of the group (its scores, or what is right) are the same, if it has two at all."""
    values = scored.groups(values)
    known = ~np.isnan(values)
    return ~(np.where(known, values, -np.inf).max(1) > np.where(known, values, np.inf).min(1))


def select_groups(rollout: DataProto, scored: Scored, chosen: np.ndarray) -> tuple[DataProto, Scored]:
    """The groups of these numbers only."""
    n = len(scored.scores) // len(scored.prompts)
    rows = (chosen[:, None] * n + np.arange(n)).reshape(-1)
    parts = {name: values[rows] for name, values in scored.parts.items()}
    prompts, completions = [scored.prompts[group] for group in chosen], [scored.completions[row] for row in rows]
    fields = prompts, completions, scored.scores[rows], parts, scored.lengths[rows], scored.finished[rows]
    return rollout.select_idxs(rows), Scored(*fields)


def join_rollouts(pairs: list[tuple[DataProto, Scored]]) -> tuple[DataProto, Scored]:
    """Several rollouts one after the other, their prompts padded on the left to the longest."""
    width = max(rollout.batch["prompts"].shape[1] for rollout, _ in pairs)
    for rollout, _ in pairs:
        missing = width - rollout.batch["prompts"].shape[1]
        for name in ("prompts", "input_ids", "attention_mask", "position_ids"):
            rollout.batch[name] = torch.nn.functional.pad(rollout.batch[name], (missing, 0))
    all_scored = [scored for _, scored in pairs]
    names = sorted({name for scored in all_scored for name in scored.parts})
    parts = {
        name: np.concatenate([scored.parts.get(name, np.full(len(scored.scores), np.nan)) for scored in all_scored])
        for name in names
    }
    joined = Scored(
        prompts=[prompt for scored in all_scored for prompt in scored.prompts],
        completions=[completion for scored in all_scored for completion in scored.completions],
        scores=np.concatenate([scored.scores for scored in all_scored]),
        parts=parts,
        lengths=np.concatenate([scored.lengths for scored in all_scored]),
        finished=np.concatenate([scored.finished for scored in all_scored]),
    )
    return DataProto.concat([rollout for rollout, _ in pairs]), joined
