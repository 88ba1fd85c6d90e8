"""Two FSDP2 workers against plain PyTorch: what is sampled, what it is worth, what is learned from it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import make_policy
from data import load_prompts
from engines import compute_log_probs, update_policy
from layers import SampledTokens
from rollout import sample


def load_plain(folder) -> torch.nn.Module:
    """The model with its attention written out, which shares nothing with ours."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def plain_log_probs(model, batch) -> torch.Tensor:
    """Log-probabilities [replies, length] of the replies by one padded forward pass."""
    length = batch["responses"].shape[1]
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=batch["position_ids"]
    ).logits[:, -length - 1 : -1]
    return torch.log_softmax(logits, -1).gather(-1, batch["responses"][..., None])[..., 0] * batch["response_mask"]


def cut_off(rollout):
    """The rollout with replies of 1, 2, 3 ... tokens."""
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
    assert len({tuple(reply) for reply in rollout.batch["responses"][:4].tolist()}) > 1
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


def test_tokens_are_sampled_by_their_probabilities():
    torch.manual_seed(0)
    probabilities = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3, 0.0])
    sampled = SampledTokens(2.0)
    tokens = sampled(None, (2 * probabilities.log()).expand(100_000, -1)).argmax(-1)
    shares = torch.bincount(tokens, minlength=6) / 100_000
    torch.testing.assert_close(shares, probabilities, atol=0.005, rtol=0)  # three standard errors
    assert not shares[probabilities == 0].any()
    torch.testing.assert_close(sampled.log_probs[0][:, 0], probabilities[tokens].log())


def test_replies_end_with_their_eos(start, parse_arguments, prompts, tokenizer, tmp_path):
    """The token that ends a turn, though the model's folder names another one, as those of base models do; and what a
    folder recommends for chatting has no say in training. One rank ends long before the other."""
    folder = make_policy(tmp_path / "base")
    model, eos = load_plain(folder), tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.get_input_embeddings().weight.data[eos] *= 20  # so that many replies end
    model.save_pretrained(folder)
    config = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|endoftext|>"}))
    recommended = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.5}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(recommended))
    model_args, _, args = parse_arguments(model_name_or_path=folder)
    policy, _ = start(model_args, args, reply_length=48)
    batch = sample(policy, prompts[:2], tokenizer.pad_token_id, 2, temperature=1.0, seed=32).batch
    assert batch["response_mask"].sum(1).tolist() == [5, 48, 2, 12]
    for reply, mask in zip(batch["responses"], batch["response_mask"], strict=True):
        said = reply[mask.bool()].tolist()
        assert said.count(eos) == (said[-1] == eos) and (said[-1] == eos or len(said) == 48)
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
    with torch.no_grad():
        expected = plain_log_probs(model, batch)
    torch.testing.assert_close(batch["old_log_probs"], expected, atol=1e-5, rtol=0)
    policy.save_model(str(tmp_path / "learned"))
    saved = json.loads((tmp_path / "learned" / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in recommended} == recommended


@pytest.mark.parametrize("processes", [1, 2])
def test_an_update_is_that_of_a_plain_loop(
    start, parse_arguments, prompts, tokenizer, processes, rollout_file, policy_folder, tmp_path
):
    """Clipped loss and KL, token mean over the global mini-batch, AdamW: same gradient norm, same weights to 1e-5."""
    from verl import DataProto

    flags = {"train_batch_size": 6, "ppo_mini_batch_size": 6, "nproc": processes, "ppo_max_token_len_per_gpu": 128}
    model_args, _, args = parse_arguments(**flags, kl_loss_coef=0.1)
    policy, _ = start(model_args, args)
    few_at_once = sample(policy, prompts[:24], tokenizer.pad_token_id, 4, temperature=1.0, seed=1)
    with torch.no_grad():
        expected = plain_log_probs(load_plain(policy_folder), few_at_once.batch)
    torch.testing.assert_close(few_at_once.batch["old_log_probs"], expected, atol=1e-5, rtol=0)
    rollout = DataProto.load_from_disk(rollout_file)
    metrics = update_policy(policy, rollout, args)
    (tmp_path / "learned").mkdir()
    (tmp_path / "learned" / "adapter_config.json").write_text("{}")  # of a run before
    policy.save_model(str(tmp_path / "learned"))
    assert not (tmp_path / "learned" / "adapter_config.json").exists()

    model = load_plain(policy_folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    batch, mask = rollout.batch, rollout.batch["response_mask"]
    log_probs = plain_log_probs(model, batch)
    ratio = (log_probs - batch["old_log_probs"]).exp()
    gain = torch.min(ratio * batch["advantages"], ratio.clamp(0.8, 1.2) * batch["advantages"])
    difference = batch["ref_log_prob"] - log_probs
    kl = difference.exp() - difference - 1  # http://joschu.net/blog/kl-approx.html
    loss = ((0.1 * kl - gain) * mask).sum() / mask.sum()
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
    metrics = update_policy(policy, rollout, args)
    assert len(metrics["grad_norm"]) == 3 and min(metrics["grad_norm"]) > 0
    assert min(metrics["actor/entropy_loss"]) > 1
    after = compute_log_probs(policy, rollout, args) * mask
    base = compute_log_probs(policy, rollout, args, no_lora_adapter=True) * mask
    torch.testing.assert_close(base, rollout.batch["old_log_probs"], atol=1e-5, rtol=0)
    assert (after - base).abs().max() > 1e-3
    policy.save_model(str(tmp_path / "adapter"))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(plain_log_probs(loaded, rollout.batch), after, atol=1e-5, rtol=0)
