"""Raw data -> rows: what becomes of a dialogue, a bad row, a duplicate; the split; memory; and no half output."""

import gzip
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import RECIPE

import prepare
from conftest import write_rows
from files import UserError
from rows import read_rows

# Prepares each of the files and prints the peak memory so far, in kB. (ru_maxrss would begin at the parent's.)
MEASURE = """
import re, sys
import prepare
for data in sys.argv[1:]:
    sys.argv = ["prepare.py", data, data + ".out"]
    prepare.main()
    print("peak", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def run(monkeypatch, capsys, *arguments) -> str:
    """prepare.py in this process; returns what it printed, without runs of spaces."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
    prepare.main()
    return re.sub(" +", " ", capsys.readouterr().out)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def questions(folder: Path) -> set[str]:
    """The first questions of all files of a folder."""
    return {row["messages"][0]["content"] for file in folder.glob("*.jsonl") for row in read_jsonl(file)}


def instruction(question: str, answer: str = "这是一个回答。", addition: str = "") -> dict:
    return {"instruction": question, "input": addition, "output": answer}


def reason(row: dict) -> str:
    with pytest.raises(UserError) as error:
        prepare.unfold_dialogue(row)
    return str(error.value)


def test_a_dialogue_becomes_turns():
    text = "Human:你好，请问几点了？\n 是上午吗？ \nAssistant： 现在是上午十点。\n\nHuman : 谢谢\nAssistant: "
    row = prepare.unfold_dialogue(instruction(text, " 不客气。\n") | {"system": "你是助手。", "id": 7})
    assert row == {
        "system": "你是助手。",
        "id": 7,
        "messages": [
            {"role": "human", "content": "你好，请问几点了？\n 是上午吗？"},
            {"role": "assistant", "content": "现在是上午十点。"},
            {"role": "human", "content": "谢谢"},
            {"role": "assistant", "content": "不客气。"},
        ],
    }


@pytest.mark.parametrize(
    "text",
    [
        "聊天记录里的 Human: 是什么意思？",
        "下面的对话说了什么？\nHuman: 你好\nAssistant: 你好",
        "Humanity: what is it?",
        "",
    ],
)
def test_a_speaker_amid_a_text_makes_no_dialogue(text):
    assert prepare.unfold_dialogue(instruction(text)) == instruction(text)


def test_a_broken_dialogue_has_its_reason():
    assert "turn 2 is Human's as well" in reason(instruction("Human:一\nHuman:二\nAssistant:"))
    assert "turn 3 is Assistant's as well" in reason(instruction("Human:一\nAssistant:二\nAssistant:"))
    assert "doesn't begin with Human" in reason(instruction("Assistant:一\nHuman:二\nAssistant:"))
    assert "doesn't begin with Human" in reason(instruction("你好\nHuman:二\nAssistant:"))
    assert "doesn't end with Assistant" in reason(instruction("Human:一\nAssistant:二\nHuman:三"))
    assert "doesn't end with Assistant" in reason(instruction("Human:一\nAssistant:二"))
    assert "input beside it" in reason(instruction("Human:一\nAssistant:", addition="更多"))


def test_bad_rows_are_written_and_counted(tmp_path, monkeypatch, capsys):
    good = instruction("Human:第一问\nAssistant:第一答\nHuman:第二问\nAssistant:")
    bad = [instruction("Human:一\nHuman:二\nAssistant:"), instruction("问题", "")] + [instruction("问题", " ")] * 2
    data = write_rows(tmp_path / "raw.jsonl", [good, *bad])
    with open(data, "a", encoding="utf-8") as file:
        file.write('{"instruction": 没有引号}\n')
    output = run(monkeypatch, capsys, data, tmp_path / "out", "--validation", 0)
    rows = read_jsonl(tmp_path / "out/bad_rows.jsonl")
    assert [row["source"] for row in rows] == [f"{data}:{line}" for line in range(2, 7)]
    assert rows[0]["reason"] == "a dialogue whose turns don't alternate: turn 2 is Human's as well"
    assert json.loads(rows[0]["raw"]) == bad[0] and rows[4]["raw"] == '{"instruction": 没有引号}'
    assert output.count("bad row: ") == 3 and f"bad row: {data}:2: {rows[0]['reason']}" in output
    assert "bad 5" in output and "message N (assistant): the text is empty 3" in output
    (row,) = read_jsonl(tmp_path / "out/train/zh.jsonl")
    assert list(row) == ["messages"] and [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * 2


def test_the_first_of_duplicates_stays(tmp_path, monkeypatch, capsys):
    asked = [
        "What is  AI?",
        "ｗｈａｔ is ai",
        "计算 12/4",
        "计算 12*4",
        "什么是 C？",
        "什么是 C#？",
        "1.5 的平方",
        "15 的平方。",
    ]
    rows = [instruction(question, f"这是第 {number} 个回答。") for number, question in enumerate(asked)]
    output = run(monkeypatch, capsys, write_rows(tmp_path / "raw.jsonl", rows), tmp_path / "out", "--validation", 0)
    kept = read_jsonl(tmp_path / "out/train/zh.jsonl")
    assert [row["messages"][0]["content"] for row in kept] == [asked[0], *asked[2:]]
    assert kept[0]["messages"][1]["content"] == "这是第 0 个回答。" and "duplicate 1" in output


def test_other_languages_and_lengths_are_left_out(tmp_path, monkeypatch, capsys):
    rows = [
        instruction("What is the name of this river?", "It is the river of the town."),
        instruction("这条河叫什么？", "它叫长江。"),
        instruction("为什么？", "说来话长。" * 20),
        instruction("谁", "我"),
        instruction("Quel est le nom de ce fleuve ?", "C'est la Seine, dans la ville de Paris."),
    ]
    data, flags = write_rows(tmp_path / "raw.jsonl", rows), ["--min_length", 5, "--max_length", 80]
    output = run(monkeypatch, capsys, data, tmp_path / "out", "--languages", "zh", "en", *flags, "--validation", 0)
    assert {file.name for file in (tmp_path / "out/train").iterdir()} == {"zh.jsonl", "en.jsonl"}
    assert questions(tmp_path / "out/train") == {rows[0]["instruction"], rows[1]["instruction"]}
    for count in ("other language 1", "too short 1", "too long 1", "bad 0", "en 1 0", "zh 1 0"):
        assert count in output
    assert output.endswith(f"DATA={tmp_path}/out/train bash train_zero2.sh\n")  # no validation row: no flag for it


def test_no_question_is_on_both_sides_and_none_moves(tmp_path, monkeypatch, capsys):
    rows = [instruction(f"第 {number} 个问题是什么？") for number in range(400)]
    again = [instruction(f"第{number}个问题是什么?", "另一个回答。") for number in range(400)]
    few, many = write_rows(tmp_path / "few.jsonl", rows[:200]), write_rows(tmp_path / "many.jsonl", rows[::-1] + again)
    output = run(monkeypatch, capsys, few, tmp_path / "few", "--validation", 0.2)
    assert f"DATA={tmp_path}/few/train bash train_zero2.sh --eval_data_path {tmp_path}/few/validation" in output
    assert "duplicate 400" in run(monkeypatch, capsys, many, tmp_path / "many", "--validation", 0.2)
    train, validation = questions(tmp_path / "many/train"), questions(tmp_path / "many/validation")
    assert not train & validation and len(train | validation) == 400 and 50 < len(validation) < 110
    assert questions(tmp_path / "few/train") < train and questions(tmp_path / "few/validation") < validation


def test_arrays_jsonl_and_gb18030_tables_are_read(tmp_path, monkeypatch, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.json").write_text(json.dumps([instruction("数组里的问题")]), encoding="utf-8")
    with gzip.open(raw / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        turns = [{"from": "human", "value": "对话里的问题"}, {"from": "gpt", "value": "这是回答。"}]
        file.write(json.dumps({"conversations": turns}))
    (raw / "c.csv").write_text("instruction,input,output\n表格里的问题,,这是回答。\n", encoding="gb18030")
    (raw / "notes.txt").write_text("来源", encoding="utf-8")
    output = run(monkeypatch, capsys, raw, tmp_path / "out", "--validation", 0)
    assert questions(tmp_path / "out/train") == {"数组里的问题", "对话里的问题", "表格里的问题"}
    assert f"files not read: {raw}/notes.txt" in output
    (row,) = read_rows([str(raw / "c.csv")], ["gb18030"])
    assert json.loads(row["messages"]) in [row["messages"] for row in read_jsonl(tmp_path / "out/train/zh.jsonl")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--languages", "zh", "cn"], "--languages cn: known are zh en code fr es."),
        (["--validation", "1"], "--validation 1.0: give a share"),
        (["--languages", "fr"], "no row to train on: 1 bad, 1 other language"),
    ],
)
def test_what_a_user_gets_wrong(tmp_path, monkeypatch, capsys, flags, message):
    data = write_rows(tmp_path / "raw.jsonl", [instruction("你好"), instruction("你好", "")])
    with pytest.raises(UserError, match=re.escape(message)):
        run(monkeypatch, capsys, data, tmp_path / "out", *flags)
    assert [file.name for file in tmp_path.iterdir()] == ["raw.jsonl"]


def test_an_output_that_holds_something_is_refused(tmp_path, monkeypatch, capsys):
    data, output = write_rows(tmp_path / "raw.jsonl", [instruction("你好")]), tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["prepare.py", data, str(output)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RECIPE / "prepare.py"), run_name="__main__")
    assert ended.value.code == f"error: {output}: holds something already; give another folder, or empty it."
    assert [file.name for file in output.iterdir()] == ["mine.txt"]
    (output / "mine.txt").unlink()
    run(monkeypatch, capsys, data, output)
    assert questions(output / "train") == {"你好"}


def test_a_crash_leaves_nothing(tmp_path, monkeypatch, capsys):
    data = write_rows(tmp_path / "raw.jsonl", [instruction("第一问"), instruction("第二问")])
    decide, decided = prepare.decide, []

    def crash(*arguments):
        if decided:
            raise RuntimeError("no space left")
        decided.append(decide(*arguments))
        return decided[0]

    monkeypatch.setattr(prepare, "decide", crash)
    with pytest.raises(RuntimeError, match="no space left"):
        run(monkeypatch, capsys, data, tmp_path / "out")
    assert decided and [file.name for file in tmp_path.iterdir()] == ["raw.jsonl"]


def test_memory_does_not_grow_with_the_rows(tmp_path):
    data = []
    for count in (6_000, 60_000):
        rows = [instruction(f"天地玄黄，宇宙洪荒，第 {number} 行是什么？") for number in range(count)]
        data.append(write_rows(tmp_path / f"{count}.jsonl", rows))
    command = [sys.executable, "-c", MEASURE, *data]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=RECIPE).stdout
    few, many = (int(peak) / 1024 for peak in re.findall(r"peak (\d+)", output))
    kept = [len(questions(tmp_path / "60000.jsonl.out" / side)) for side in ("train", "validation")]
    assert sum(kept) == 60_000 and min(kept) > 400
    assert many - few < 15
