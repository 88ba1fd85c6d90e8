"""The loss is one and the same, however the rows are laid out and whoever computes them."""

import pytest
import torch
import torch.nn.functional as F
from ranks import losses, run_train, train_here
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
)

import fast_path
from batch import BalancedBatchSampler, collate, pack_best_fit
from data import column, load_encoded
from model import PLAIN_TEMPLATE
from rows import UserError

COMMON = "--learning_rate 1e-3 --lr_scheduler_type constant --logging_steps 1 --save_strategy no --num_train_epochs 1"


def flags(model, data_file, eval_file, output, *more):
    paths = ["--model_name_or_path", model, "--data_path", data_file, "--eval_data_path", eval_file]
    return [*paths, "--output_dir", output, *COMMON.split(), *more]


def plain_loop(model_folder, data_file, tokenizer, packing=None, rows_per_step=8) -> list[float]:
    """The losses of an epoch by nothing but `model(labels=...)` on padded batches of the same samples."""
    rows, _ = load_encoded(data_file, tokenizer, 2048)
    lengths = column(rows, "length")
    packs = pack_best_fit(lengths, packing) if packing else [[i] for i in range(len(rows))]
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    step_losses = []
    for indices in BalancedBatchSampler(lengths, packs, rows_per_step, 1, 1, 0, seed=42):
        longest = max(lengths[indices])
        batch = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in rows.select(indices):
            padding = longest - row["length"]
            batch["input_ids"].append(row["input_ids"] + [0] * padding)
            batch["attention_mask"].append([1] * row["length"] + [0] * padding)
            batch["labels"].append(row["labels"] + [-100] * padding)
        loss = model(**{name: torch.tensor(value) for name, value in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step_losses.append(loss.item())
    return step_losses


@pytest.fixture(scope="module")
def expected(tiny_folder, data_file, tokenizer):
    step_losses = plain_loop(tiny_folder, data_file, tokenizer)
    assert len(step_losses) == 4 and step_losses[2] < step_losses[0]
    return pytest.approx(step_losses, abs=1e-5)


@pytest.fixture(scope="module")
def expected_validation(tiny_folder, data_file, eval_file, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        output = tmp_path_factory.mktemp("one")
        layout = ["--per_device_train_batch_size", "8"]
        train_here(monkeypatch, *flags(tiny_folder, data_file, eval_file, output, *layout))
    return pytest.approx(losses(output, "eval_loss"), abs=1e-5)


@pytest.mark.parametrize(
    "layout",
    [
        "--per_device_train_batch_size 8",
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 2",
        "--per_device_train_batch_size 8 --gradient_checkpointing true",
        "--per_device_train_batch_size 8 --attn_implementation sdpa",
        "--per_device_train_batch_size 8 --fast_path false",
        "--per_device_train_batch_size 8 --dataloader_num_workers 2",
    ],
)
def test_one_process_equals_the_plain_loop(layout, expected, tiny_folder, data_file, eval_file, tmp_path, monkeypatch):
    train_here(monkeypatch, *flags(tiny_folder, data_file, eval_file, tmp_path, *layout.split()))
    assert losses(tmp_path) == expected


@pytest.mark.parametrize("deepspeed", ["", "ds_zero2_no_offload.json", "ds_zero3_no_offload.json"])
def test_two_processes_equal_the_plain_loop(
    deepspeed, expected, expected_validation, tiny_folder, data_file, eval_file, tmp_path
):
    more = ["--per_device_train_batch_size", "4", *(["--deepspeed", deepspeed] if deepspeed else [])]
    run_train(*flags(tiny_folder, data_file, eval_file, tmp_path, *more), processes=2)
    assert losses(tmp_path) == expected
    assert losses(tmp_path, "eval_loss") == expected_validation


def test_packed_rows_fill_up_and_hold_every_sample_once(tokenizer, data_file):
    lengths = column(load_encoded(data_file, tokenizer, 2048)[0], "length")
    rows = pack_best_fit(lengths, 512)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert max(sum(lengths[row]) for row in rows) <= 512
    assert len(rows) == -(-sum(lengths) // 512)


def test_packing_equals_the_plain_loop(tiny_folder, data_file, eval_file, tokenizer, tmp_path, monkeypatch):
    layout = ["--packing", "true", "--model_max_length", "512", "--per_device_train_batch_size", "2"]
    train_here(monkeypatch, *flags(tiny_folder, data_file, eval_file, tmp_path, *layout))
    packed = plain_loop(tiny_folder, data_file, tokenizer, packing=512, rows_per_step=2)
    assert losses(tmp_path) == pytest.approx(packed, abs=1e-5)


def test_ranks_of_a_step_get_nearly_equal_token_counts():
    lengths = torch.randint(50, 550, (640,), generator=torch.Generator().manual_seed(0)).numpy()
    ranks = [list(BalancedBatchSampler(lengths, [[i] for i in range(640)], 8, 1, 4, r, seed=0)) for r in range(4)]
    for step in zip(*ranks, strict=True):
        tokens = [sum(lengths[i] for i in batch) for batch in step]
        assert max(tokens) < 1.05 * min(tokens)
        assert len({len(batch) for batch in step}) == 1
    assert sorted(i for rank in ranks for batch in rank for i in batch) == list(range(640))
    step_tokens = [sum(lengths[i] for batch in step for i in batch) for step in zip(*ranks, strict=True)]
    assert max(step_tokens) < 1.05 * min(step_tokens)
    one_rank = BalancedBatchSampler(lengths, [[i] for i in range(640)], 32, 1, 1, 0, seed=0)
    assert [sorted(step) for step in one_rank] == [
        sorted(i for batch in step for i in batch) for step in zip(*ranks, strict=True)
    ]


@pytest.fixture(params=["bloom", "cohere"])
def unusual_folder(request, tiny_folder, tokenizer, tmp_path):
    """Bloom has attention code of its own; Cohere scales the logits after its head."""
    small = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    small |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    if request.param == "bloom":
        model = BloomForCausalLM(BloomConfig(n_layer=2, n_head=4, **small))
    else:
        model = CohereForCausalLM(CohereConfig(intermediate_size=128, num_key_value_heads=2, logit_scale=0.25, **small))
    model.save_pretrained(tmp_path / request.param)
    tokenizer.save_pretrained(tmp_path / request.param)
    return str(tmp_path / request.param)


def small_lfm2(tokenizer):
    """Every other layer is a short convolution, which runs on over the border of two samples."""
    small = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    kinds = ["conv", "full_attention"]
    torch.manual_seed(0)
    return Lfm2ForCausalLM(Lfm2Config(num_attention_heads=4, num_key_value_heads=2, layer_types=kinds, **small))


@pytest.mark.parametrize("known", [True, False])
def test_layers_that_leak_between_samples_are_padded(
    known, tokenizer, data_file, eval_file, tmp_path, monkeypatch, capsys
):
    if not known:  # by its effect alone, as in a model whose configuration does not tell
        monkeypatch.setattr(fast_path, "layers_attend_only", lambda config: True)
    folder = str(tmp_path / "lfm2")
    small_lfm2(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    layout = ["--per_device_train_batch_size", "8"]
    train_here(monkeypatch, *flags(folder, data_file, eval_file, tmp_path / "out", *layout))
    assert "note        padded batches: " in capsys.readouterr().out
    assert losses(tmp_path / "out") == pytest.approx(plain_loop(folder, data_file, tokenizer), abs=1e-5)
    with pytest.raises(UserError, match="--packing true: this model's examples can't be kept apart in a bin"):
        train_here(monkeypatch, *flags(folder, data_file, eval_file, tmp_path / "packed", *layout, "--packing", "true"))


def test_attention_within_a_sequence_and_its_window():
    torch.manual_seed(0)
    lengths, window = [5, 9], 4
    query, key, value = torch.randn(1, 4, 14, 8), torch.randn(1, 2, 14, 8), torch.randn(1, 2, 14, 8)
    place = torch.arange(14)
    sequence = torch.tensor([0] * 5 + [1] * 9)
    distance = place[:, None] - place[None]
    allowed = (sequence[:, None] == sequence[None]) & (distance >= 0) & (distance < window)
    expected = F.scaled_dot_product_attention(query, key, value, allowed, enable_gqa=True).transpose(1, 2)
    found, _ = fast_path.packed_sdpa(None, query, key, value, None, sequence_lengths=lengths, sliding_window=window)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("window", [None, 4])
def test_the_varlen_kernel_is_asked_for_the_same_attention(window, monkeypatch):
    """On a GPU one kernel takes all sequences; here a stand-in with its signature computes what it is asked for."""

    def stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert window_size[1] == 0 and enable_gqa and max_q == max_k == 9
        place = torch.arange(len(query))
        sequence = torch.bucketize(place, cu_seq_q, right=True)
        behind = place[:, None] - place[None]
        allowed = (sequence[:, None] == sequence[None]) & (behind >= 0)
        allowed &= (behind <= window_size[0]) | (window_size[0] == -1)
        heads = [states.transpose(0, 1)[None] for states in (query, key, value)]
        return F.scaled_dot_product_attention(*heads, allowed, scale=scale, enable_gqa=True)[0].transpose(0, 1)

    torch.manual_seed(0)
    states = torch.randn(1, 4, 14, 8), torch.randn(1, 2, 14, 8), torch.randn(1, 2, 14, 8)
    batch = {"sequence_lengths": [5, 9], "cu_seq_lens_q": torch.tensor([0, 5, 14], dtype=torch.int32)}
    batch |= {"max_length_q": 9, "sliding_window": window, "scaling": 0.3}
    expected, _ = fast_path.packed_sdpa(None, *states, None, **batch)
    assert not fast_path.varlen_takes(states[0], states[2], dropout=0.0), "there is no GPU here"
    monkeypatch.setattr(fast_path, "varlen_takes", lambda *_: True)
    monkeypatch.setattr(fast_path, "varlen_attn", stand_in)
    found, _ = fast_path.packed_sdpa(None, *states, None, **batch)
    torch.testing.assert_close(found, expected)


def test_unusual_models_fall_back_say_so_and_have_the_same_loss(
    unusual_folder, tokenizer, data_file, eval_file, tmp_path, monkeypatch, capsys
):
    layout = ["--per_device_train_batch_size", "8"]
    train_here(monkeypatch, *flags(unusual_folder, data_file, eval_file, tmp_path, *layout))
    assert losses(tmp_path) == pytest.approx(plain_loop(unusual_folder, data_file, tokenizer), abs=1e-5)
    screen = capsys.readouterr().out
    assert ("padded batches: " in screen) == unusual_folder.endswith("bloom")
    assert ("logits of whole batches: " in screen) == unusual_folder.endswith("cohere")


def test_a_batch_without_samples_supervises_nothing():
    batch = collate([])
    assert batch["input_ids"].shape == (1, 2) and (batch["labels"] == -100).all()


def test_supervised_head_equals_cross_entropy():
    torch.manual_seed(0)
    hidden, weight = torch.randn(700, 16, requires_grad=True), torch.randn(9000, 16, requires_grad=True)
    targets = torch.randint(0, 9000, (700,))
    F.cross_entropy(hidden @ weight.T, targets, reduction="sum").div(7).backward()
    wanted = [hidden.grad.clone(), weight.grad.clone()]
    hidden.grad = weight.grad = None
    fast_path.ChunkedCrossEntropy.apply(hidden, weight, targets, True).div(7).backward()
    torch.testing.assert_close([hidden.grad, weight.grad], wanted, rtol=1e-4, atol=1e-5)


def test_plain_template_learns_to_stop(tokenizer):
    from template import encode_conversation

    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "天地玄黄"}]
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = PLAIN_TEMPLATE
    [example] = encode_conversation(turns, tokenizer)
    supervised = [label for label in example["labels"] if label != -100]
    assert tokenizer.decode(supervised) == f" 天地玄黄{tokenizer.eos_token}"
