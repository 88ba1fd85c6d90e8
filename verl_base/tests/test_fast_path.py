"""The fast path against plain verl and Transformers: the same probabilities, losses and gradients."""

import copy
import runpy
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from test_workers import cut_off, with_advantages
from transformers import AttentionInterface
from verl.utils import torch_functional
from verl.workers.engine import EngineRegistry

import worker_groups
from conftest import RECIPE
from data import load_prompts
from fast_path import SampledTokens
from worker_groups import compute_log_probs, sample, update_policy


def test_tokens_are_sampled_by_their_probabilities():
    torch.manual_seed(0)
    probabilities = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3, 0.0])
    sampled = SampledTokens(2.0)
    tokens = sampled(None, (2 * probabilities.log()).expand(100_000, -1)).argmax(-1)
    shares = torch.bincount(tokens, minlength=6) / 100_000
    torch.testing.assert_close(shares, probabilities, atol=0.005, rtol=0)  # three standard errors
    assert not shares[probabilities == 0].any()
    torch.testing.assert_close(sampled.log_probs[0][:, 0], probabilities[tokens].log())


def test_nothing_is_patched_until_a_process_asks_for_it(monkeypatch):
    """The file's own code run once more, which importing it did long before this test."""

    def patched():
        return torch_functional.logprobs_from_logits_v2, AttentionInterface._global_mapping["sdpa"]

    monkeypatch.setattr(torch_functional, "logprobs_from_logits_v2", torch_functional.logprobs_from_logits_v2)
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", AttentionInterface._global_mapping["sdpa"])
    monkeypatch.setattr(EngineRegistry, "_engines", copy.deepcopy(EngineRegistry._engines))
    before, engines = patched(), copy.deepcopy(EngineRegistry._engines)
    file = runpy.run_path(str(RECIPE / "fast_path.py"))
    assert patched() == before and EngineRegistry._engines == engines
    file["install"]()
    assert patched() == (file["log_probs_of_labels"], file["grouped_sdpa"]) and EngineRegistry._engines != engines


def test_fast_path_is_plain_verl(start, parse_arguments, data_file, tokenizer, policy_folder, tmp_path, monkeypatch):
    """Two ranks, gradient descent over three mini-batches: what moves the weights is the sum of the gradients."""
    descent = partial(worker_groups.FSDPOptimizerConfig, optimizer="SGD")
    monkeypatch.setattr(worker_groups, "FSDPOptimizerConfig", descent)
    flags = {"train_batch_size": 6, "ppo_mini_batch_size": 2, "learning_rate": 0.3, "max_grad_norm": 1e9}
    prompts, found = load_prompts(data_file, tokenizer, 64, None), {}
    for path in ("false", "true"):
        model_args, _, args = parse_arguments(**flags, fast_path=path, kl_loss_coef=0.1, entropy_coeff=0.01)
        policy, reference = start(model_args, args)
        sampled = sample(policy, prompts[:6], tokenizer.pad_token_id, 4, temperature=1.0, seed=1)
        mask = sampled.batch["response_mask"]
        for workers in (policy, reference):
            log_probs = compute_log_probs(workers, sampled, args) * mask
            torch.testing.assert_close(sampled.batch["old_log_probs"], log_probs, atol=1e-5, rtol=0)
        if path == "false":
            rollout = with_advantages(cut_off(sampled))
        log_probs = compute_log_probs(policy, rollout, args) * rollout.batch["response_mask"]
        metrics = update_policy(policy, rollout, args)
        (tmp_path / path).mkdir()
        policy.save_model(str(tmp_path / path))
        found[path] = log_probs, metrics, load_file(tmp_path / path / "model.safetensors")
        start.end()
    (log_probs, metrics, weights), (expected, plain_metrics, plain_weights) = found["true"], found["false"]
    torch.testing.assert_close(log_probs, expected, atol=1e-6, rtol=0)
    for name in ("loss", "grad_norm", "kl_loss", "actor/entropy_loss"):
        assert len(metrics[name]) == 3 and metrics[name] == pytest.approx(plain_metrics[name], abs=1e-5)
    before = load_file(f"{policy_folder}/model.safetensors")
    moved = {name: plain_weights[name] - weight for name, weight in before.items()}
    apart = max((weights[name] - plain_weights[name]).abs().max().item() for name in before)
    assert apart < 1e-6 < 0.01 < max(difference.abs().max().item() for difference in moved.values())
