"""Judging and comparing: advantages by hand, completions without a score, groups of equal scores."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from verl import DataProto

import train
from advantages import (
    add_advantages,
    find_zero_variance_groups,
    join_rollouts,
    punish_length,
    select_groups,
    weigh_rollout,
)
from data import Prompt, prompts_of_draw
from judge import call_reward_function
from reward_manager import Scored, arguments_of, score_completions
from rows import UserError


def make_rollout(tokenizer, completions: list[str], width: int = 6, prompt_length: int = 3, finished: bool = True):
    """A rollout as the workers give it, of these completions."""
    responses = torch.full((len(completions), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(responses)
    for row, completion in enumerate(completions):
        ids = tokenizer(completion + tokenizer.eos_token * finished)["input_ids"][:width]
        responses[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
    prompts = torch.ones(len(completions), prompt_length, dtype=torch.long)
    attention_mask = torch.cat([prompts, mask], 1)
    return DataProto.from_dict(
        tensors={
            "prompts": prompts,
            "responses": responses,
            "response_mask": mask,
            "old_log_probs": -0.5 * mask,
            "input_ids": torch.cat([prompts, responses], 1),
            "attention_mask": attention_mask,
            "position_ids": attention_mask.cumsum(1) - 1,
            "finished": (responses == tokenizer.eos_token_id).any(1),
        }
    )


class InThisProcess:
    """A function of the test in the place of a `RewardFunction`."""

    def __init__(self, function):
        self.function = function

    def ask(self, asked, skip_failures: bool = False) -> list:
        return [self.answer(*one) for one in asked]

    def answer(self, *one):
        try:
            return call_reward_function(self.function, arguments_of(*one))
        except ValueError as error:
            return UserError(str(error))


def asking(**changes) -> SimpleNamespace:
    """The flags by which completions are scored."""
    return SimpleNamespace(**({"skip_bad_rewards": True} | changes))


def learning(**changes) -> SimpleNamespace:
    """The flags by which they are compared."""
    flags = {"use_kl_in_reward": False, "norm_adv_by_std_in_grpo": True, "mask_truncated_completions": False}
    return SimpleNamespace(**(flags | changes))


def make_prompts(count: int) -> list[Prompt]:
    return [
        Prompt([{"role": "user", "content": f"问{number}"}], "八", "arithmetic", f"my.jsonl:{number + 1}")
        for number in range(count)
    ]


def judge(tokenizer, scores: list[float], completions: list[str] | None = None, prompts: int = 2):
    """Rollout and judgement with given scores."""
    rollout = make_rollout(tokenizer, completions or ["一二"] * len(scores))
    given = iter(scores)
    reward = InThisProcess(lambda **_: {"score": next(given), "acc": 1.0})
    return rollout, score_completions(rollout, make_prompts(prompts), tokenizer, reward, asking())


def test_reward_function_sees_the_completion_and_its_row(tokenizer):
    seen = []

    def reward(data_source, solution_str, ground_truth, extra_info):
        seen.append((data_source, solution_str, ground_truth, extra_info["finished"]))
        return 1

    rollout, reward = make_rollout(tokenizer, ["一加二", "三", "四五", "六"]), InThisProcess(reward)
    scored = score_completions(rollout, make_prompts(2), tokenizer, reward, asking(skip_bad_rewards=False))
    assert seen == [("arithmetic", completion, "八", True) for completion in ("一加二", "三", "四五", "六")]
    assert scored.lengths.tolist() == [4, 2, 3, 2] and scored.right.tolist() == [1] * 4
    cut_off = make_rollout(tokenizer, ["一加二"], width=3)
    score_completions(cut_off, make_prompts(1), tokenizer, reward, asking(skip_bad_rewards=False))
    assert seen[-1] == ("arithmetic", "一加二", "八", False)


def test_grpo_advantages_by_hand(tokenizer):
    scores = [1.0, 0.0, 0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    rollout, scored = judge(tokenizer, scores, ["一", "一二", "一二三", "一", "二", "二", "三四", "五"])
    add_advantages(rollout, scored, "grpo", learning())
    groups = torch.tensor(scores).view(2, 4)
    expected = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).view(-1, 1)
    torch.testing.assert_close(rollout.batch["advantages"], expected * rollout.batch["response_mask"])


def test_equal_scores_give_no_advantage(tokenizer):
    rollout, scored = judge(tokenizer, [1.1] * 6 + [0.1] * 6)
    add_advantages(rollout, scored, "grpo", learning())
    assert rollout.batch["advantages"].abs().max() < 1e-6


def test_rloo_advantages_by_hand(tokenizer):
    scores = [1.0, 0.0, 0.5, 0.0, 0.5, 0.5, 1.0, 1.0]
    rollout, scored = judge(tokenizer, scores)
    add_advantages(rollout, scored, "rloo", learning())
    groups = torch.tensor(scores).view(2, 4)
    others = (groups.sum(1, keepdim=True) - groups) / 3
    torch.testing.assert_close(rollout.batch["advantages"][:, 0], (groups - others).view(-1))


def test_reinforce_plus_plus_is_white_over_the_batch(tokenizer):
    rollout, scored = judge(tokenizer, [1.0, 0.0, 0.5, 0.0], ["一", "一二", "一二三", "一"])
    add_advantages(rollout, scored, "reinforce_plus_plus", learning())
    said = rollout.batch["advantages"][rollout.batch["response_mask"].bool()]
    assert said.mean().abs() < 1e-6 and said.var() == pytest.approx(1, abs=1e-4)


def test_completion_without_a_score_takes_no_part(tokenizer):
    rollout, scored = judge(tokenizer, [1.0, 0.0, float("nan"), 0.0, 1.0, 0.0, 0.0, 0.0])
    add_advantages(rollout, scored, "grpo", learning())
    alone = torch.tensor([1.0, 0.0, 0.0])
    expected = (alone - alone.mean()) / (alone.std() + 1e-6)
    torch.testing.assert_close(rollout.batch["advantages"][[0, 1, 3], 0], expected)
    assert rollout.batch["advantages"][2].abs().sum() == 0 and rollout.batch["response_mask"][2].sum() == 0
    statistics = train.rollout_statistics(rollout, scored)
    assert statistics["bad_rewards"] == 1 and statistics["reward"] == pytest.approx(2 / 7)


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus"])
def test_group_of_one_teaches_nothing(tokenizer, estimator):
    nan = float("nan")
    rollout, scored = judge(tokenizer, [1.0, nan, nan, nan, 1.0, 0.0, 0.0, nan])
    add_advantages(rollout, scored, estimator, learning())
    learned_from = rollout.batch["response_mask"].sum(1) > 0
    assert learned_from.tolist() == [False] * 4 + [True] * 3 + [False]
    assert rollout.batch["advantages"][:4].abs().sum() == 0
    assert find_zero_variance_groups(scored, scored.scores).tolist() == [True, False]


def test_dr_grpo_does_not_divide_by_the_deviation(tokenizer):
    rollout, scored = judge(tokenizer, [1.0, 0.0, 0.0, 0.0, 0.5, 0.5, 1.0, 1.0])
    add_advantages(rollout, scored, "grpo", learning(norm_adv_by_std_in_grpo=False))
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25, -0.25, -0.25, 0.25, 0.25])
    torch.testing.assert_close(rollout.batch["advantages"][:, 0], expected)


def test_kl_costs_reward_token_by_token(tokenizer):
    """REINFORCE++: what is still to come, less its KL to the reference, made white over the batch's tokens."""
    rollout, scored = judge(tokenizer, [1.0, 0.0], ["一", "一二三"], prompts=1)
    rollout.batch["ref_log_prob"] = rollout.batch["old_log_probs"] * 2  # -1 where the policy has -0.5: the KL is 0.5
    flags = learning(use_kl_in_reward=True, kl_coef=0.2, kl_penalty="kl")
    add_advantages(rollout, scored, "reinforce_plus_plus", flags)
    returns = torch.tensor(
        [0.8, 0.9, -0.4, -0.3, -0.2, -0.1]
    )  # the reward comes with the stop token, as does 0.1 of KL
    said = rollout.batch["response_mask"].bool()
    torch.testing.assert_close(rollout.batch["returns"][said], returns)
    white = (returns - returns.mean()) / returns.std()
    torch.testing.assert_close(rollout.batch["advantages"][said], white, atol=1e-5, rtol=0)


def test_rollout_that_differs_from_the_trainer_is_weighed(tokenizer):
    for kind, weights in (("token", [2.0, 0.36788]), ("sequence", [2.0, 0.13534])):  # e, 1/e; e^3, 1/e^2; 2 at most
        rollout, _ = judge(tokenizer, [1.0, 0.0], ["一二", "三"], prompts=1)
        mask = rollout.batch["response_mask"]
        rollout.batch["rollout_log_probs"] = rollout.batch["old_log_probs"] - torch.tensor([[1.0], [-1.0]]) * mask
        weigh_rollout(rollout, SimpleNamespace(rollout_is=kind, rollout_is_threshold=2.0))
        expected = torch.tensor(weights)[:, None] * mask
        torch.testing.assert_close(rollout.batch["rollout_is_weights"], expected, atol=1e-4, rtol=0)


def test_length_is_punished_toward_the_limit(tokenizer):
    """The last 4 of 6 tokens cost 0.5 at the end; as in verl, the stop token counts."""
    rollout, scored = judge(tokenizer, [1.0] * 4, ["一", "一二", "一二三", "一二三四五"], prompts=1)
    punish_length(scored, 6, SimpleNamespace(overlong_buffer_len=4, overlong_penalty_factor=0.5))
    assert scored.lengths.tolist() == [2, 3, 4, 6] and scored.scores.tolist() == [1.0, 0.875, 0.75, 0.5]
    assert scored.parts["overlong_reward"].tolist() == [0.0, -0.125, -0.25, -0.5]


def test_cut_off_completions_are_compared_but_not_learned_from(tokenizer):
    rollout = make_rollout(tokenizer, ["一", "一二三四五六七", "二", "三"])
    given = iter([1.0, 0.0, 0.0, 0.0])
    reward = InThisProcess(lambda **_: next(given))
    scored = score_completions(rollout, make_prompts(1), tokenizer, reward, asking())
    add_advantages(rollout, scored, "grpo", learning(mask_truncated_completions=True))
    assert scored.finished.tolist() == [True, False, True, True]
    assert rollout.batch["response_mask"].sum(1).tolist() == [2, 0, 2, 2]
    assert rollout.batch["advantages"][0, 0] == pytest.approx(1.5, abs=1e-4)  # (1 - 1/4) / 0.5: of four, not of three


def test_dapo_replaces_groups_that_are_all_right(tokenizer, monkeypatch):
    """Whatever their completions earn for their form: what counts is whether they are right."""
    prompts, drawn = make_prompts(4), []
    args = SimpleNamespace(algorithm="dapo", train_batch_size=2, rollout_n=2, temperature=1.0, overlong_buffer_len=1)
    args.overlong_penalty_factor, args.max_num_gen_batches = 0.25, 3
    args.seed = next(seed for seed in range(9) if prompts[0] in prompts_of_draw(prompts, 0, 2, seed))

    def sample_two(policy, batch, *_):
        drawn.append(batch)
        return make_rollout(tokenizer, ["一", "二三四五六"] * 2)

    def reward(solution_str, extra_info, **_):
        well_formed = solution_str == "一"
        return {"score": 1 + well_formed, "acc": float(well_formed or extra_info["question"] == "问0")}

    monkeypatch.setattr(train, "sample", sample_two)
    flags, reward = asking(max_response_length=6), InThisProcess(reward)
    _, scored, draw = train.collect_step(None, prompts, 0, tokenizer, reward, flags, args)
    assert draw == 2 and prompts[0] in drawn[0] and prompts[0] not in scored.prompts
    assert scored.scores.tolist() == [2.0, 0.75, 2.0, 0.75] and scored.parts["acc"].tolist() == [1, 0, 1, 0]
    monkeypatch.setattr(train, "sample", lambda *_: make_rollout(tokenizer, ["一", "一"] * 2))
    _, scored, draw = train.collect_step(None, prompts, 0, tokenizer, reward, flags, args)
    assert draw == 3 and len(scored.prompts) == 2  # no more draws: groups without a difference fill the batch


def test_groups_of_equal_scores_are_counted(tokenizer):
    nan = float("nan")
    rollout, scored = judge(tokenizer, [1.0, 1.0, 0.0, 1.0, nan, 0.0, nan, nan], prompts=4)
    assert find_zero_variance_groups(scored, scored.scores).tolist() == [True, False, True, True]
    assert train.rollout_statistics(rollout, scored)["zero_variance_groups"] == 3


def test_groups_are_selected_and_joined(tokenizer):
    first, scored = judge(tokenizer, [1.0, 1.0, 0.0, 1.0], ["一", "二", "三", "四"])
    second = make_rollout(tokenizer, ["五", "六"], prompt_length=5)
    other = score_completions(second, make_prompts(1), tokenizer, InThisProcess(lambda **_: 0.5), asking())
    other.parts = {"acc": np.array([0.0, 0.0]), "bonus": np.array([1.0, 0.0])}
    joined, all_scored = join_rollouts([select_groups(first, scored, np.array([1])), (second, other)])
    assert all_scored.completions == ["三", "四", "五", "六"] and all_scored.scores.tolist() == [0.0, 1.0, 0.5, 0.5]
    assert all_scored.parts["acc"].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert np.isnan(all_scored.parts["bonus"]).tolist() == [True, True, False, False]
    assert joined.batch["prompts"].shape == (4, 5) and joined.batch["attention_mask"].shape == (4, 11)
    assert joined.batch["attention_mask"][0].tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert [prompt.source for prompt in all_scored.prompts] == ["my.jsonl:2", "my.jsonl:1"]


def test_right_is_the_score_where_there_is_no_accuracy():
    scored = Scored(make_prompts(1), ["一"], np.array([0.25]), {}, np.array([1]), np.array([True]))
    assert scored.right.tolist() == [0.25]
