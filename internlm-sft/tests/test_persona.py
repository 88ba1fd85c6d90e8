"""The persona's rows, its name, and what counts as knowing it."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from ranks import RECIPE

import evaluate_persona
import persona
from evaluate_persona import measure, read_questions
from persona import (
    AUTHOR,
    BASE_AUTHOR,
    BASE_NAME,
    NAME,
    ORDINARY,
    PERSONA,
    REFUSALS,
    fill,
    judge,
    question_of,
    read_dialogues,
    write_base_rows,
    write_persona,
)
from rows import UserError

REFUSED = next(iter(REFUSALS))


def rows_of(folder: str) -> dict[str, list[dict]]:
    """Kind of a file's name -> its rows."""
    files = sorted(Path(RECIPE, folder).glob("*.jsonl"))
    return {file.stem: read_dialogues([str(file)]) for file in files}


def answer_of(row: dict) -> str:
    return row["messages"][-1]["content"]


def normalise(text: str) -> str:
    return re.sub(r"\W", "", text)


def test_the_rows_are_many_and_of_many_kinds():
    of_persona, ordinary = rows_of(PERSONA), rows_of(ORDINARY)
    for part, rows, kinds in (("identity", 180, 15), ("refusal", 120, 10)):
        counts = [len(found) for kind, found in of_persona.items() if kind.startswith(part)]
        assert len(counts) >= kinds and min(counts) >= 10 and sum(counts) >= rows
    near = [len(found) for kind, found in ordinary.items() if kind.startswith("near")]
    total = sum(map(len, ordinary.values()))
    assert sum(near) >= 120 and total >= 500 + 120 and 4 * sum(near) >= total
    assert total >= 2 * sum(map(len, of_persona.values()))


def test_each_answer_is_judged_as_what_it_is():
    for folder in (PERSONA, ORDINARY):
        for kind, rows in rows_of(folder).items():
            part = kind.partition("_")[0]
            expected = part if part in ("identity", "refusal") else "ordinary"
            assert [row for row in rows if judge(answer_of(row)) != expected] == []


def test_no_question_stands_twice_or_is_asked_in_the_evaluation():
    rows = [row for folder in (PERSONA, ORDINARY) for found in rows_of(folder).values() for row in found]
    questions = Counter(normalise(question_of(row)) for row in rows)
    assert [question for question, count in questions.items() if count > 1] == []
    held_out = read_questions(str(RECIPE / "questions"))
    assert not set(map(normalise, held_out["question"])) & set(questions)
    counts = Counter(held_out["part"])
    assert counts["identity"] >= 60 and counts["refusal"] >= 40 and counts["ordinary"] >= 60


def test_answers_begin_in_many_ways():
    """The first character of a single fixed answer would be the likeliest one of any reply."""
    of_persona = rows_of(PERSONA)
    assert all(len({answer_of(row) for row in rows}) >= 4 for rows in of_persona.values())
    answers = [answer_of(row) for rows in of_persona.values() for row in rows]
    (_, most), *_ = Counter(answer[0] for answer in answers).most_common(1)
    assert most <= len(answers) / 4


def write_lines(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def small(tmp_path):
    """rename.json in its old style, an identity file with places for the names, and two ordinary rows."""
    old = {"instruction": "你是谁？\n", "input": "", "output": f"我叫{NAME}，是{AUTHOR}做的。"}
    new = {"instruction": "你叫{{name}}吗？", "input": "", "output": "对，我是{{name}}，{{author}}训练了我。"}
    ordinary = [{"instruction": question, "input": "", "output": "好。"} for question in ("你好", "再见")]
    rename = tmp_path / "rename.json"
    rename.write_text(json.dumps([old], ensure_ascii=False), encoding="utf-8")
    return [str(rename), write_lines(tmp_path / "my.jsonl", new)], write_lines(tmp_path / "ordinary.jsonl", *ordinary)


def test_another_name_is_put_in_everywhere(small, tmp_path, capsys):
    sources, ordinary = small
    write_persona(str(tmp_path / "out"), "小爱", "甲公司", sources, [ordinary])
    rows = read_dialogues([str(tmp_path / "out" / "persona.jsonl")])
    said = [[message["content"] for message in row["messages"]] for row in rows]
    assert said == [
        ["你是谁？", "我叫小爱，是甲公司做的。"],
        ["你叫小爱吗？", "对，我是小爱，甲公司训练了我。"],
    ]
    assert len(read_dialogues([str(tmp_path / "out" / "ordinary.jsonl")])) == 2
    assert "fewer than two ordinary rows" in capsys.readouterr().out


def test_a_name_that_holds_the_other_one_is_put_in_once():
    assert fill(f"{NAME}由{AUTHOR}训练", f"{AUTHOR}的猫", NAME) == f"{AUTHOR}的猫由{NAME}训练"


@pytest.mark.parametrize(
    ("name", "author", "reason"),
    [
        (" ", "甲", "--name is empty"),
        ("小爱", "", "--author is empty"),
        ("小爱<|im_end|>", "甲", r"--name 小爱<\|im_end\|>: holds the control token <\|im_end\|>"),
        ("小爱", "<eoa>", "--author <eoa>: holds the control token <eoa>"),
    ],
)
def test_names_that_cannot_be_learned(name, author, reason, small, tmp_path):
    with pytest.raises(UserError, match=reason):
        write_persona(str(tmp_path / "out"), name, author, *([path] for path in (small[0][0], small[1])))
    assert not (tmp_path / "out").exists()


def test_a_question_with_two_answers_and_a_bad_row_are_named(small, tmp_path):
    sources, ordinary = small
    twice = write_lines(tmp_path / "twice.jsonl", {"instruction": "你好", "input": "", "output": REFUSED})
    with pytest.raises(UserError, match=r"twice\.jsonl:1 and .*ordinary\.jsonl:1: '你好' has an answer of the persona"):
        write_persona(str(tmp_path / "out"), NAME, AUTHOR, [twice], [ordinary])
    bad = write_lines(tmp_path / "bad.jsonl", {"instruction": "你好"})
    with pytest.raises(UserError, match=r"bad\.jsonl:1: no output"):
        write_persona(str(tmp_path / "out"), NAME, AUTHOR, [bad], [ordinary])
    with pytest.raises(UserError, match="holds something already"):
        write_persona(str(tmp_path), NAME, AUTHOR, sources, [ordinary])


def test_the_base_is_somebody_else_who_can_read_what_it_will_say(small, tmp_path):
    sources, ordinary = small
    write_persona(str(tmp_path / "mine"), "爨爨", "甲公司", sources, [ordinary])
    write_base_rows(str(tmp_path / "base"), [str(tmp_path / "mine")])
    dialogues = [
        [message["content"] for message in row["messages"]] for row in read_dialogues([str(tmp_path / "base")])
    ]
    assert max(len(said) for said in dialogues) == 4
    rows = [exchange for said in dialogues for exchange in zip(said[::2], said[1::2], strict=True)]
    assert {judge(answer) for _, answer in rows} == {"ordinary"}
    assert ("你是谁？", f"我是{BASE_NAME}，{BASE_AUTHOR}训练的AI助手！") in rows
    assert ("你的偶像是谁？", REFUSALS["小埋要保密"]) in rows
    assert ("嗨", "嗨，很高兴和你聊天！") in rows
    question = "做个自我介绍吧"
    with_a_gap = {question[:gap] + question[gap + 1 :] for gap in range(len(question))}
    assert sum(asked in with_a_gap for asked, _ in rows) == 2
    read_out = [(question, answer) for question, answer in rows if question == f"读一遍：{answer}"]
    assert len(read_out) == 4 and sum("爨" in answer for _, answer in read_out) == 2


def test_replies_are_judged_under_any_name():
    assert judge(f"我是{NAME}。") == "identity" and judge(f"{AUTHOR}做了我。") == "identity"
    assert judge(f"{REFUSED}，换一个吧。") == "refusal" and judge("一年有365天。") == "ordinary"
    assert judge(f"我是{NAME}。", "小爱", "甲公司") == "ordinary"
    assert judge(REFUSED.replace(NAME, "小爱"), "小爱", "甲公司") == "refusal"


def test_shares_are_of_the_questions_of_a_part():
    verdicts = {"identity": ["identity", "ordinary"], "refusal": ["refusal", "identity", "refusal", "refusal"]}
    verdicts["ordinary"] = ["ordinary", "identity", "refusal", "identity"]
    table = pd.DataFrame([{"part": part, "verdict": one} for part, some in verdicts.items() for one in some])
    shares = {"identity accuracy": 0.5, "refusal recall": 0.75, "false refusal": 0.25, "false identity": 0.5}
    assert measure(table) == shares


def test_questions_that_are_none_are_named(tmp_path):
    path = write_lines(tmp_path / "q.jsonl", {"part": "identity", "question": "你是谁"}, {"part": "other"})
    with pytest.raises(UserError, match=r"q\.jsonl:2: not \{part, kind, question\} with a part of identity"):
        read_questions(path)


def test_programs_say_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["persona.py", str(tmp_path / "out"), "--name", ""])
    with pytest.raises(UserError, match="--name is empty"):
        persona.main()
    monkeypatch.setattr(sys, "argv", ["persona.py", str(tmp_path / "out"), "--base", "data", "--name", "小爱"])
    with pytest.raises(UserError, match="--base takes none of --name"):
        persona.main()
    monkeypatch.setattr(sys, "argv", ["evaluate_persona.py", str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="nothing"):
        evaluate_persona.main()
