"""Judging and comparing: advantages by hand, replies without a score, groups of equal scores."""

import numpy as np
import pytest
import torch
from verl import DataProto

from conftest import write_rows
from data import Prompt
from judge import call_reward_function, load_reward_function
from rollout import (
    Judged,
    add_advantages,
    find_equal_groups,
    join_rollouts,
    judge_replies,
    rollout_statistics,
    select_groups,
)
from rows import UserError


def make_rollout(tokenizer, replies: list[str], width: int = 6, prompt_length: int = 3, finished: bool = True):
    """A rollout as the workers give it, of these replies."""
    responses = torch.full((len(replies), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(responses)
    for row, reply in enumerate(replies):
        ids = tokenizer(reply + tokenizer.eos_token * finished)["input_ids"][:width]
        responses[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
    prompts = torch.ones(len(replies), prompt_length, dtype=torch.long)
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
        }
    )


def make_prompts(count: int) -> list[Prompt]:
    return [
        Prompt([{"role": "user", "content": f"问{number}"}], "八", "arithmetic", f"my.jsonl:{number + 1}")
        for number in range(count)
    ]


def judge(tokenizer, scores: list[float], replies: list[str] | None = None, prompts: int = 2):
    """Rollout and judgement with given scores."""
    rollout = make_rollout(tokenizer, replies or ["一二"] * len(scores))
    given = iter(scores)
    judged = judge_replies(
        rollout, make_prompts(prompts), tokenizer, lambda **_: {"score": next(given), "acc": 1.0}, skip_bad=True
    )
    return rollout, judged


def test_reward_function_sees_the_reply_and_its_row(tokenizer):
    seen = []

    def reward(data_source, solution_str, ground_truth, extra_info):
        seen.append((data_source, solution_str, ground_truth, extra_info["finished"]))
        return 1

    rollout = make_rollout(tokenizer, ["一加二", "三", "四五", "六"])
    judged = judge_replies(rollout, make_prompts(2), tokenizer, reward, skip_bad=False)
    assert seen == [("arithmetic", reply, "八", True) for reply in ("一加二", "三", "四五", "六")]
    assert judged.lengths.tolist() == [4, 2, 3, 2] and judged.right.tolist() == [1] * 4
    cut_off = make_rollout(tokenizer, ["一加二"], width=3)
    judge_replies(cut_off, make_prompts(1), tokenizer, reward, skip_bad=False)
    assert seen[-1] == ("arithmetic", "一加二", "八", False)


def test_grpo_advantages_by_hand(tokenizer):
    scores = [1.0, 0.0, 0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    rollout, judged = judge(tokenizer, scores, ["一", "一二", "一二三", "一", "二", "二", "三四", "五"])
    add_advantages(rollout, judged, "grpo")
    groups = torch.tensor(scores).view(2, 4)
    expected = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).view(-1, 1)
    torch.testing.assert_close(rollout.batch["advantages"], expected * rollout.batch["response_mask"])


def test_equal_scores_give_no_advantage(tokenizer):
    rollout, judged = judge(tokenizer, [1.1] * 6 + [0.1] * 6)
    add_advantages(rollout, judged, "grpo")
    assert rollout.batch["advantages"].abs().max() < 1e-6


def test_rloo_advantages_by_hand(tokenizer):
    scores = [1.0, 0.0, 0.5, 0.0, 0.5, 0.5, 1.0, 1.0]
    rollout, judged = judge(tokenizer, scores)
    add_advantages(rollout, judged, "rloo")
    groups = torch.tensor(scores).view(2, 4)
    others = (groups.sum(1, keepdim=True) - groups) / 3
    torch.testing.assert_close(rollout.batch["advantages"][:, 0], (groups - others).view(-1))


def test_reinforce_plus_plus_is_white_over_the_batch(tokenizer):
    rollout, judged = judge(tokenizer, [1.0, 0.0, 0.5, 0.0], ["一", "一二", "一二三", "一"])
    add_advantages(rollout, judged, "reinforce_plus_plus")
    said = rollout.batch["advantages"][rollout.batch["response_mask"].bool()]
    assert said.mean().abs() < 1e-6 and said.var() == pytest.approx(1, abs=1e-4)


def test_reply_without_a_score_takes_no_part(tokenizer):
    rollout, judged = judge(tokenizer, [1.0, 0.0, float("nan"), 0.0, 1.0, 0.0, 0.0, 0.0])
    add_advantages(rollout, judged, "grpo")
    alone = torch.tensor([1.0, 0.0, 0.0])
    expected = (alone - alone.mean()) / (alone.std() + 1e-6)
    torch.testing.assert_close(rollout.batch["advantages"][[0, 1, 3], 0], expected)
    assert rollout.batch["advantages"][2].abs().sum() == 0 and rollout.batch["response_mask"][2].sum() == 0
    statistics = rollout_statistics(rollout, judged)
    assert statistics["bad_rewards"] == 1 and statistics["reward"] == pytest.approx(2 / 7)


def test_groups_of_equal_scores_are_counted(tokenizer):
    nan = float("nan")
    rollout, judged = judge(tokenizer, [1.0, 1.0, 0.0, 1.0, nan, 0.0, nan, nan], prompts=4)
    assert find_equal_groups(judged).tolist() == [True, False, True, True]
    assert rollout_statistics(rollout, judged)["equal_groups"] == 3


def test_groups_are_selected_and_joined(tokenizer):
    first, judged = judge(tokenizer, [1.0, 1.0, 0.0, 1.0], ["一", "二", "三", "四"])
    second = make_rollout(tokenizer, ["五", "六"], prompt_length=5)
    other = judge_replies(second, make_prompts(1), tokenizer, lambda **_: 0.5, skip_bad=False)
    other.parts = {"acc": np.array([0.0, 0.0]), "bonus": np.array([1.0, 0.0])}
    joined, all_judged = join_rollouts([select_groups(first, judged, np.array([1])), (second, other)])
    assert all_judged.replies == ["三", "四", "五", "六"] and all_judged.scores.tolist() == [0.0, 1.0, 0.5, 0.5]
    assert all_judged.parts["acc"].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert np.isnan(all_judged.parts["bonus"]).tolist() == [True, True, False, False]
    assert joined.batch["prompts"].shape == (4, 5) and joined.batch["attention_mask"].shape == (4, 11)
    assert joined.batch["attention_mask"][0].tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert [prompt.source for prompt in all_judged.prompts] == ["my.jsonl:2", "my.jsonl:1"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('x')", "KeyError: 'x'"),
        ("return float('nan')", "the score is nan"),
        ("return {'acc': 1.0}", "KeyError: 'score'"),
        ("return None", "TypeError"),
    ],
)
def test_failing_reward_function_is_reported_with_its_sample(tmp_path, tokenizer, body, message):
    path = tmp_path / "my_rewards.py"
    path.write_text(f"def score(solution_str, **_):\n    if solution_str != '二':\n        return 1.0\n    {body}\n")
    reward = load_reward_function(f"{path}:score")
    rollout = make_rollout(tokenizer, ["一", "二", "一", "一"])
    with pytest.raises(UserError, match="the reward function failed on the reply '二' to '问0'") as error:
        judge_replies(rollout, make_prompts(2), tokenizer, reward, skip_bad=False)
    assert str(error.value).startswith("my.jsonl:1: ") and message in str(error.value)
    judged = judge_replies(rollout, make_prompts(2), tokenizer, reward, skip_bad=True)
    assert np.isnan(judged.scores).tolist() == [False, True, False, False]
    with pytest.raises(UserError, match="on every reply of a step"):
        judge_replies(make_rollout(tokenizer, ["二", "二"]), make_prompts(1), tokenizer, reward, skip_bad=True)


def test_reward_function_may_return_what_is_no_number(tmp_path, tokenizer):
    path = tmp_path / "my_rewards.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport numpy as np\n\n"
        "@dataclass\nclass Rule:\n    weight: float | None = 1.0\n\n"
        "def score(**_):\n    return {'score': '0.5', 'pred': None, 'said': [1], 'acc': np.True_, 'n': np.int64(2)}\n"
    )
    reward, prompt = load_reward_function(f"{path}:score"), make_prompts(1)[0]
    assert call_reward_function(reward, prompt, "一", True) == {"score": 0.5, "acc": 1.0, "n": 2.0}


@pytest.mark.parametrize("name", ["my_rewards.py", "nowhere.py:score", "my_rewards.py:other", "score"])
def test_reward_function_that_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "my_rewards.py", [])
    with pytest.raises(UserError, match="--reward_function"):
        load_reward_function(name)


def test_right_is_the_score_where_there_is_no_accuracy():
    judged = Judged(make_prompts(1), ["一"], np.array([0.25]), {}, np.array([1]), np.array([True]))
    assert judged.right.tolist() == [0.25]
