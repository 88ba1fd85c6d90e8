"""The loss is the formula's, and one and the same however the pairs are laid out and whoever computes them."""

import json
import math
import shutil

import pytest
import torch
from ranks import losses, read_history, run_train, train_here

from conftest import make_pairs, write_rows
from data import IGNORE_INDEX, encode_pair, load_encoded
from dpo_arguments import DPOArguments
from dpo_trainer import ReferenceLogProbabilities, collate_pairs
from preference_loss import preference_losses
from prefix_sharing import share_prefixes
from rows import UserError

COMMON = "--learning_rate 1e-3 --lr_scheduler_type constant --logging_steps 1 --save_strategy no --num_train_epochs 2"
COMMON += " --validation_split 0.1 --model_max_length 512"
LORA = ["--use_lora", "true", "--learning_rate", "1e-2"]


def flags(model, data_file, output, *more):
    paths = ["--model_name_or_path", model, "--data_path", data_file, "--output_dir", str(output)]
    return [*paths, *COMMON.split(), *more]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """References are computed in each test, not found."""
    monkeypatch.setattr("train.CACHE_DIR", tmp_path)


def test_both_replies_stand_whole_behind_the_prompt_as_served(tokenizer):
    prompt = [
        {"role": "user", "content": "天地"},
        {"role": "assistant", "content": "玄"},
        {"role": "user", "content": "黄"},
    ]
    replies = [{"role": "assistant", "content": text} for text in ("宇宙洪荒", "宇宙日月")]
    pair = encode_pair(prompt, replies, tokenizer, 512, 512)
    served = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    batch = collate_pairs([pair | {"pair": 7, "source": "a.jsonl:1"}])
    for row, text in enumerate(("宇宙洪荒", "宇宙日月")):
        ids, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
        length = int(batch["attention_mask"][row].sum())
        assert ids[: len(served)] == served and set(labels[: len(served)]) == {IGNORE_INDEX}
        assert labels[len(served) : length] == ids[len(served) : length]
        assert tokenizer.decode(ids[len(served) : length]) == f"{text}</s>"


def test_long_prompts_lose_their_oldest_exchanges_and_replies_their_end(tokenizer):
    prompt = [{"role": role, "content": "天地玄黄" * 5} for role in ("user", "assistant", "user", "assistant", "user")]
    replies = [{"role": "assistant", "content": "宇宙" * 20}, {"role": "assistant", "content": "日"}]
    whole = encode_pair(prompt, replies, tokenizer, 512, 512)
    last = encode_pair(prompt[4:], replies, tokenizer, 512, 512)
    cut = encode_pair(prompt, replies, tokenizer, last["prompt_length"] + 3, last["prompt_length"])
    assert (cut["exchanges_dropped"], cut["prompt_length"]) == (2, last["prompt_length"]) and cut["chosen_length"] == 3
    rejected_length = len(whole["input_ids"]) - whole["prompt_length"] - whole["chosen_length"]
    assert cut["tokens_cut"] == whole["chosen_length"] - 3 + max(0, rejected_length - 3)
    with pytest.raises(UserError, match="tokens in its newest question"):
        encode_pair(prompt, replies, tokenizer, 512, last["prompt_length"] - 1)


def test_shared_rows_hold_each_token_once(tokenizer):
    pairs = [
        {"input_ids": [1, 2, 3, 4, 5, 9, 4, 6, 9], "prompt_length": 3, "chosen_length": 3, "pair": 0, "source": "a:1"},
        {"input_ids": [1, 7, 9, 7, 8, 9], "prompt_length": 1, "chosen_length": 2, "pair": 1, "source": "a:2"},
    ]
    inputs, places = share_prefixes(collate_pairs(pairs))
    assert inputs["input_ids"][0].tolist() == [1, 2, 3, 4, 5, 9, 6, 9, 1, 7, 9, 8, 9]
    assert inputs["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 0, 1, 2, 2, 3]
    assert inputs["segments"] == [(4, 2, 2), (2, 1, 2)]
    assert places.tolist() == [2, 3, 4, 2, 3, 6, 8, 9, 8, 9, 11]


@pytest.mark.parametrize(
    ("loss_type", "settings", "expected"),
    [
        ("sigmoid", {}, lambda m, t: -math.log(1 / (1 + math.exp(-0.1 * m)))),
        ("sigmoid", {"label_smoothing": 0.2}, lambda m, t: 0.8 * softplus(-0.1 * m) + 0.2 * softplus(0.1 * m)),
        ("robust", {"label_smoothing": 0.2}, lambda m, t: (0.8 * softplus(-0.1 * m) - 0.2 * softplus(0.1 * m)) / 0.6),
        ("hinge", {}, lambda m, t: max(0.0, 1 - 0.1 * m)),
        ("ipo", {}, lambda m, t: (t - 5) ** 2),
        ("simpo", {"simpo_gamma": 0.3}, lambda m, t: softplus(0.3 - 0.1 * t)),
    ],
)
def test_the_loss_is_the_papers_formula(loss_type, settings, expected, tmp_path):
    args = DPOArguments(output_dir=str(tmp_path), use_cpu=True, loss_type=loss_type, **settings)
    policy, tokens = torch.tensor([[-20.0, -30.0], [-8.0, -6.0]]), torch.tensor([[10, 5], [4, 3]])
    reference = torch.zeros(2, 2) if loss_type == "simpo" else torch.tensor([[-22.0, -28.0], [-8.5, -7.5]])
    found, rewards = preference_losses(policy, reference, tokens, args)
    ratios = policy - reference
    summed, per_token = ratios[:, 0] - ratios[:, 1], (ratios / tokens)[:, 0] - (ratios / tokens)[:, 1]
    wanted = [expected(m, t) for m, t in zip(summed.tolist(), per_token.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)
    assert not rewards.requires_grad and rewards.shape == (2, 2)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize("more", [["--rpo_alpha", "0.3"], LORA], ids=["full", "LoRA"])
def test_the_ways_of_training_are_one(more, tiny_folder, data_file, tmp_path, monkeypatch):
    """Padded; prefixes shared; in accumulation steps; with checkpointing; in two ranks, under ZeRO-2 and ZeRO-3."""
    one, two = ["--per_device_train_batch_size", "8"], ["--per_device_train_batch_size", "4"]
    run = lambda name, *own: flags(tiny_folder, data_file, tmp_path / name, *more, *own)  # noqa: E731
    train_here(monkeypatch, *run("plain", *one, "--fast_path", "false"))
    history = read_history(tmp_path / "plain")
    first = next(entry for entry in history if "eval_loss" in entry)
    assert first["eval_rewards/margins"] == pytest.approx(0, abs=1e-5) and first["eval_rewards/accuracies"] == 0.5
    assert first["eval_preference_loss"] == pytest.approx(math.log(2), abs=1e-6)
    if more is LORA:
        assert losses(tmp_path / "plain")[0] == pytest.approx(math.log(2), abs=1e-6)
    expected = pytest.approx(losses(tmp_path / "plain"), abs=2e-5)
    validation = pytest.approx(losses(tmp_path / "plain", "eval_loss"), abs=2e-5)
    assert losses(tmp_path / "plain")[-1] < losses(tmp_path / "plain")[0]

    train_here(monkeypatch, *run("shared", *one))
    assert losses(tmp_path / "shared") == expected and losses(tmp_path / "shared", "eval_loss") == validation
    train_here(monkeypatch, *run("accumulated", *two, "--gradient_accumulation_steps", "2"))
    assert losses(tmp_path / "accumulated") == expected
    train_here(monkeypatch, *run("checkpointing", *one, "--gradient_checkpointing", "true"))
    assert losses(tmp_path / "checkpointing") == expected
    if more is LORA:
        train_here(monkeypatch, *run("off", *one, "--precompute_ref_log_probs", "false"))
        assert losses(tmp_path / "off") == expected and losses(tmp_path / "off", "eval_loss") == validation
    for config in ("", "ds_zero2_no_offload.json", "ds_zero3_no_offload.json"):
        name = f"two{config}"
        printed = run_train(*run(name, *two, *(["--deepspeed", config] if config else [])), processes=2)
        assert losses(tmp_path / name) == expected and losses(tmp_path / name, "eval_loss") == validation, name
        assert "padded batches:" not in printed and "logits of whole batches" not in printed


def test_an_adapter_goes_on_from_itself_as_the_reference(tiny_folder, data_file, tmp_path, monkeypatch):
    """The reference is base and SFT adapter, never the bare base (LlamaFactory#8974, trl#1311)."""
    sft, dpo = tmp_path / "sft", tmp_path / "dpo"
    train_here(monkeypatch, *flags(tiny_folder, data_file, sft, *LORA, "--loss_type", "sft"))
    assert losses(sft)[-1] < losses(sft)[0]
    train_here(monkeypatch, *flags(str(sft), data_file, dpo, *LORA))
    first = next(entry for entry in read_history(dpo) if "eval_loss" in entry)
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-5) and losses(dpo)[0] == pytest.approx(math.log(2))
    assert losses(dpo)[-1] < math.log(2)


def test_a_resumed_run_ends_like_one_that_was_never_stopped(tiny_folder, data_file, tmp_path):
    more = [
        "--per_device_train_batch_size",
        "4",
        "--save_strategy",
        "steps",
        "--save_steps",
        "3",
        "--max_length",
        "256",
    ]
    more += ["--save_total_limit", "9"]
    run_train(*flags(tiny_folder, data_file, tmp_path / "whole", *more))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for path in ("model.safetensors", "train_results.json", "checkpoint-9", "checkpoint-10", "trainer_state.json"):
        path = tmp_path / "again" / path
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    run_train(*flags(tiny_folder, data_file, tmp_path / "again", *more))
    for key in ("loss", "eval_loss", "rewards/margins", "eval_rewards/chosen"):
        assert losses(tmp_path / "again", key) == losses(tmp_path / "whole", key), key
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "again")]
    assert weights[0] == weights[1]


def test_references_are_kept_by_the_pair_and_the_model(tiny_folder, tokenizer, tmp_path):
    rows = make_pairs(10)
    first, _ = load_encoded(write_rows(tmp_path / "a.jsonl", rows), tokenizer, (512, 512))
    second, _ = load_encoded(write_rows(tmp_path / "b.jsonl", rows[::-1]), tokenizer, (512, 512))
    assert first["pair"] == second["pair"][::-1]
    kept = ReferenceLogProbabilities(tmp_path / "reference.npz")
    values = torch.randn(10, 2).numpy()
    kept.add(first.with_format("numpy")["pair"][:], values)
    kept.save()
    again = ReferenceLogProbabilities(tmp_path / "reference.npz")
    assert (again.find(second.with_format("numpy")["pair"][:]) == values[::-1]).all()
    with pytest.raises(KeyError):
        again.find(torch.tensor([5]).numpy())


@pytest.mark.parametrize(
    ("tuning", "sharded"),
    [([], ["--deepspeed", "ds_zero3_no_offload.json"]), ([*LORA, "--precompute_ref_log_probs", "false"], [])],
)
def test_a_rank_may_have_no_pair_in_the_last_step(tuning, sharded, tiny_folder, tmp_path, monkeypatch):
    data_file = write_rows(tmp_path / "pairs.jsonl", make_pairs(9))
    one, two = (["--validation_split", "0", *tuning, "--per_device_train_batch_size", size] for size in ("8", "4"))
    run_train(*flags(tiny_folder, data_file, tmp_path / "two", *two, *sharded), processes=2)
    train_here(monkeypatch, *flags(tiny_folder, data_file, tmp_path / "one", *one))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)


def test_no_prompt_is_on_both_sides(data_file, tiny_folder, tmp_path, monkeypatch):
    rows = make_pairs(12)
    doubled = rows + [row | {"rejected": row["rejected"] + "冬"} for row in rows]
    path = write_rows(tmp_path / "doubled.jsonl", doubled)
    printed = run_train(*flags(tiny_folder, path, tmp_path / "out", "--validation_split", "0.25", "--max_steps", "1"))
    assert "18 to train on, 6 to validate on" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--loss_type", "dpo"], "--loss_type dpo: known are sigmoid, ipo"),
        (["--loss_type", "ipo", "--label_smoothing", "0.1"], "has no effect with --loss_type ipo"),
        (["--label_smoothing", "0.5"], "from 0 to below 0.5"),
        (["--beta", "0"], "must be above 0"),
        (["--simpo_gamma", "1"], "has no effect with --loss_type sigmoid"),
        (["--precompute_ref_log_probs", "false"], "only a new adapter"),
        (["--use_lora", "true", "--lora_dropout", "0.1"], "policy and reference would differ"),
        (["--packing", "true"], "share a row"),
    ],
)
def test_what_a_user_gets_wrong(more, message, tiny_folder, data_file, tmp_path, monkeypatch):
    with pytest.raises(UserError) as error:
        train_here(monkeypatch, *flags(tiny_folder, data_file, tmp_path, *more))
    assert message in str(error.value)


def test_a_bad_row_is_named_by_file_and_line(tiny_folder, tmp_path, monkeypatch):
    rows = [*make_pairs(3), {"prompt": "问", "chosen": "同", "rejected": "同"}]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(UserError, match="pairs.jsonl:4: "):
        train_here(monkeypatch, *flags(tiny_folder, path, tmp_path / "out"))


def test_the_report_has_each_file_before_and_after(tiny_folder, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    for seed, name in enumerate(("polite", "right")):
        write_rows(folder / f"{name}.jsonl", make_pairs(10, seed))
    train_here(monkeypatch, *flags(tiny_folder, str(folder), tmp_path / "out", "--validation_split", "0.3"))
    results = json.loads((tmp_path / "out" / "train_results.json").read_text())
    for name in ("rewards/accuracies", "polite/rewards/accuracies", "right/logps/chosen"):
        assert name in results["before"] and name in results["after"]
    assert (tmp_path / "out" / "rewards.png").stat().st_size > 1000
