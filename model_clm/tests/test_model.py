"""A model from scratch of each class and size, its bigram start, and what a checkpoint must be."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import train_here
from transformers import AutoModelForCausalLM

import bigram
from bigram import DISCOUNT, count_bigrams, draw_contexts, enter_at_zero, mix_bigrams, start_as_bigram_model
from conftest import STEPS, TINY, TRAIN, VALIDATION, build_tokenizer, prepare_texts
from prepare import prepare, read_flags
from rows import UserError
from tiny import CONFIGS, build_config

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def model_args(name: str, **changed) -> SimpleNamespace:
    sizes = SIZES | {"num_key_value_heads": None, "tie_word_embeddings": False} | changed
    return SimpleNamespace(config_name=name, **sizes)


def build(name: str, tokenizer, **changed):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(build_config(model_args(name, **changed), tokenizer, 24))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_class_has_the_sizes_that_were_asked_for(name, tokenizer):
    model = build(name, tokenizer)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert table.shape == head.shape == (len(tokenizer), 32) and table is not head
    assert model.config.num_hidden_layers == 2 and model.config.eos_token_id == tokenizer.eos_token_id
    mlps = {weight.shape for key, weight in model.named_parameters() if "mlp" in key and weight.ndim == 2}
    inner = 128 if name == "bloom" else 48
    assert {size for shape in mlps for size in shape} <= {32, inner, 2 * inner}
    assert build(name, tokenizer, tie_word_embeddings=True).get_output_embeddings().weight.shape == table.shape
    # The EOS is learned like any other token: it is no padding, whose gradient a table drops.
    ids = torch.tensor([[tokenizer.eos_token_id, 5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert table.grad[tokenizer.eos_token_id].norm() > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bigram_start_predicts_by_the_last_token_alone(name, prepared, tokenizer, monkeypatch):
    monkeypatch.setattr(bigram, "FIT_STEPS", 100)
    model = build(name, tokenizer)
    start_as_bigram_model(model, f"{prepared}/train", {"news": 0.7, "idioms": 0.3}, seed=0)
    model.eval()
    ids = torch.randint(3, len(tokenizer), (2, 20), generator=torch.Generator().manual_seed(0))
    ids[1, 10:] = ids[0, 10:]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        torch.testing.assert_close(logits[0, 10:], logits[1, 10:], rtol=0, atol=0)  # whatever stood before
        blocks = enter_at_zero(model)
        own = list(blocks)
        del blocks[:]
        torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=0, atol=0)  # the zero-layer model's
        blocks.extend(own)
        every = torch.arange(len(tokenizer))[:, None]
        found = model(input_ids=every).logits[:, 0].log_softmax(1)
    mixed = mix_bigrams(f"{prepared}/train", {"news": 0.7, "idioms": 0.3}, len(tokenizer))
    table = sum(weight * source.smoothed(np.arange(len(tokenizer))) for weight, source in mixed)
    seen = table.sum(1) > 0
    wanted = torch.from_numpy(table[seen] / table[seen].sum(1, keepdims=True)).double()
    weights = torch.from_numpy(table[seen].sum(1) / table.sum())
    cross_entropy, entropy = (
        (weights * -(wanted * values).sum(1)).sum() for values in (found[seen].double(), wanted.clamp_min(1e-30).log())
    )
    assert cross_entropy - entropy < 0.15  # nats a token, where an even guess is two nats above
    # ... and the blocks have something to learn from.
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    outputs = [p for key, p in model.named_parameters() if any(part in key for part in bigram.ENTER_AT_ZERO[name])]
    assert len(outputs) >= 4 and all(p.grad.norm() > 0 for p in outputs if p.ndim == 2)


def test_a_start_is_the_same_for_a_seed(prepared, tokenizer, monkeypatch):
    monkeypatch.setattr(bigram, "FIT_STEPS", 10)
    weights = []
    for seed in (0, 0, 1):
        model = build("qwen3", tokenizer, hidden_size=48)  # wider than the vocabulary is large
        start_as_bigram_model(model, f"{prepared}/train", None, seed)
        weights.append(model.lm_head.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_bigrams_are_counted_and_smoothed(prepared, tokenizer, monkeypatch):
    size = len(tokenizer)
    found = count_bigrams(f"{prepared}/train", "news", size)
    stream = [2, *(i for text in TRAIN["news"] for i in [*tokenizer(text)["input_ids"], 2])]
    counts = np.zeros((size, size))
    for first, second in zip(stream, stream[1:], strict=False):
        counts[first, second] += 1
    continuation = (counts > 0).sum(0) + 0.02
    share = DISCOUNT * (counts > 0).sum(1, keepdims=True) * continuation / continuation.sum()
    expected = np.maximum(counts - DISCOUNT, 0) + share
    np.testing.assert_allclose(found.smoothed(np.arange(size)), expected, rtol=1e-5)
    np.testing.assert_allclose(found.smoothed(np.array([7, 3])), expected[[7, 3]], rtol=1e-5)
    part = count_bigrams(f"{prepared}/train", "news", size, most=500)
    assert part.counts.sum() == 499
    totals = np.array([0, 1, 2, 1])
    tokens, times = next(draw_contexts(totals, 0))
    assert tokens.tolist() == [1, 2, 3] and np.abs(times - bigram.CONTEXTS_PER_STEP / 4 * totals[1:]).max() <= 1


def train(monkeypatch, output, data, *flags):
    train_here(monkeypatch, "--data_path", data, "--output_dir", output, "--max_steps", "1", *flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--bigram_start true --tie_word_embeddings true", "--bigram_start true: one matrix for table and head"),
        ("--config_name gpt5", "known are qwen3, llama, qwen2, gpt2, bloom, glm, nanochat"),
        ("--hidden_size 30", "--hidden_size 30: must be a multiple of 2 x --num_attention_heads 6"),
        ("--config_name bloom --intermediate_size 64", "--intermediate_size has no effect with --config_name bloom"),
        ("--config_name gpt2 --num_key_value_heads 2", "--num_key_value_heads has no effect with --config_name gpt2"),
        ("--model_name_or_path my_model --hidden_size 64", "--hidden_size has no effect with --model_name_or_path"),
        ("--model_name_or_path ./my_model", r"\./my_model: no model could be read there"),
        ("--mixture news=0.5,books=0.5", "--mixture names books; the prepared sources are news, idioms"),
        ("--mixture news", "write it as in news=0.8,idioms=0.2"),
        ("--eval_stride 1024", "--eval_stride 1024: from 1 to --model_max_length - 1"),
        ("--use_streaming true", "--use_streaming: is now left out: training always reads what prepare.py has written"),
        ("--data_num_limit 60", "--data_num_limit: is now prepare.py's --data_num_limit"),
        ("--block_size 512", "--block_size: is now --model_max_length"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags, message, prepared, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=message):
        train(monkeypatch, tmp_path, prepared, *flags.split())


def test_a_raw_folder_is_refused_with_the_command_that_prepares_it(tmp_path, monkeypatch):
    (tmp_path / "my_texts").mkdir()
    (tmp_path / "my_texts" / "a.txt").write_text("天地玄黄", encoding="utf-8")
    with pytest.raises(UserError, match=r"is no prepared folder(.|\n)*python prepare.py .*my_texts my_prepared"):
        train(monkeypatch, tmp_path / "out", tmp_path / "my_texts")


def test_a_checkpoint_goes_on_with_its_own_tokenizer_only(scratch_folder, prepared, tmp_path, monkeypatch):
    layout = [*STEPS.split(), "--model_max_length", "24", "--samples", "0", "--eval_on_start", "false"]
    other = tmp_path / "my_other_model"
    shutil.copytree(scratch_folder, other)
    build_tokenizer(other, "天地人")
    with pytest.raises(
        UserError, match=r"was encoded with another tokenizer than that of .*--tokenizer .*my_other_model"
    ):
        train(monkeypatch, tmp_path / "out", prepared, "--model_name_or_path", other, *layout)
    small = tmp_path / "my_small_model"
    shutil.copytree(scratch_folder, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 20}))
    with pytest.raises(UserError, match=r"the tokenizer has 35 ids, the model's embedding 20 rows"):
        train(monkeypatch, tmp_path / "out", prepared, "--model_name_or_path", small, *layout)
    with pytest.raises(UserError, match="my_lost_model: no model could be read there"):
        train(monkeypatch, tmp_path / "out", prepared, "--model_name_or_path", tmp_path / "my_lost_model", *layout)
    train(monkeypatch, tmp_path / "out", prepared, "--model_name_or_path", scratch_folder, *layout)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_data_that_changed_is_refused(tmp_path, monkeypatch):
    folder = prepare_texts(tmp_path / "my_prepared", TRAIN, VALIDATION)
    flags = [*TINY.split(), *STEPS.split(), "--bigram_start", "false", "--samples", "0", "--eval_on_start", "false"]
    train(monkeypatch, tmp_path / "first", folder, *flags)
    shard = tmp_path / "my_prepared" / "train" / "news-00000.bin"
    raw = bytearray(shard.read_bytes())
    raw[10] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(UserError, match=r"news-00000\.bin: changed since it was prepared"):
        train(monkeypatch, tmp_path / "second", folder, *flags)
    build_tokenizer(tmp_path / "my_prepared" / "tokenizer", "天地人")
    with pytest.raises(UserError, match=r"tokenizer\.json: is not what the shards were encoded with"):
        train(monkeypatch, tmp_path / "third", folder, *flags)


def test_the_bits_of_a_text_s_characters_are_the_model_s(scratch_folder):
    from infer import character_bits, continue_batch, load_trained_model, stream_continuation, token_bits

    model, tokenizer = load_trained_model(scratch_folder, device_map="cpu")
    text = "天地玄黄宇宙洪荒" * 3
    costs = character_bits(model, tokenizer, text)
    assert "".join(character for character, _ in costs) == text
    ids = torch.tensor([[2, *tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert sum(bits for _, bits in costs) == pytest.approx(loss / math.log(2) * len(text), rel=1e-5)
    long = (ids[0].tolist() * 5)[:120]  # beyond its 64 positions: half of them are carried over
    assert token_bits(model, long)[:63].tolist() == pytest.approx(token_bits(model, long[:64]).tolist(), abs=1e-4)
    assert len(token_bits(model, long)) == 119
    streamed = "".join(stream_continuation(model, tokenizer, "天地", max_new_tokens=8, temperature=0))
    batch = continue_batch(model, tokenizer, ["天地", "日月盈昃辰"], max_new_tokens=8, temperature=0)
    assert batch[0] == streamed and len(batch) == 2
    with pytest.raises(UserError, match="more than the model's context of 64"):
        next(stream_continuation(model, tokenizer, "天地", max_new_tokens=80))


def test_table_and_head_have_rates_of_their_own(scratch_folder, prepared, tmp_path, monkeypatch):
    """Rate 0 for both leaves them as they are, and nothing else."""
    from safetensors.torch import load_file

    rates = ["--embedding_learning_rate", "0", "--head_learning_rate", "0"]
    layout = [*STEPS.split(), "--model_max_length", "24", "--samples", "0", "--eval_on_start", "false", *rates]
    train(monkeypatch, tmp_path, prepared, "--model_name_or_path", scratch_folder, *layout)
    before, after = load_file(f"{scratch_folder}/model.safetensors"), load_file(tmp_path / "model.safetensors")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"model.embed_tokens.weight", "lm_head.weight"}


def test_nothing_held_out_is_nothing_to_measure(tmp_path, monkeypatch):
    folder, corpus, tokenizer = (str(tmp_path / name) for name in ("my_prepared", "my_corpus.txt", "my_tokenizer"))
    build_tokenizer(tokenizer)
    (tmp_path / "my_corpus.txt").write_text("\n\n".join(TRAIN["news"]), encoding="utf-8")
    prepare(read_flags([corpus, folder, "--tokenizer", tokenizer, "--validation_split", "0", "--data_proc_num", "1"]))
    flags = [*TINY.split(), *STEPS.split(), "--bigram_start", "false", "--eval_strategy", "epoch"]
    train(monkeypatch, tmp_path / "out", folder, *flags)
    results = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert results["steps"] == 1 and not any(name.startswith("eval") for name in results)
    with pytest.raises(UserError, match="early stopping and the best model need held-out texts"):
        train(monkeypatch, tmp_path / "patience", folder, *flags, "--early_stopping_patience", "2")


def test_an_eos_that_pads_as_well_is_learned(scratch_folder, prepared, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    model = tmp_path / "my_model"
    shutil.copytree(scratch_folder, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"pad_token_id": 2}))
    layout = [*STEPS.split(), "--model_max_length", "24", "--samples", "0", "--eval_on_start", "false"]
    train(monkeypatch, tmp_path / "out", prepared, "--model_name_or_path", model, *layout, "--weight_decay", "0")
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert not torch.equal(before["model.embed_tokens.weight"][2], after["model.embed_tokens.weight"][2])
