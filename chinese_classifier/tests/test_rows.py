"""Whatever Excel exports is read; every bad row is named by file and line; no text stands on two sides."""

import re
import sys

import pandas as pd
import pytest

import prepare
from prepare import describe, load_tables
from rows import COLUMNS, UserError, clean_splits, list_files, normalize, read_table, sort_labels, split_in_blocks


def table(*rows, file="a.csv") -> pd.DataFrame:
    return pd.DataFrame([(*row, f"{file}:{line}", "") for line, row in enumerate(rows, start=2)], columns=COLUMNS)


def load(data_path, test_split: float = 0.1):
    return load_tables(str(data_path), ("text", "label"), {"validation": 0.1, "test": test_split}, seed=0)


def write(path, text: str, encoding: str = "utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


def read(path) -> list[tuple[str, str]]:
    rows = read_table(path, "text", "label")
    assert not any(rows.reason)
    return list(zip(rows.text, rows.label, strict=True))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_what_excel_exports_is_read_alike(encoding, delimiter, tmp_path):
    lines = [("text", "label"), ('"房间干净，""很好""\r\n下次再来"', "1.0"), ("龘𠮷，不好", "0.0"), ("一般", "0")]
    path = write(tmp_path / "a.csv", "".join(delimiter.join(line) + "\r\n" for line in lines), encoding)
    assert read(path) == [('房间干净，"很好"\r\n下次再来', "1"), ("龘𠮷，不好", "0"), ("一般", "0")]
    assert [source.rpartition(":")[2] for source in read_table(path, "text", "label").source] == ["2", "4", "5"]


def test_columns_of_other_names_and_in_another_order(tmp_path):
    path = write(tmp_path / "a.csv", "类别,编号,评论\n好,7,不错\n")
    rows = read_table(path, "评论", "类别")
    assert (rows.text[0], rows.label[0]) == ("不错", "好")
    with pytest.raises(UserError, match=r"a\.csv: no column 'text'.* there are 类别, 编号, 评论.*--text_column"):
        read_table(path, "text", "label")


def test_bad_rows_have_their_line_and_reason(tmp_path):
    text = "text,label\n好,1\n,1\n好,\n好,1,2\n\n" + "天" * 2_000_000 + ",1\n坏,0\n"
    rows = read_table(write(tmp_path / "a.csv", text), "text", "label")
    bad = rows[rows.reason != ""]
    assert [source.rpartition(":")[2] for source in bad.source] == ["3", "4", "5", "7"]
    kinds = ["empty text", "empty label", "wrong number of cells", "too long a cell"]
    assert [reason.partition(":")[0] for reason in bad.reason] == kinds
    assert list(rows[rows.reason == ""].text) == ["好", "坏"]


@pytest.mark.parametrize("text", ['text,label\n好,1\n"坏"了,0\n好,1\n', 'text,label\n好,1\n"坏,0\n好,1\n'])
def test_broken_quotes_are_named_by_the_line_of_their_row(text, tmp_path):
    with pytest.raises(UserError, match=r"a\.csv:3: the row that begins here has broken quotes"):
        read_table(write(tmp_path / "a.csv", text), "text", "label")


def test_encodings_that_cannot_be_read(tmp_path):
    mixed = "text,label\n第一行中文,1\n".encode("gb18030") + "第二行也是中文,0\n".encode()
    (tmp_path / "mixed.csv").write_bytes(mixed)
    with pytest.raises(UserError, match="two encodings in one file, GB18030 in line 2 and UTF-8 in line 3"):
        read_table(str(tmp_path / "mixed.csv"), "text", "label")
    (tmp_path / "nul.csv").write_bytes(b"text,label\nab\0,1\n")
    with pytest.raises(UserError, match="NUL at byte 13"):
        read_table(str(tmp_path / "nul.csv"), "text", "label")
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"a\.xlsx: neither \.csv nor \.tsv; in Excel: save as"):
        list_files(str(tmp_path / "a.xlsx"))


def test_classes_are_ordered_by_number_or_by_the_alphabet():
    assert sort_labels(["10", "9", "-1", "9"]) == ["-1", "9", "10"]
    assert sort_labels(["b", "10", "a"]) == ["10", "a", "b"]


def test_texts_that_a_reader_would_call_the_same():
    assert normalize("Ｇｏｏｄ！ 很好。") == normalize("good 很 好")
    assert normalize("！！！") != normalize("？？？")


def test_copies_conflicts_and_leaks_leave_the_right_side():
    splits = {
        "train": table(("一", "0"), ("一。", "0"), ("二", "0"), ("二", "1"), ("三", "1"), ("四", "1"), file="train"),
        "validation": table(("三", "1"), ("五", "0"), file="validation"),
        "test": table(("四", "0"), ("五", "0"), ("五", "0"), file="test"),
    }
    cleaned, removed = clean_splits(splits)
    assert {name: list(rows.text) for name, rows in cleaned.items()} == {
        "train": ["一"],
        "validation": ["三"],
        "test": ["四", "五"],
    }
    assert list(zip(removed.split, removed.source, removed.reason, strict=True)) == [
        ("train", "train:3", "a copy: of train:2"),
        ("train", "train:4", "in several classes: 0 and 1"),
        ("train", "train:5", "in several classes: 0 and 1"),
        ("train", "train:6", "in another split as well: validation:2"),
        ("train", "train:7", "in another split as well: test:2"),
        ("validation", "validation:3", "in another split as well: test:3"),
        ("test", "test:4", "a copy: of test:3"),
    ]


def test_blocks_are_contiguous_and_hold_their_share_of_each_class():
    rows = table(
        *((f"第{number}条", "大") for number in range(1000)), *((f"另{number}条", "小") for number in range(100))
    )
    splits = split_in_blocks(rows, {"validation": 0.1, "test": 0.2}, seed=0)
    assert sorted(pd.concat(splits.values()).index) == list(range(1100))
    assert [len(part) for part in splits.values()] == [770, 110, 220]
    assert [(part.label == "小").sum() for part in splits.values()] == [70, 10, 20]
    test = splits["test"][splits["test"].label == "大"].index
    assert len(test) == 200 and sum(test[1:] == test[:-1] + 1) >= 180, "neighbours were torn apart"


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_small_class_keeps_a_row_to_learn_from(count):
    rows = table(
        *((f"第{number}条", "大") for number in range(50)), *((f"另{number}条", "小") for number in range(count))
    )
    splits = split_in_blocks(rows, {"validation": 0.1, "test": 0.1}, seed=0)
    assert "小" in set(splits["train"].label) and "小" in set(splits["validation"].label)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ("好,1\n不错,1\n", "only the class '1' is among the training rows"),
        (",1\n", "no good row is among the training rows"),
        ("好,1\n不错,1\n坏,0\n", r"a\.csv:4: the only row of the class '0'"),
    ],
)
def test_classes_that_cannot_be_learned_are_named(rows, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        load(write(tmp_path / "a.csv", "text,label\n" + rows))


def test_a_label_that_training_never_saw_is_named(tmp_path):
    for name, rows in (("train", "好,1\n坏,0\n"), ("validation", "一般,2\n")):
        write(tmp_path / f"{name}.csv", "text,label\n" + rows)
    with pytest.raises(UserError, match=r"validation\.csv:2: the validation row has the label '2'"):
        load(tmp_path)


def test_test_rows_of_their_own(tmp_path):
    rows = "".join(f"第{number}条{'好' if number % 2 else '坏'}评,{number % 2}\n" for number in range(50))
    train = write(tmp_path / "all.csv", "text,label\n" + rows)
    test = write(tmp_path / "later.csv", "text,label\n第7条好评。,1\n新的,0\n")
    columns, shares = ("text", "label"), {"validation": 0.1, "test": 0.1}
    splits, removed = load_tables(train, columns, shares, 0, {"validation": None, "test": test})
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [45, 4, 2]
    assert removed.reason.tolist() == [f"in another split as well: {test}:2"] and removed.source.tolist() == [
        f"{train}:9"
    ]


def test_a_table_beside_train_is_not_left_out_in_silence(tmp_path):
    for name, rows in (("train.tsv", "好\t1\n坏\t0\n"), ("dev.tsv", "一般\t1\n")):
        write(tmp_path / name, "text\tlabel\n" + rows)
    with pytest.raises(UserError, match=r"beside train there are .*dev\.tsv, which would be left out"):
        load(tmp_path)
    (tmp_path / "dev.tsv").rename(tmp_path / "validation.tsv")
    splits, _ = load(tmp_path, test_split=0)
    assert [len(part) for part in splits.values()] == [2, 1]


def test_tables_and_shares_that_leave_nothing(tmp_path):
    rows = "".join(f"第{number}条,{number % 2}\n" for number in range(20))
    path = write(tmp_path / "a.csv", "text,label\n" + rows)
    empty = write(tmp_path / "b.csv", "text,label\n,1\n")
    columns, shares = ("text", "label"), {"validation": 0.1, "test": 0.1}
    with pytest.raises(UserError, match=r"b\.csv: no good row is among the test rows"):
        load_tables(path, columns, shares, 0, {"test": empty})
    for bad in ({"validation": 20, "test": 0.1}, {"validation": -0.1, "test": 0}, {"validation": 0.5, "test": 0.5}):
        with pytest.raises(UserError, match="less than 1 together"):
            load_tables(path, columns, bad, 0)
    few = write(tmp_path / "c.csv", "text,label\n很好,1\n不错,1\n很坏,0\n不行,0\n")
    assert list(load_tables(few, columns, shares, 0)[0]) == ["train", "validation"]


def test_command_line_writes_tables_that_are_read_again_as_they_are(tmp_path, monkeypatch, capsys):
    rows = "".join(f"第{number}条{'好' if number % 2 else '坏'}评,{number % 2}\n" for number in range(200))
    path = write(tmp_path / "a.csv", "text,label\n" + rows + "第3条好评！,1\n,1\n", "gb18030")
    monkeypatch.setattr(sys, "argv", ["prepare.py", path, "--output", str(tmp_path / "out")])
    prepare.main()
    screen = capsys.readouterr().out
    assert re.search(r"train +160 rows \(.* 80, .* 80\)", screen)
    assert f"removed     1: a copy ({path}:202)" in screen and f"removed     1: empty text ({path}:203)" in screen
    splits, removed = load(tmp_path / "out")
    assert [len(part) for part in splits.values()] == [160, 20, 20] and not len(removed)
    assert pd.read_csv(tmp_path / "out" / "removed.csv").reason.tolist() == [f"a copy: of {path}:5", "empty text"]


def test_sets_that_packages_bring(tmp_path, monkeypatch):
    files = {"pos.txt": "很好\n\n很好\n不错\n", "neg.txt": "很差\n一般\n"}
    files |= {"THUOCL.json": '{"IT": ["软件", "硬件"], "动物": ["老虎", "狮子"]}'}
    for name, text in files.items():
        write(tmp_path / name, text)
    monkeypatch.setattr(prepare, "find_package_file", lambda package, name: tmp_path / name.rpartition("/")[2])
    splits, removed = load("reviews", test_split=0)
    assert {name: len(part) for name, part in splits.items()} == {"train": 2, "validation": 2}
    assert removed.source.tolist() == ["pos.txt:3"]
    assert "removed     1: a copy (pos.txt:3)" in describe(splits, removed)
    splits, _ = load("words", test_split=0)
    assert set(splits["train"].label) == {"IT", "动物"}
    monkeypatch.undo()
    with pytest.raises(UserError, match="the package no-such-package is missing: pip install"):
        prepare.find_package_file("no-such-package", "a.txt")
