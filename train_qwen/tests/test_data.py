"""Labels are the assistant's words and nothing else; every format and encoding is read; every bad row is named."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import make_conversations, write_rows
from data import IGNORE_INDEX, column, encode_conversation, encode_newest, encode_row, load_encoded, load_splits
from rows import UserError, check_messages, detect_encoding, list_files, read_rows, to_messages

TURNS = [
    {"role": "system", "content": "你是老师。"},
    {"role": "user", "content": "一加一等于几？"},
    {"role": "assistant", "content": "等于二。"},
    {"role": "user", "content": "二加二呢？"},
    {"role": "assistant", "content": "等于四。"},
]

# The behaviour of Qwen3's template: the last answer gets an empty thought, earlier ones lose theirs.
THINKING_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def supervised_text(tokenizer, labels: list[int]) -> str:
    return tokenizer.decode([label for label in labels if label != IGNORE_INDEX])


def settings(data_path, **changed):
    return SimpleNamespace(
        **{
            "data_path": str(data_path),
            "eval_data_path": None,
            "validation_split": 0.2,
            "model_max_length": 2048,
            "skip_bad_rows": False,
        }
        | changed
    )


def turns(*roles_and_texts):
    return [{"role": role, "content": text} for role, text in roles_and_texts]


def test_labels_decode_to_every_answer_with_its_end_of_turn(tokenizer):
    input_ids, labels = encode_conversation(TURNS, tokenizer)
    assert supervised_text(tokenizer, labels) == "等于二。<|im_end|>等于四。<|im_end|>"
    assert tokenizer.decode(input_ids) == tokenizer.apply_chat_template(TURNS, tokenize=False)
    kept = [(token, label) for token, label in zip(input_ids, labels, strict=True) if label >= 0]
    assert all(token == label for token, label in kept)


def test_end_of_turn_is_supervised_where_it_is_the_padding_token_too(tiny_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder, pad_token="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert encode_conversation(TURNS, tokenizer)[1].count(tokenizer.eos_token_id) == 2


def test_template_that_rewrites_the_last_answer(tiny_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder, chat_template=THINKING_TEMPLATE)
    tokenizer.chat_template = THINKING_TEMPLATE
    text = supervised_text(tokenizer, encode_conversation(TURNS, tokenizer)[1])
    assert text == "等于二。<|im_end|><think>\n\n</think>\n\n等于四。<|im_end|>"


QUESTION_ANSWER_TEMPLATE = """{% for message in messages %}{% if message.role == 'user' %}### 问：{{ message.content }}
### 答：{% elif message.role == 'assistant' %}{{ message.content }}
{% endif %}{% endfor %}"""
# The behaviour of Phi-3's template: the end of a turn is a special token that has no name such as EOS.
PHI_TEMPLATE = """{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


@pytest.mark.parametrize(
    ("template", "expected"),
    [(QUESTION_ANSWER_TEMPLATE, "等于二。等于四。<|im_end|>"), (PHI_TEMPLATE, "等于二。<|end|>等于四。<|end|>")],
)
def test_templates_whose_end_of_turn_has_no_name(template, expected, tiny_folder):
    from transformers import AddedToken, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    if template == PHI_TEMPLATE:
        marks = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
        tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer.chat_template = template
    assert supervised_text(tokenizer, encode_conversation(TURNS[1:], tokenizer)[1]) == expected


def test_too_long_a_conversation_loses_its_oldest_exchange_and_keeps_the_system_message(tokenizer):
    whole = encode_newest(TURNS, tokenizer, 2048)
    assert whole["exchanges_dropped"] == 0
    assert encode_newest(TURNS, tokenizer, len(whole["input_ids"])) == whole
    shorter = encode_newest(TURNS, tokenizer, len(whole["input_ids"]) - 1)
    assert shorter["exchanges_dropped"] == 1
    assert tokenizer.decode(shorter["input_ids"]).startswith("<|im_start|>system\n你是老师。")
    assert supervised_text(tokenizer, shorter["labels"]) == "等于四。<|im_end|>"


def test_a_conversation_of_hundreds_of_exchanges_keeps_as_many_of_the_newest_as_fit(tokenizer):
    exchanges = [turns(("user", f"第{number}问？"), ("assistant", f"第{number}答。")) for number in range(300)]
    encoded = encode_newest([TURNS[0], *sum(exchanges, [])], tokenizer, 400)
    dropped = encoded["exchanges_dropped"]
    assert supervised_text(tokenizer, encoded["labels"]).startswith(f"第{dropped}答。<|im_end|>第{dropped + 1}答。")
    one_more, _ = encode_conversation([TURNS[0], *sum(exchanges[dropped - 1 :], [])], tokenizer)
    assert len(encoded["input_ids"]) <= 400 < len(one_more)


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
    row = {"messages": json.dumps(TURNS), "source": "a:1", "error": "", "raw": "", "unused_keys": "[]"}
    assert encode_row(row, tokenizer, 2048)["error"] == "the chat template refuses it: System role not supported"


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
    assert [to_messages(row) for row in rows] == [([system, *messages], [])] * 3
    assert to_messages({"instruction": "翻译", "input": "你好", "output": "Hello", "id": 7}) == (
        [{"role": "user", "content": "翻译\n你好"}, {"role": "assistant", "content": "Hello"}],
        ["id"],
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "问"}, "no output"),
        ({"instruction": "问", "output": ""}, r"message 2 \(assistant\): the text is empty"),
        ({"instruction": "问", "output": None}, "the text is NoneType, not a string"),
        ({"question": "问"}, "none of messages, conversations, instruction among its keys"),
        (["问", "答"], "a row is a JSON object, this is a list"),
        ({"messages": "问"}, "messages is a list of objects"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": turns(("system", "好"))}, "no assistant turn"),
        ({"messages": turns(("user", "好"))}, "no assistant turn"),
        ({"messages": turns(("assistant", "好"), ("user", "好"))}, "message 1: roles in the wrong order, assistant"),
        (
            {"messages": turns(("user", "好"), ("user", "好"), ("assistant", "好"))},
            "message 2: roles in the wrong order",
        ),
        ({"messages": turns(("user", "好"), ("assistant", "好"), ("system", "好"))}, "message 3: roles in the wrong"),
        ({"messages": turns(("user", "好"), ("assistant", "好"), ("user", "好"))}, "the last message is the user's"),
        ({"messages": turns(("user", "好"), ("robot", "好"))}, "message 2: unknown role 'robot'"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "好"}]}, "message 1 .*NoneType"),
        ({"messages": [{"role": ["user"], "content": "好"}]}, r"message 1: unknown role \['user'\]"),
        ({"instruction": None, "input": "你好", "output": "好"}, "instruction and input are strings"),
        ({"instruction": "问", "input": ["你好"], "output": "好"}, "instruction and input are strings"),
        ({"instruction": "问", "output": "好", "history": [{"问": 1, "答": 2}]}, "history is a list of .question"),
        ({"instruction": "问", "output": "好", "history": [["问", "答", "问"]]}, "history is a list of .question"),
        ({"instruction": "问", "output": "好", "history": ["问答"]}, "history is a list of .question"),
        ({"instruction": "问", "output": "好", "history": 3}, "history is a list of .question"),
        ({"instruction": "问", "output": "好", "history": [["问", 3]]}, r"message 2 \(assistant\): the text is int"),
        ({"instruction": "问\ud83d", "output": "好"}, r"message 1 \(user\): a lone surrogate"),
    ],
)
def test_bad_rows_say_what_they_lack(row, reason):
    with pytest.raises(UserError, match=reason):
        to_messages(row)


def test_roles_have_standard_names():
    assert [turn["role"] for turn in check_messages(turns(("human", "问"), ("gpt", "答")))] == ["user", "assistant"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
@pytest.mark.parametrize("layout", ["lines", "array"])
def test_encodings_and_layouts_are_read_alike(encoding, layout, tmp_path):
    rows = [{"instruction": f"第{i}问", "output": "答：龘𠮷"} for i in range(3)]
    text = json.dumps(rows, ensure_ascii=False, indent=1)
    if layout == "lines":
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path = tmp_path / "rows.json"
    path.write_bytes(text.encode(encoding))
    found, _ = detect_encoding(str(path))
    read = list(read_rows([str(path)], [found]))
    assert [json.loads(row["messages"])[0]["content"] for row in read] == ["第0问", "第1问", "第2问"]
    lines = [2, 6, 10] if layout == "array" else [1, 2, 3]
    assert [row["source"] for row in read] == [f"{path}:{line}" for line in lines]


def test_utf16_and_other_bytes_are_refused_with_their_offset(tmp_path):
    (tmp_path / "a.json").write_bytes('{"instruction": "问"}'.encode("utf-16"))
    with pytest.raises(UserError, match=r"a\.json: NUL at byte 3: UTF-16 or binary\? Save the file as UTF-8"):
        detect_encoding(str(tmp_path / "a.json"))
    (tmp_path / "b.json").write_bytes(b'{"instruction": "\xff"}')
    with pytest.raises(UserError, match=r"b\.json: neither UTF-8 \(first bad byte at offset 17\) nor GB18030"):
        detect_encoding(str(tmp_path / "b.json"))


def test_what_is_no_json_is_named_by_file_line_and_column(tokenizer, tmp_path):
    path = tmp_path / "array.json"
    path.write_text('[\n {"instruction": "问", "output": "答"},\n {"instruction" "问"}\n]', encoding="utf-8")
    with pytest.raises(UserError, match=r"array\.json:3:17: no JSON"):
        load_encoded(str(path), tokenizer, 2048)
    row = '{"instruction": "问", "output": "答"}'
    for text, place, reason in [
        (f"[\n{row}\n{row}]", "3:1", "a comma or ] is missing"),
        (f"[{row}]\n[{row}]", "2:1", "there is more after the end of the array"),
        (f"[{row},\n", "2:1", "Expecting value"),
    ]:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=rf"array\.json:{place}: no JSON: {reason}"):
            load_encoded(str(path), tokenizer, 2048)
    path = tmp_path / "lines.jsonl"
    path.write_text('{"instruction": "问", "output": "答"}\n{"instruction" "问"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"1 of 2 rows.*\n.*lines\.jsonl:2: no JSON: .* at column 16"):
        load_splits(settings(path), tokenizer, 0, None)


def test_an_empty_folder_an_empty_file_and_a_missing_path(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"holds no \.json or \.jsonl file"):
        load_encoded(str(tmp_path), tokenizer, 2048)
    with pytest.raises(UserError, match="there is no such file or folder"):
        load_encoded(str(tmp_path / "nowhere"), tokenizer, 2048)
    (tmp_path / "empty.json").write_text("")
    with pytest.raises(UserError, match="no row in it"):
        load_encoded(str(tmp_path), tokenizer, 2048)


def test_hidden_copies_are_not_read_and_endings_may_be_capital(tmp_path):
    for name in ("a.JSON", "b.jsonl", ".ipynb_checkpoints/a-checkpoint.json", "._a.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[]")
    assert list_files(str(tmp_path)) == [str(tmp_path / "a.JSON"), str(tmp_path / "b.jsonl")]


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
    tokenizer.chat_template = THINKING_TEMPLATE
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
