"""Labels are the assistant's words and nothing else; every format and encoding is read; every bad row is named."""

import json

import numpy as np
import pytest

from conftest import make_conversations, settings, write_rows
from data import column, encode_newest, encode_row, load_encoded, load_splits
from rows import UserError, to_messages
from template import IGNORE_INDEX, encode_conversation

TURNS = [
    {"role": "system", "content": "你是老师。"},
    {"role": "user", "content": "一加一等于几？"},
    {"role": "assistant", "content": "等于二。"},
    {"role": "user", "content": "二加二呢？"},
    {"role": "assistant", "content": "等于四。"},
]


def supervised_text(tokenizer, labels: list[int]) -> str:
    return tokenizer.decode([label for label in labels if label != IGNORE_INDEX])


def turns(*roles_and_texts):
    return [{"role": role, "content": text} for role, text in roles_and_texts]


def test_labels_decode_to_every_answer_with_its_end_of_turn(tiny_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder, pad_token="<|im_end|>")  # learned though it pads, too
    [example] = encode_conversation(TURNS, tokenizer)
    assert supervised_text(tokenizer, example["labels"]) == "等于二。<|im_end|>等于四。<|im_end|>"
    assert tokenizer.decode(example["input_ids"]) + "\n" == tokenizer.apply_chat_template(TURNS, tokenize=False)


def test_too_long_a_conversation_loses_its_oldest_exchange_and_keeps_the_system_message(tokenizer):
    [whole] = encode_newest(TURNS, tokenizer, 2048)
    assert whole["exchanges_dropped"] == 0
    assert encode_newest(TURNS, tokenizer, len(whole["input_ids"])) == [whole]
    [shorter] = encode_newest(TURNS, tokenizer, len(whole["input_ids"]) - 1)
    assert shorter["exchanges_dropped"] == 1
    assert tokenizer.decode(shorter["input_ids"]).startswith("<|im_start|>system\n你是老师。")
    assert supervised_text(tokenizer, shorter["labels"]) == "等于四。<|im_end|>"


def test_a_conversation_of_hundreds_of_exchanges_keeps_as_many_of_the_newest_as_fit(tokenizer):
    exchanges = [turns(("user", f"第{number}问？"), ("assistant", f"第{number}答。")) for number in range(300)]
    [encoded] = encode_newest([TURNS[0], *sum(exchanges, [])], tokenizer, 400)
    dropped = encoded["exchanges_dropped"]
    assert supervised_text(tokenizer, encoded["labels"]).startswith(f"第{dropped}答。<|im_end|>第{dropped + 1}答。")
    [one_more] = encode_conversation([TURNS[0], *sum(exchanges[dropped - 1 :], [])], tokenizer)
    assert len(encoded["input_ids"]) <= 400 < len(one_more["input_ids"])


def test_turns_that_are_examples_of_their_own_lose_only_their_own_oldest_exchanges(tiny_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "{{ '<|im_end|>' if loop.last }}")
    roles_and_texts = [(role, f"{number}" * 60) for number in range(1, 5) for role in ("user", "assistant")]
    examples = encode_newest(turns(*roles_and_texts), tokenizer, 300)
    assert [example["exchanges_dropped"] for example in examples] == [0, 0, 1, 2]
    answers = [f"{number}" * 60 + "<|im_end|>" for number in range(1, 5)]
    assert [supervised_text(tokenizer, example["labels"]) for example in examples] == answers


def test_an_exchange_that_is_too_long_alone_is_refused(tokenizer):
    turns = [{"role": "user", "content": "天" * 100_000}, {"role": "assistant", "content": "地"}]
    with pytest.raises(UserError, match=r"\d+ tokens in its newest exchange, model_max_length is 2048"):
        encode_newest(turns, tokenizer, 2048)


def test_control_tokens_in_a_message_are_refused(tokenizer):
    turns = [{"role": "user", "content": "好<|im_end|>"}, {"role": "assistant", "content": "好"}]
    with pytest.raises(UserError, match=r"message 1.*control token <\|im_end\|>"):
        encode_conversation(turns, tokenizer)


def test_what_the_template_refuses_is_a_bad_row(tiny_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    # The behaviour of Gemma 2's template.
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    row = {"messages": json.dumps(TURNS), "source": "a:1", "error": "", "raw": "", "unused_keys": "[]", "tools": "null"}
    assert encode_row(row, tokenizer, 2048)[0]["error"] == "the chat template refuses it: System role not supported"


def test_the_three_formats_say_the_same():
    pairs = [("问一", "答一"), ("问二", "答二")]
    messages = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    system = {"role": "system", "content": "系统"}
    sharegpt = [
        {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]} for turn in messages
    ]
    rows = [
        {"messages": [system, *messages]},
        {"conversations": sharegpt, "system": "系统"},
        {"instruction": "问二", "input": "", "output": "答二", "history": [["问一", "答一"]], "system": "系统"},
    ]
    rows.append({"messages": json.dumps([{"from": turn["role"], "value": turn["content"]} for turn in messages])})
    rows[-1]["system"] = [{"type": "text", "text": "系"}, {"type": "text", "value": "统"}]
    assert [to_messages(row) for row in rows] == [([system, *messages], None, [])] * 4
    assert to_messages({"instruction": "翻译", "input": "你好", "output": "Hello", "id": 7}) == (
        turns(("user", "翻译\n你好"), ("assistant", "Hello")),
        None,
        ["id"],
    )
    for nothing in ("", None, float("nan")):
        row = {"instruction": nothing, "input": "你好", "output": "在", "history": None}
        assert to_messages(row)[0] == turns(("user", "你好"), ("assistant", "在"))


def test_what_a_message_says_of_itself(tokenizer):
    """Thoughts go to the template, turns of weight 0 are read and not learned, other keys are reported."""
    for weight in ({"weight": 0}, {"loss": False}, {"train": False}):
        said = turns(("user", "问一"), ("assistant", "坏"), ("user", "问二"), ("assistant", "好"))
        said[1] |= weight | {"mood": "bad"}
        messages, _, unused = to_messages({"messages": said})
        assert unused == ["messages[].mood"]
        [example] = encode_conversation(messages, tokenizer)
        assert supervised_text(tokenizer, example["labels"]) == "好<|im_end|>"
        assert "坏" in tokenizer.decode(example["input_ids"])
    said = turns(("user", "二加二？"), ("assistant", "四"))
    said[1]["reasoning_content"] = "二加二得四。"
    [example] = encode_conversation(to_messages({"messages": said})[0], tokenizer)
    assert supervised_text(tokenizer, example["labels"]) == "<think>\n二加二得四。\n</think>\n\n四<|im_end|>"


# The structure of Qwen2.5's template for tools.
TOOL_TEMPLATE = """{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}
{{ m.content }}{% for call in m.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_tool_calls_are_learned_and_results_are_not(tiny_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
    openai = [
        {"role": "user", "content": "北京天气？"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "晴", "tool_call_id": "1"},
        {"role": "assistant", "content": "晴。"},
    ]
    values = ["北京天气？", '{"name": "weather", "arguments": {"city": "北京"}}', "晴", "晴。"]
    roles = ["human", "function_call", "observation", "gpt"]
    sharegpt = [{"from": role, "value": value} for role, value in zip(roles, values, strict=True)]
    tool = {"name": "weather", "parameters": {"type": "object"}}
    rows = [
        {"messages": openai, "tools": [{"type": "function", "function": tool}]},
        {"conversations": sharegpt, "tools": json.dumps([tool])},
    ]
    for row in rows:
        messages, tools, unused = to_messages(row)
        tokenizer.chat_template = TOOL_TEMPLATE
        [example] = encode_conversation(messages, tokenizer, tools)
        expected = (
            '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call><|im_end|>晴。<|im_end|>'
        )
        assert supervised_text(tokenizer, example["labels"]) == expected and not unused
        assert "parameters" in tokenizer.decode(example["input_ids"])
        tokenizer.chat_template = tokenizer.chat_template.replace("if tools", "if false")
        with pytest.raises(UserError, match="the chat template knows no tools"):
            encode_conversation(messages, tokenizer, tools)
        tokenizer.chat_template = tokenizer.chat_template.replace("in m.tool_calls", "in []")
        with pytest.raises(UserError, match="drops the tool calls: 'weather'"):
            encode_conversation(messages, tokenizer)


def test_a_system_message_that_the_template_drops_is_named(tiny_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    drops = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}"  # as Phi-3's does
    tokenizer.chat_template = drops + tokenizer.chat_template
    with pytest.raises(UserError, match="the chat template drops the system message '你是老师。'"):
        encode_conversation(TURNS, tokenizer)


def test_questions_in_a_row_and_a_later_system_message_are_left_to_the_template(tokenizer):
    said = turns(("user", "在吗"), ("user", "你好"), ("assistant", "在"), ("system", "用英语"), ("user", "好"))
    [example] = encode_conversation(to_messages({"messages": [*said, *turns(("assistant", "Hi"))]})[0], tokenizer)
    assert supervised_text(tokenizer, example["labels"]) == "在<|im_end|>Hi<|im_end|>"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "问"}, "no output"),
        ({"instruction": "问", "output": ""}, r"message 2 \(assistant\): the text is empty"),
        ({"instruction": "问", "output": None}, "no output"),
        ({"question": "问"}, "none of messages, conversations, instruction among its keys"),
        (["问", "答"], "a row is a JSON object, this is a list"),
        ({"messages": "问"}, "messages holds no JSON"),
        ({"messages": ["问"]}, "messages is a list of objects"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": turns(("system", "好"))}, "no assistant turn"),
        ({"messages": turns(("user", "好"))}, "no assistant turn"),
        ({"messages": turns(("assistant", "好"), ("user", "好"))}, "message 1: roles in the wrong order, assistant"),
        (
            {"messages": turns(("user", "好"), ("assistant", "好"), ("assistant", "好"))},
            "message 3: roles in the wrong",
        ),
        ({"messages": turns(("user", "好"), ("tool", "好"), ("assistant", "好"))}, "message 2: .* without its call"),
        (
            {"messages": turns(("user", "好"), ("assistant", "好"), ("system", "好"))},
            "the last message is the system's",
        ),
        ({"messages": turns(("user", "好"), ("assistant", "好"), ("user", "好"))}, "the last message is the user's"),
        ({"messages": turns(("user", "好"), ("robot", "好"))}, r"message 2 \(robot\): unknown role 'robot'"),
        (
            {"messages": [{"role": "user"}, {"role": "assistant", "content": "好"}]},
            r"message 1 \(user\): the text is empty",
        ),
        ({"messages": [{"role": ["user"], "content": "好"}]}, r"message 1 .*: unknown role \['user'\]"),
        ({"instruction": 3, "input": "你好", "output": "好"}, "instruction and input are strings"),
        ({"instruction": "问", "input": ["你好"], "output": "好"}, "instruction and input are strings"),
        ({"instruction": "问", "output": "好", "history": [{"问": 1, "答": 2}]}, "history is a list of .question"),
        ({"instruction": "问", "output": "好", "history": [["问", "答", "问"]]}, "history is a list of .question"),
        ({"instruction": "问", "output": "好", "history": ["问答"]}, "history is a list of .question"),
        ({"instruction": "问", "output": "好", "history": 3}, "history is a list of .question"),
        ({"instruction": "问", "output": "好", "history": [["问", 3]]}, r"message 2 \(assistant\): the text is int"),
        ({"instruction": "问\ud83d", "output": "好"}, r"message 1 \(user\): a lone surrogate"),
        ({"prompt": "问", "chosen": "好", "rejected": "坏"}, "a preference row .*baichuan2_dpo"),
        ({"text": "天地玄黄"}, "none of messages.*model_clm trains on plain text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "is image_url, only text.*train_llava"),
        (
            {"messages": [*turns(("user", "好")), {"role": "assistant", "content": "好", "weight": 0.5}]},
            "weight is 0.5",
        ),
        ({"conversations": [{"from": "human", "value": "好"}, {"from": "function_call", "value": "好"}]}, "no JSON"),
        ({"instruction": "问", "output": "好", "tools": "[1]"}, "tools is a list of objects"),
    ],
)
def test_bad_rows_say_what_they_lack(row, reason):
    with pytest.raises(UserError, match=reason):
        to_messages(row)


def test_one_row_alone_or_only_copies_say_how_to_go_on(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", make_conversations(1) * 3)
    with pytest.raises(UserError, match="3 good rows, 2 of them copies of validation rows.*--validation_split 0"):
        load_splits(settings(path), tokenizer, 0, None)


def test_a_file_that_begins_with_a_thousand_bad_rows_is_read(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"instruction": "问"}] * 1500 + make_conversations(3))
    assert column(load_encoded(path, tokenizer, 2048)[0], "length")[-3:].all()


def test_bad_rows_stop_the_run_or_are_skipped_counted_and_written(tokenizer, tmp_path):
    rows = make_conversations(20)
    rows[4], rows[7] = {"instruction": "问"}, {"messages": turns(("system", "好"))}
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"2 of 20 rows.*\n.*rows\.jsonl:5: no output\n.*rows\.jsonl:8: no assistant"):
        load_splits(settings(path), tokenizer, 0, None)
    bad_rows_file = tmp_path / "bad_rows.jsonl"
    train, validation, summary = load_splits(settings(path, skip_bad_rows=True), tokenizer, 0, str(bad_rows_file))
    assert summary["bad_rows"] == 2 and len(train) + len(validation) == 18
    written = [json.loads(line) for line in bad_rows_file.read_text(encoding="utf-8").splitlines()]
    assert [(row["source"], row["reason"][:9]) for row in written] == [
        (f"{path}:5", "no output"),
        (f"{path}:8", "no assist"),
    ]
    assert json.loads(written[0]["row"]) == {"instruction": "问"}


def test_splits_share_no_row_and_copies_are_reported(tokenizer, tmp_path):
    rows = make_conversations(30)
    path = write_rows(tmp_path / "rows.jsonl", rows + rows[:10])
    train, validation, summary = load_splits(settings(path, validation_split=0.3), tokenizer, 0, None)
    assert not np.isin(column(train, "key"), column(validation, "key")).any()
    assert summary["copies_of_validation_rows_removed"] == 40 - len(train) - len(validation) > 0
    eval_path = write_rows(tmp_path / "eval.jsonl", rows[:5])
    train, validation, summary = load_splits(settings(path, eval_data_path=eval_path), tokenizer, 0, None)
    assert (len(train), len(validation), summary["copies_of_validation_rows_removed"]) == (30, 5, 10)
    assert summary["duplicates_kept"] == 5


def test_another_template_or_length_never_meets_an_old_cache(tiny_folder, tmp_path):
    from transformers import AutoTokenizer

    path = write_rows(tmp_path / "rows.jsonl", make_conversations(5))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    rows, first = load_encoded(path, tokenizer, 2048)
    assert load_encoded(path, tokenizer, 2048)[1] == first
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|im_start|> ")
    others, second = load_encoded(path, tokenizer, 2048)
    assert second != first and others["input_ids"][0] != rows["input_ids"][0]
    write_rows(tmp_path / "rows.jsonl", make_conversations(6))
    assert len(load_encoded(path, tokenizer, 2048)[0]) == 6


def test_the_sample_data_is_good(tokenizer):
    rows, _ = load_encoded("data/custom_data001", tokenizer, 2048)
    assert len(rows) >= 300 and not any(rows["error"])
    assert len(np.unique(column(rows, "key"))) == len(rows)
    several_turns = [ids for ids in rows["input_ids"] if ids.count(tokenizer.eos_token_id) >= 4]
    assert len(several_turns) >= 60
