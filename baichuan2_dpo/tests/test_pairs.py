"""Every shape of a preference row says the same pair, what both sides share is the prompt, every bad row is named."""

import gzip
import json
import math

import pyarrow
import pyarrow.parquet
import pytest

from conftest import write_rows
from pairs import read_pairs, to_pair
from rows import UserError

SYSTEM, ASKED, GOOD, BAD = "你是老师。", "二加二呢？", "等于四。", "等于五。"
HISTORY = [["一加一等于几？", "等于二。"]]


def turns(*roles_and_texts):
    return [{"role": role, "content": text} for role, text in roles_and_texts]


def sharegpt(messages: list[dict]) -> list[dict]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


QUESTION, CHOSEN, REJECTED = turns(("user", ASKED)), turns(("assistant", GOOD)), turns(("assistant", BAD))
EARLIER = turns(("system", SYSTEM), ("user", HISTORY[0][0]), ("assistant", HISTORY[0][1]))
PROMPT = EARLIER + QUESTION
SIDES = {"chosen": GOOD, "rejected": BAD}
WHOLE = {"chosen": PROMPT + CHOSEN, "rejected": PROMPT + REJECTED}

ROWS = {
    "TRL, messages": {"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED},
    "TRL, system apart": {"prompt": PROMPT[1:], "system": SYSTEM, "chosen": CHOSEN[0], "rejected": REJECTED[0]},
    "TRL, texts as replies": {"prompt": PROMPT, **SIDES},
    "TRL, implicit prompt": WHOLE,
    "TRL, prompt and whole conversations": {"prompt": PROMPT[1:], **WHOLE},
    "UltraFeedback": {"prompt": ASKED + " ", **WHOLE},
    "LLaMA-Factory, alpaca": {"instruction": ASKED, "input": "", "history": HISTORY, "system": SYSTEM, **SIDES},
    "LLaMA-Factory, sharegpt": {
        "conversations": sharegpt(PROMPT),
        "chosen": sharegpt(CHOSEN)[0],
        "rejected": sharegpt(REJECTED)[0],
    },
    "ms-swift": {"messages": PROMPT + CHOSEN, "rejected_response": BAD},
    "LLaMA-Factory, version 1": {
        side + "_messages": [{"role": m["role"], "content": [{"type": "text", "value": m["content"]}]} for m in whole]
        for side, whole in WHOLE.items()
    },
    "ms-swift, whole": {"messages": PROMPT + CHOSEN, "rejected_messages": PROMPT + REJECTED},
    "ms-swift, query": {
        **{"query": ASKED, "response": GOOD, "rejected_response": BAD, "history": HISTORY, "system": SYSTEM}
    },
    "orca": {"system": SYSTEM, "question": ASKED, "history": HISTORY, **SIDES},
    "prompt under messages": {"messages": PROMPT, **SIDES},
    "a table's cells": {
        "prompt": json.dumps(PROMPT[1:]),
        "chosen": json.dumps(CHOSEN[0], ensure_ascii=False),
        "rejected": json.dumps(REJECTED),
        "system": SYSTEM,
        "tools": math.nan,
        "history": None,
    },
    "a table's whole conversations": {name: json.dumps(value) for name, value in WHOLE.items()} | {"prompt": math.nan},
    "the Chinese hh-rlhf": {
        "system": SYSTEM,
        "context": [{"role": turn["from"], "text": turn["value"]} for turn in sharegpt(PROMPT[1:])],
        "chosen": {"role": "assistant", "text": GOOD},
        "rejected": {"role": "assistant", "text": BAD},
    },
}


@pytest.mark.parametrize("shape", ROWS)
def test_every_shape_says_the_same(shape):
    assert to_pair(ROWS[shape]) == (PROMPT, CHOSEN[0], REJECTED[0], None, [])


HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "
OPENING = f"{HUMAN}在吗？{ASSISTANT}在。{HUMAN}Write:\nHuman: hi\nAssistant: hi\n\nThe Human: left.{ASSISTANT}".rstrip()


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": f"{OPENING} 好的。\n\n第二段。", "rejected": f"{OPENING} 不。"},
        {"prompt": OPENING, "chosen": " 好的。\n\n第二段。", "rejected": " 不。\n"},
        {"prompt": f"{OPENING} ".lstrip(), "chosen": "好的。\n\n第二段。", "rejected": f"{OPENING} 不。"},
        {"prompt": OPENING.removesuffix("\n\nAssistant:"), "chosen": "好的。\n\n第二段。", "rejected": "不。"},
    ],
)
def test_transcripts_of_hh_rlhf_are_cut_at_their_markers_alone(row):
    prompt, chosen, rejected, _, unused = to_pair(row)
    assert prompt == turns(
        ("user", "在吗？"), ("assistant", "在。"), ("user", "Write:\nHuman: hi\nAssistant: hi\n\nThe Human: left.")
    )
    assert (chosen["content"], rejected["content"], unused) == ("好的。\n\n第二段。", "不。", [])


def test_a_reply_that_is_json_or_speaks_of_humans_stays_a_text():
    for text in (
        '{"name": "小明"}',
        "[1, 2]",
        "[图片] 好",
        '"好"',
        "3",
        "Human: 好",
        "他说 Human: 好\n\nAssistant: 坏",
    ):
        row = {"prompt": text, "chosen": text, "rejected": BAD}
        assert to_pair(row)[:2] == (turns(("user", text)), {"role": "assistant", "content": text})
    row = {"instruction": "翻译", "input": "你好", **SIDES}
    assert to_pair(row)[0] == turns(("user", "翻译\n你好"))


def test_tools_calls_and_thoughts_are_kept():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
    tool = {"name": "weather", "parameters": {"type": "object"}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "content": "晴"}
    row = {
        "conversations": [{"from": "human", "value": "北京天气？"}],
        "chosen": {"from": "function_call", "value": json.dumps(call["function"])},
        "rejected": {"from": "gpt", "value": "不知道。"},
        "tools": json.dumps([tool]),
    }
    prompt, chosen, _, tools, unused = to_pair(row)
    assert (prompt, chosen, unused) == (turns(("user", "北京天气？")), called, [])
    assert tools == [{"type": "function", "function": tool}]
    prompt = [*turns(("user", "北京天气？")), called, result]
    assert to_pair({"chosen": prompt + CHOSEN, "rejected": prompt + REJECTED})[0] == prompt
    thoughtful = CHOSEN[0] | {"reasoning_content": "想了想。"}
    assert to_pair({"prompt": ASKED, "chosen": thoughtful, "rejected": CHOSEN})[1] == thoughtful


def test_what_is_not_used_is_named():
    row = {
        **{"prompt": ASKED, "prompt_id": "7", "messages": PROMPT + CHOSEN, "score_chosen": 9.0, "label": True},
        **{"chosen": [*PROMPT, CHOSEN[0] | {"rating": 5}], "rejected": [*PROMPT, REJECTED[0] | {"rank": 2}]},
    }
    assert to_pair(row)[4] == ["chosen[].rating", "label", "messages", "prompt_id", "rejected[].rank", "score_chosen"]
    row = {"prompt": [PROMPT[1] | {"mood": "bad"}], "history": HISTORY, "output": GOOD, **SIDES}
    assert to_pair(row)[4] == ["history", "output", "prompt[].mood"]
    muted = [PROMPT[1], PROMPT[2] | {"weight": 0}, PROMPT[3]]  # of the prompt nothing is learned anyhow
    assert to_pair({"prompt": muted, **SIDES}) == (PROMPT[1:], CHOSEN[0], REJECTED[0], None, [])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["问"], "a row is a JSON object, this is a list"),
        ({"text": "天地玄黄"}, r"neither chosen nor rejected among its keys \['text'\]"),
        ({"text": "天地玄黄", "label": 1}, "neither chosen nor rejected"),
        ({"messages": PROMPT + CHOSEN}, "no rejected reply; train_qwen trains on single answers"),
        ({"instruction": ASKED, "output": GOOD}, "no rejected reply; train_qwen trains on single answers"),
        ({"prompt": ASKED, "completion": GOOD}, "no rejected reply; train_qwen trains on single answers"),
        ({"prompt": ASKED, "completion": GOOD, "label": True}, "a KTO row"),
        ({"instruction": ASKED, "output": GOOD, "kto_tag": False}, "a KTO row"),
        ({"messages": PROMPT + CHOSEN, "label": False}, "a KTO row"),
        ({"instruction": ASKED, "output": [GOOD, BAD]}, "output is a list of answers; write a better one as chosen"),
        ({"prompt": ASKED, "completions": [{"text": GOOD, "score": 9}], "scores": [9]}, "completions is a list of"),
        ({"prompt": ASKED, "chosen": GOOD}, "^no rejected reply$"),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": None}, "^no rejected reply$"),
        ({"prompt": ASKED, "chosen": math.nan, "rejected": BAD}, "no chosen reply"),
        (SIDES, "the prompt is missing"),
        ({"system": SYSTEM, **SIDES}, "the prompt ends with the system's message"),
        ({"prompt": [], **SIDES}, "the prompt is missing"),
        ({"prompt": "", **SIDES}, "prompt: the text is empty"),
        ({"prompt": 3, **SIDES}, "prompt holds no messages"),
        ({"messages": "问", **SIDES}, "messages holds no messages"),
        ({"instruction": ASKED, "input": 3, **SIDES}, "instruction and input are strings"),
        ({"prompt": PROMPT + CHOSEN, **SIDES}, "the prompt ends with the assistant's message"),
        ({"prompt": CHOSEN + QUESTION, **SIDES}, "message 1: roles in the wrong order, assistant where user"),
        ({"prompt": turns(("user", ASKED), ("robot", "好")), **SIDES}, r"prompt, message 2 \(robot\): unknown role"),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": f" {GOOD}\n"}, "chosen and rejected are the same"),
        ({"chosen": PROMPT + CHOSEN, "rejected": PROMPT + CHOSEN}, "chosen and rejected are the same"),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": " "}, "rejected: the text is empty"),
        ({"prompt": ASKED, "chosen": [], "rejected": BAD}, "chosen is no answer"),
        ({"prompt": ASKED, "chosen": 4, "rejected": BAD}, "chosen is no answer"),
        ({"prompt": ASKED, "chosen": [GOOD, "四"], "rejected": BAD}, "chosen holds 2 answers, a pair has one"),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": [REJECTED[0]] * 3}, "rejected holds 3 answers"),
        ({"prompt": ASKED, "chosen": [{"text": GOOD, "score": 9}] * 2, "rejected": BAD}, "chosen holds 2 answers"),
        ({"prompt": ASKED, "chosen": QUESTION, "rejected": BAD}, "chosen ends with the user's message"),
        ({"messages": PROMPT, "rejected_response": BAD}, "messages ends with the user's message"),
        ({"messages": CHOSEN, "rejected_response": BAD}, "the prompt is missing"),
        ({"prompt": ASKED, "chosen": CHOSEN[0] | {"weight": 0}, "rejected": BAD}, "chosen: .* nothing to compare"),
        ({"prompt": ASKED, "chosen": CHOSEN[0] | {"loss": 0.5}, "rejected": BAD}, "chosen: loss is 0.5"),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": "\ud83d"}, "rejected: a lone surrogate"),
        ({"prompt": ASKED, "tools": "[1]", **SIDES}, "tools is a list of objects"),
        (
            {"chosen": PROMPT + CHOSEN, "rejected": [*PROMPT[:3], *turns(("user", "那么？")), *REJECTED]},
            r"the two conversations part at message 4, before the last answer \(chosen has 5 messages, rejected 5\)",
        ),
        (
            {"chosen": PROMPT + CHOSEN + PROMPT[1:2] + CHOSEN, "rejected": PROMPT + REJECTED},
            r"part at message 5, before the last answer \(chosen has 7 messages, rejected 5\)",
        ),
        ({"prompt": ASKED, "chosen": PROMPT + CHOSEN, "rejected": BAD}, r"part at message 1, .*rejected 1\)"),
        (
            {"chosen": PROMPT + CHOSEN, "rejected": [*PROMPT[:3], *turns(("user", "那么？")), *CHOSEN]},
            "the two conversations part at message 4",
        ),
        ({"prompt": turns(("system", "别的。"), ("user", ASKED)), **WHOLE}, "prompt is another than that"),
        ({"prompt": "别的？", **WHOLE}, "prompt is another than that of the two conversations"),
        (
            {"chosen": f"{HUMAN}问{HUMAN}问{ASSISTANT}好", "rejected": f"{HUMAN}问{ASSISTANT}坏"},
            "chosen, turn 2: Human speaks twice in a row",
        ),
        (
            {"chosen": f"{HUMAN}问{ASSISTANT}好", "rejected": f"{HUMAN}问{ASSISTANT}"},
            r"rejected, message 2 \(assistant\): the text is empty",
        ),
        (
            {"chosen": f"{HUMAN}问{ASSISTANT}好", "rejected": f"{HUMAN}又问{ASSISTANT}坏"},
            "part at message 1, before the last answer",
        ),
        (
            {"prompt": f"{HUMAN}问{ASSISTANT}", "chosen": f"好{HUMAN}问{ASSISTANT}好", "rejected": "坏"},
            r"part at message 2, .*chosen has 4 messages, rejected 2\)",
        ),
        ({"chosen": f"{HUMAN}问{ASSISTANT}好{HUMAN}", "rejected": f"{HUMAN}问{ASSISTANT}坏"}, "text is empty"),
    ],
)
def test_bad_rows_say_what_is_wrong(row, reason):
    with pytest.raises(UserError, match=reason):
        to_pair(row)


def test_files_of_every_kind_are_read_with_the_place_of_each_row(tmp_path):
    """Rows in the shape of LLaMA-Factory's dpo_zh_demo.json, some of which have a system message."""
    rows = [
        {
            "conversations": sharegpt((EARLIER[:1] if number % 2 else []) + turns(("user", f"第{number}问"))),
            "chosen": {"from": "gpt", "value": f"好{number}"},
            "rejected": {"from": "gpt", "value": f"坏{number}"},
        }
        for number in range(4)
    ]
    pretty = tmp_path / "rows.json"
    pretty.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    transcripts = tmp_path / "rows.jsonl.gz"
    with gzip.open(transcripts, "wt", encoding="utf-8") as file:
        file.write(json.dumps({side: f"{HUMAN}问{ASSISTANT}{side}" for side in SIDES}) + "\n{\n")
    table = tmp_path / "rows.csv"
    table.write_text(f"prompt,chosen,rejected,note\n问,好,坏,\n问,好,,\n{ASKED},{GOOD},{BAD},一\n", encoding="utf-8")
    parquet = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([WHOLE | {"margin": None}]), parquet)
    paths = [str(path) for path in (pretty, transcripts, table, parquet)]
    pairs = list(read_pairs(paths, ["utf-8", "utf-8", "utf-8", ""]))
    assert [pair["source"].removeprefix(f"{tmp_path}/") for pair in pairs] == [
        *(f"rows.json:{line}" for line in (2, 18, 38, 54)),
        *("rows.jsonl.gz:1", "rows.jsonl.gz:2", "rows.csv:2", "rows.csv:3", "rows.csv:4", "rows.parquet:1"),
    ]
    errors = {pair["source"].split("/")[-1]: pair["error"] for pair in pairs if pair["error"]}
    assert errors == {"rows.jsonl.gz:2": errors["rows.jsonl.gz:2"], "rows.csv:3": "no rejected reply"}
    assert "no JSON" in errors["rows.jsonl.gz:2"] and pairs[5]["raw"] == "{" and pairs[5]["prompt"] == ""
    assert json.loads(pairs[1]["prompt"]) == EARLIER[:1] + turns(("user", "第1问"))
    assert json.loads(pairs[3]["rejected"]) == {"role": "assistant", "content": "坏3"}
    assert "坏3" in pairs[3]["rejected"] and pairs[3]["tools"] == "null"
    assert json.loads(pairs[4]["chosen"])["content"] == "chosen"
    assert json.loads(pairs[8]["unused_keys"]) == ["note"]
    assert json.loads(pairs[9]["prompt"]) == PROMPT
    with pytest.raises(UserError, match="empty.jsonl: no row in it"):
        list(read_pairs([write_rows(tmp_path / "empty.jsonl", [])], ["utf-8"]))
