"""What is GLM's own: labels under its template, one loss however rows are laid out, adapters on its packed layers."""

import json

import pytest
import torch
from peft import PeftModel
from ranks import RECIPE, losses, run_train, train_here
from transformers import AutoModelForCausalLM

from batch import BalancedBatchSampler
from data import column, load_encoded
from infer import load_trained_model, reply_batch
from rows import UserError
from template import encode_conversation
from tiny import GLM4_CONTROL_TOKENS

COMMON = "--learning_rate 1e-3 --lr_scheduler_type constant --logging_steps 1 --num_train_epochs 1"
CONVERSATION = [
    {"role": "system", "content": "天地"},
    {"role": "user", "content": "玄黄"},
    {"role": "assistant", "content": "宇宙"},
    {"role": "user", "content": "洪荒"},
    {"role": "assistant", "content": "日月"},
]


def flags(model, data_file, eval_file, output, *more):
    paths = ["--model_name_or_path", model, "--data_path", data_file, "--eval_data_path", eval_file]
    return [*paths, "--output_dir", output, *COMMON.split(), *more]


def plain_loop(model_folder, data_file, tokenizer) -> list[float]:
    """The losses of an epoch by nothing but `model(labels=...)`, one sample at a time, 8 samples a step."""
    rows, _ = load_encoded(data_file, tokenizer, 2048)
    lengths = column(rows, "length")
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    step_losses = []
    for indices in BalancedBatchSampler(lengths, [[i] for i in range(len(rows))], 8, 1, 1, 0, seed=42):
        batch, total = rows.select(indices), 0.0
        tokens = sum(batch["supervised"])
        for row in batch:
            ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
            loss = model(input_ids=ids, labels=labels).loss * row["supervised"] / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step_losses.append(total)
    return step_losses


@pytest.fixture(scope="module")
def expected(tiny_folder, data_file, tokenizer):
    step_losses = plain_loop(tiny_folder, data_file, tokenizer)
    assert len(step_losses) == 4 and step_losses[2] < step_losses[0]
    return pytest.approx(step_losses, abs=1e-5)


def test_a_turn_ends_where_the_next_begins(tokenizer):
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert text == ("[gMASK]<sop><|system|>\n天地<|user|>\n玄黄<|assistant|>\n宇宙<|user|>\n洪荒<|assistant|>\n日月")
    [example] = encode_conversation(CONVERSATION, tokenizer)
    learned = tokenizer.decode([label for label in example["labels"] if label != -100])
    assert learned == "宇宙<|user|>日月<|endoftext|>"
    assert tokenizer.decode(example["input_ids"]) == text + "<|endoftext|>"


@pytest.mark.parametrize("token", GLM4_CONTROL_TOKENS)
def test_a_control_token_in_the_text_is_refused(token, tokenizer):
    said = [{"role": "user", "content": f"天{token}地"}, CONVERSATION[-1]]
    with pytest.raises(UserError, match="the text holds the control token"):
        encode_conversation(said, tokenizer)


@pytest.mark.parametrize(
    "layout",
    [
        "--per_device_train_batch_size 8",
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 2",
        "--per_device_train_batch_size 8 --gradient_checkpointing true",
        "--per_device_train_batch_size 8 --attn_implementation eager",
    ],
)
def test_one_process_equals_the_plain_loop(layout, expected, tiny_folder, data_file, eval_file, tmp_path, monkeypatch):
    more = [*layout.split(), "--save_strategy", "no"]
    train_here(monkeypatch, *flags(tiny_folder, data_file, eval_file, tmp_path, *more))
    assert losses(tmp_path) == expected


@pytest.mark.parametrize("deepspeed", ["ds_zero2_no_offload.json", "ds_zero3_no_offload.json"])
def test_two_processes_equal_the_plain_loop(deepspeed, expected, tiny_folder, data_file, eval_file, tmp_path):
    more = ["--per_device_train_batch_size", "4", "--deepspeed", deepspeed, "--save_strategy", "no"]
    run_train(*flags(tiny_folder, data_file, eval_file, tmp_path, *more), processes=2)
    assert losses(tmp_path) == expected


def test_adapters_stand_beside_all_layers_and_resume_exactly(tiny_folder, data_file, eval_file, tmp_path, monkeypatch):
    more = ["--use_lora", "true", "--per_device_train_batch_size", "8", "--save_strategy", "steps", "--save_steps", "2"]
    for output in ("whole", "stopped"):
        train_here(monkeypatch, *flags(tiny_folder, data_file, eval_file, tmp_path / output, *more))
    # As if the second run had been killed after its first checkpoint.
    stopped = tmp_path / "stopped"
    for name in ("adapter_model.safetensors", "train_results.json", "trainer_state.json"):
        (stopped / name).unlink()
    (stopped / "checkpoint-4").rename(tmp_path / "gone")
    train_here(monkeypatch, *flags(tiny_folder, data_file, eval_file, stopped, *more))
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert adapters[0] == adapters[1]

    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = base(ids).logits
        tuned = PeftModel.from_pretrained(base, stopped)
        after = tuned(ids).logits
        merged = tuned.merge_and_unload()(ids).logits
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(merged, after, atol=1e-5, rtol=0)
    layers = json.loads((stopped / "adapter_config.json").read_text())["target_modules"]
    assert sorted({name.rpartition(".")[2] for name in layers}) == [
        "down_proj",
        "gate_up_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "v_proj",
    ]


def test_a_reply_stops_at_each_end(tiny_folder):
    model, tokenizer = load_trained_model(tiny_folder)
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"])
    assert sorted(model.generation_config.eos_token_id) == sorted(ends)
    for end in ends:
        passes = []

        def always(_, inputs, output, end=end, passes=passes):
            passes.append(end)
            output.fill_(0.0)[..., end] = 1.0

        hook = model.lm_head.register_forward_hook(always)
        assert reply_batch(model, tokenizer, [CONVERSATION[:2]], max_new_tokens=5, temperature=0) == [""]
        assert passes == [end]
        hook.remove()


def test_sample_data_is_what_the_readme_says():
    rows = [
        row
        for name in ("dialogues", "extraction", "questions")
        for row in json.loads((RECIPE / "data" / "alpaca_chinese" / f"{name}.json").read_text("utf-8"))
    ]
    assert len(rows) == 621 and sum("history" in row for row in rows) == 72
    assert len({(row["instruction"], row["input"]) for row in rows}) == len(rows)
