"""Two FSDP2 workers against plain PyTorch: what is sampled, what it is worth, what is learned from it."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PersimmonConfig,
    PersimmonForCausalLM,
)

import train
from conftest import make_policy
from data import load_prompts
from reward_manager import Scored
from worker_groups import compute_log_probs, policy_loss, sample, update_policy
from workers import make_savable, switch_off_dropout


def load_plain(folder) -> torch.nn.Module:
    """The model with its attention written out, which shares nothing with ours."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def plain_log_probs(model, batch) -> torch.Tensor:
    """Log-probabilities [completions, length] of the completions by one padded forward pass."""
    length = batch["responses"].shape[1]
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=batch["position_ids"]
    ).logits[:, -length - 1 : -1]
    return torch.log_softmax(logits, -1).gather(-1, batch["responses"][..., None])[..., 0] * batch["response_mask"]


def cut_off(rollout):
    """The rollout with completions of 1, 2, 3 ... tokens."""
    batch = rollout.batch
    width, length = batch["prompts"].shape[1], batch["responses"].shape[1]
    batch["response_mask"] *= torch.arange(length) < 1 + torch.arange(len(rollout))[:, None] % length
    batch["attention_mask"][:, width:] = batch["response_mask"]
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    batch["old_log_probs"] *= batch["response_mask"]
    return rollout


def with_advantages(rollout, seed: int = 0):
    """The rollout with made-up advantages and a reference that differs a little from the policy."""
    mask = rollout.batch["response_mask"]
    generator = torch.Generator().manual_seed(seed)
    rollout.batch["advantages"] = torch.randn(len(mask), 1, generator=generator) * mask
    rollout.batch["returns"] = rollout.batch["advantages"]
    noise = 0.1 * torch.randn(mask.shape, generator=generator)
    rollout.batch["ref_log_prob"] = (rollout.batch["old_log_probs"] + noise) * mask
    return rollout


@pytest.fixture
def prompts(data_file, tokenizer):
    return load_prompts(data_file, tokenizer, 64, None)


@pytest.fixture(scope="module")
def rollout_file(tmp_path_factory):
    return tmp_path_factory.mktemp("rollout") / "rollout"


def test_sampled_log_probs_are_the_models(start, parse_arguments, prompts, tokenizer, policy_folder, rollout_file):
    model_args, _, args = parse_arguments(kl_loss_coef=0.01)
    policy, reference = start(model_args, args)
    rollout = sample(policy, prompts[:6], tokenizer.pad_token_id, 4, temperature=1.0, seed=1)
    again = sample(policy, prompts[:6], tokenizer.pad_token_id, 4, temperature=1.0, seed=1)
    other = sample(policy, prompts[:6], tokenizer.pad_token_id, 4, temperature=1.0, seed=2)
    assert torch.equal(rollout.batch["responses"], again.batch["responses"])
    assert not torch.equal(rollout.batch["responses"], other.batch["responses"])
    assert len({tuple(completion) for completion in rollout.batch["responses"][:4].tolist()}) > 1
    model = load_plain(policy_folder)
    mask = rollout.batch["response_mask"]
    with torch.no_grad():
        expected = plain_log_probs(model, rollout.batch)
    torch.testing.assert_close(rollout.batch["old_log_probs"], expected, atol=1e-5, rtol=0)
    for workers in (policy, reference):
        given = compute_log_probs(workers, rollout, args) * mask
        torch.testing.assert_close(given, expected, atol=1e-6, rtol=0)
    hot = sample(policy, prompts[:2], tokenizer.pad_token_id, 4, temperature=2.0, seed=1)
    args.temperature = 2.0
    recomputed = compute_log_probs(policy, hot, args) * hot.batch["response_mask"]
    torch.testing.assert_close(hot.batch["old_log_probs"], recomputed, atol=1e-5, rtol=0)
    args.temperature = 1.0
    odd = sample(policy, prompts[:3], tokenizer.pad_token_id, 2, temperature=1.0, seed=1)  # 3 prompts, 2 ranks
    assert [tokenizer.decode(ids) for ids in odd.batch["prompts"][::2]][2].endswith("assistant\n") and len(odd) == 6
    rollout = with_advantages(cut_off(rollout))
    given = compute_log_probs(policy, rollout, args) * rollout.batch["response_mask"]
    torch.testing.assert_close(given, rollout.batch["old_log_probs"], atol=1e-5, rtol=0)
    rollout.save_to_disk(rollout_file)


def test_completions_end_with_a_stop_token(start, parse_arguments, prompts, tokenizer, tmp_path):
    """The token that ends a turn, though the tokenizer names another one, as those of base models do, and those that
    generation_config.json names; what else it recommends for chatting has no say in training. One rank ends long before
    the other."""
    folder = make_policy(tmp_path / "base")
    model, stops = load_plain(folder), tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    model.get_input_embeddings().weight.data[stops] *= 15  # so that many completions end
    model.save_pretrained(folder)
    config = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|endoftext|>"}))
    recommended = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.5}
    recommended["eos_token_id"] = stops[:1]  # as GLM-4's <|user|>: it begins the next turn
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(recommended))
    model_args, _, args = parse_arguments(model_name_or_path=folder)
    policy, _ = start(model_args, args, completion_length=48)
    batch = sample(policy, prompts[:2], tokenizer.pad_token_id, 2, temperature=1.0, seed=20).batch
    assert batch["response_mask"].sum(1).tolist() == [7, 13, 4, 48]
    for completion, mask in zip(batch["responses"], batch["response_mask"], strict=True):
        said = completion[mask.bool()].tolist()
        assert not set(said[:-1]) & set(stops) and (said[-1] in stops or len(said) == 48)
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
    ends = batch["responses"].gather(1, batch["response_mask"].sum(1, keepdim=True) - 1)[:, 0]
    assert batch["finished"].tolist() == [end in stops for end in ends.tolist()]
    with torch.no_grad():
        expected = plain_log_probs(model, batch)
    torch.testing.assert_close(batch["old_log_probs"], expected, atol=1e-5, rtol=0)
    policy.save_model(str(tmp_path / "learned"))
    assert json.loads((tmp_path / "learned" / "config.json").read_text())["attention_dropout"] == 0.3  # as it came
    saved = json.loads((tmp_path / "learned" / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in recommended} == recommended | {"eos_token_id": stops}


def judged(prompts, rollout, scores, finished: bool = True) -> Scored:
    """What a reward function might say of it, score by score."""
    lengths = rollout.batch["response_mask"].sum(1).numpy()
    ends = np.full(len(scores), finished)
    return Scored(prompts, [""] * len(scores), np.array(scores), {}, lengths, ends)


def test_a_step_weighs_the_rollout_and_measures_the_way_from_the_reference(start, parse_arguments, prompts, tokenizer):
    """The whole of `take_step`, whose rollout is by another kernel than the trainer's, as it were."""
    flags = {"algorithm": "reinforce_plus_plus", "recompute_log_probs": "true", "rollout_is": "token", "kl_coef": 0.5}
    model_args, _, args = parse_arguments(**flags)
    policy, reference = start(model_args, args)
    scores = [1.0, 0.0, 0.5, 0.0] * 4
    for seed in (1, 2):  # after the first step the policy is another one than the reference
        rollout = sample(policy, prompts[:4], tokenizer.pad_token_id, 4, temperature=1.0, seed=seed)
        batch, mask = rollout.batch, rollout.batch["response_mask"].clone()
        sampled = (batch["old_log_probs"] - 0.3 * torch.arange(len(mask))[:, None] % 2) * mask
        batch["old_log_probs"] = sampled.clone()
        ours, theirs = (compute_log_probs(workers, rollout, args) * mask for workers in (policy, reference))
        metrics = train.take_step(policy, reference, rollout, judged(prompts[:4], rollout, scores), args)
    said = mask.bool()
    torch.testing.assert_close(batch["rollout_log_probs"], sampled)
    torch.testing.assert_close((batch["old_log_probs"] * mask), ours)
    weights = (ours - sampled).exp().clamp(max=2.0)
    assert weights[said].max() > weights[said].min() + 0.3
    torch.testing.assert_close(batch["rollout_is_weights"][said], weights[said])
    assert metrics["rollout_is_mean"] == pytest.approx(weights[said].mean().item(), rel=1e-5)
    torch.testing.assert_close(batch["ref_log_prob"] * mask, theirs)
    kl = (ours - theirs) * mask
    assert metrics["kl"] == pytest.approx(kl[said].mean().item(), abs=1e-6) and kl.abs().max() > 1e-3
    expected = torch.tensor(scores) - 0.5 * kl.sum(1)  # of all that is to come at the first token
    torch.testing.assert_close(batch["returns"][:, 0], expected, atol=1e-5, rtol=0)
    assert metrics["skipped_updates"] == 0 and metrics["grad_norm"] > 0

    # Nothing to learn from: no group with two scores; all completions cut off and masked.
    before = compute_log_probs(policy, rollout, args) * mask
    nan = float("nan")
    for scores, masked in (([1.0, nan, nan, nan] * 4, False), ([1.0, 0.0, 0.5, 0.0] * 4, True)):
        rollout = sample(policy, prompts[:4], tokenizer.pad_token_id, 4, temperature=1.0, seed=3)
        args.mask_truncated_completions = masked
        scored = judged(prompts[:4], rollout, scores, finished=not masked)
        metrics = train.take_step(policy, reference, rollout, scored, args)
        assert metrics["skipped_updates"] == 2 and not {"grad_norm", "loss", "rollout_is_mean", "kl"} & set(metrics)
        assert not rollout.batch["response_mask"].any() and metrics["learning_rate"] > 0
    rollout.batch["responses"], rollout.batch["input_ids"] = batch["responses"], batch["input_ids"]
    for name in ("attention_mask", "position_ids", "response_mask"):
        rollout.batch[name] = batch[name]
    torch.testing.assert_close(compute_log_probs(policy, rollout, args) * mask, before, atol=0, rtol=0)


SMALL = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64)  # modules: 0.1 each
PERSIMMON = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GPT2LMHeadModel(GPT2), {("attn_pdrop", 0.1), ("embd_pdrop", 0.1), ("resid_pdrop", 0.1)}),
        (
            # read from its config in each pass
            lambda: PersimmonForCausalLM(PersimmonConfig(**SMALL, **PERSIMMON, pad_token_id=0, attention_dropout=0.3)),
            {("attention_dropout", 0.3)},
        ),
    ],
)
def test_dropout_is_off_wherever_a_model_keeps_it(make, said):
    model = make().train()
    ids = torch.arange(3, 23).view(2, 10)
    assert (model(ids).logits - model(ids).logits).abs().max() > 1e-3
    found = switch_off_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits) and model.training
    assert {(name, value) for _, name, value in found if value} >= said


def clipped(ratio, advantages):
    return torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def grpo_terms(difference, to_reference, advantages, weights):
    """Of each token: the clipped gain, weighed (TIS), and low_var_kl (http://joschu.net/blog/kl-approx.html)."""
    kl = (-to_reference).exp() + to_reference - 1
    return 0.1 * kl - weights * clipped(difference.exp(), advantages)


def grpo_loss(difference, to_reference, advantages, weights, mask):
    """The mean over all tokens."""
    return (grpo_terms(difference, to_reference, advantages, weights) * mask).sum() / mask.sum()


def dr_grpo_loss(difference, to_reference, advantages, weights, mask):
    """Sums over the tokens of a completion, by the tokens that it may have (arXiv:2503.20783)."""
    return (grpo_terms(difference, to_reference, advantages, weights) * mask).sum(1).mean() / mask.shape[1]


def gspo_loss(difference, to_reference, advantages, weights, mask):
    """Clipped ratios of whole completions (arXiv:2507.18071, equation 5), and k1+: k1's value, k2's gradient."""

    def over_completions(values):
        return (values * mask).sum(1) / mask.sum(1)

    gain = clipped(over_completions(difference).exp(), advantages[:, 0])
    square = over_completions(to_reference**2 / 2)
    kl = over_completions(to_reference).detach() + square - square.detach()
    return (0.1 * kl - gain).mean()


DR_GRPO = {"loss_agg_mode": "seq-mean-token-sum-norm"}
GSPO = {"loss_mode": "gspo", "loss_agg_mode": "seq-mean-token-mean", "kl_loss_type": "k1+"}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({"temperature": 0.6, "top_p": 0.9}, 0.6), ({"temperature": 0.0}, None), ({"do_sample": False, "top_k": 5}, None)],
)
def test_settings_for_sampling_can_be_saved(settings, kept, tmp_path):
    config = GenerationConfig(**settings, eos_token_id=[1, 2])
    make_savable(config)
    config.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.temperature, saved.eos_token_id) == (kept, [1, 2]) and bool(saved.do_sample) == (kept is not None)


@pytest.mark.parametrize(
    ("processes", "losses"), [(1, [(gspo_loss, GSPO), (dr_grpo_loss, DR_GRPO)]), (2, [(grpo_loss, {})])]
)
def test_an_update_is_that_of_a_plain_loop(
    start, parse_arguments, prompts, tokenizer, processes, losses, rollout_file, policy_folder, tmp_path
):
    """Clipped loss and KL, means over the global mini-batch, AdamW: same gradient norm, same weights to 1e-5."""
    from verl import DataProto

    flags = {"train_batch_size": 6, "ppo_mini_batch_size": 6, "nproc": processes, "ppo_max_token_len_per_gpu": 128}
    policy, _ = start(*parse_arguments(**flags, kl_loss_coef=0.1)[::2])
    few_at_once = sample(policy, prompts[:24], tokenizer.pad_token_id, 4, temperature=1.0, seed=1)
    with torch.no_grad():
        expected = plain_log_probs(load_plain(policy_folder), few_at_once.batch)
    torch.testing.assert_close(few_at_once.batch["old_log_probs"], expected, atol=1e-5, rtol=0)
    (tmp_path / "learned").mkdir()
    (tmp_path / "learned" / "adapter_config.json").write_text("{}")  # of a run before
    for expected_loss, of_loss in losses:
        _, _, args = parse_arguments(**flags, **of_loss, kl_loss_coef=0.1)
        policy.reset()
        policy.set_loss_fn(policy_loss(args))
        rollout = DataProto.load_from_disk(rollout_file)
        batch, mask = rollout.batch, rollout.batch["response_mask"]
        torch.manual_seed(0)
        batch["old_log_probs"] += 0.3 * torch.randn(mask.shape) * mask  # so that some ratios are clipped
        weights = 2 * torch.rand(mask.shape)
        if expected_loss is not gspo_loss:
            batch["rollout_is_weights"] = weights
        metrics = update_policy(policy, rollout, args)
        assert metrics["actor/pg_clipfrac"][0] > 0.01
        policy.save_model(str(tmp_path / "learned"))
        assert not (tmp_path / "learned" / "adapter_config.json").exists()

        model = load_plain(policy_folder)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        log_probs = plain_log_probs(model, batch)
        difference, to_reference = log_probs - batch["old_log_probs"], log_probs - batch["ref_log_prob"]
        loss = expected_loss(difference, to_reference, batch["advantages"], weights, mask)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert metrics["loss"] == [pytest.approx(loss.item(), abs=1e-5)]
        assert metrics["grad_norm"] == [pytest.approx(norm.item(), rel=1e-4)]
        trained = load_plain(tmp_path / "learned").state_dict()
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(trained[name], weight, atol=1e-5, rtol=0)


def test_lora_learns_adapters_only(start, parse_arguments, rollout_file, policy_folder, tmp_path):
    from peft import AutoPeftModelForCausalLM
    from verl import DataProto

    flags = {"use_lora": "true", "lora_r": 4, "train_batch_size": 6, "ppo_mini_batch_size": 2, "learning_rate": 1e-2}
    model_args, _, args = parse_arguments(**flags, entropy_coeff=0.01)
    policy, reference = start(model_args, args)
    assert reference is None  # the model without its adapters is the reference
    rollout = DataProto.load_from_disk(rollout_file)
    mask = rollout.batch["response_mask"]
    for rank in range(2):  # the second of three mini-batches has nothing to learn from on either rank
        mask[12 * rank + 4 : 12 * rank + 8] = 0
    metrics = update_policy(policy, rollout, args)
    assert len(metrics["grad_norm"]) == 2 and min(metrics["grad_norm"]) > 0 and metrics["skipped"] == [1]
    assert min(metrics["actor/entropy_loss"]) > 1
    after = compute_log_probs(policy, rollout, args) * mask
    base = compute_log_probs(policy, rollout, args, no_lora_adapter=True) * mask
    torch.testing.assert_close(base, rollout.batch["old_log_probs"] * mask, atol=1e-5, rtol=0)
    assert (after - base).abs().max() > 1e-3
    policy.save_model(str(tmp_path / "adapter"))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    saved = json.loads((tmp_path / "adapter" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [AutoTokenizer.from_pretrained(policy_folder).eos_token_id]
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(plain_log_probs(loaded, rollout.batch), after, atol=1e-5, rtol=0)
