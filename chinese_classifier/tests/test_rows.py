"""Whatever Excel exports is read; every bad row is named by file and line; no text stands on two sides."""

import re
import sys
from pathlib import Path

import pandas as pd
import pytest

import prepare
from prepare import describe, load_tables
from rows import (
    COLUMNS,
    UserError,
    clean_splits,
    conflict_form,
    copy_form,
    doubt_labels,
    list_files,
    read_table,
    sort_labels,
    split_in_blocks,
    write_csv,
)


def table(*rows, file="a.csv") -> pd.DataFrame:
    return pd.DataFrame([(*row, f"{file}:{line}", "") for line, row in enumerate(rows, start=2)], columns=COLUMNS)


def load(data_path, test_split: float = 0.1):
    return load_tables(str(data_path), ("text", "label"), {"validation": 0.1, "test": test_split}, seed=0)


def write(path, text: str, encoding: str = "utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


def run_prepare(monkeypatch, data_path, output) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(data_path), "--output", str(output)])
    prepare.main()


def read(path) -> list[tuple[str, str]]:
    rows = read_table(str(path), "text", "label")
    assert not any(rows.reason)
    return list(zip(rows.text, rows.label, strict=True))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_what_excel_exports_is_read_alike(encoding, delimiter, tmp_path):
    lines = [("text", "label"), ('"房间干净，""很好""\r\n下次再来"', "1.0"), ("龘𠮷，不好", "0.0"), ("一般", "0")]
    path = write(tmp_path / "A.CSV", "".join(delimiter.join(line) + "\r\n" for line in lines), encoding)
    assert read(path) == [('房间干净，"很好"\r\n下次再来', "1"), ("龘𠮷，不好", "0"), ("一般", "0")]
    assert [source.rpartition(":")[2] for source in read_table(path, "text", "label").source] == ["2", "4", "5"]


def test_columns_of_other_names_and_in_another_order(tmp_path):
    path = write(tmp_path / "a.csv", "类别,编号,评论\n好,7,不错\n")
    rows = read_table(path, "评论", "类别")
    assert (rows.text[0], rows.label[0]) == ("不错", "好")
    with pytest.raises(UserError, match=r"a\.csv: no column 'text'; there are 类别, 编号, 评论\. .*--text_column"):
        read_table(path, "text", "label")
    with pytest.raises(UserError, match="'类别,编号': multi-label is not supported"):
        read_table(path, "评论", "类别,编号")
    with pytest.raises(UserError, match="'label': multi-label is not supported"):
        read_table(write(tmp_path / "b.csv", "text,label,label\n好,1,2\n"), "text", "label")
    spaced = read_table(write(tmp_path / "c.csv", 'label;"my text"\n1;好,不错\n'), "my text", "label")
    assert (spaced.text[0], spaced.label[0]) == ("好,不错", "1")


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


def test_a_tsv_is_taken_literally(tmp_path):
    path = write(tmp_path / "a.tsv", 'label\ttext\r\n1\t"很划算"，物流快\r\n0\t"很慢\n\n1\t好,a\rb\n0\t差"\n')
    assert read(path) == [('"很划算"，物流快', "1"), ('"很慢', "0"), ("好,a\rb", "1"), ('差"', "0")]
    assert [source.rpartition(":")[2] for source in read_table(path, "text", "label").source] == ["2", "3", "5", "6"]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('text,label\n好,1\n"很慢,0\n不错,1\n差",0\n好,1\n', 3),
        ('label,text\n1,好\n0,差\n0,"很慢\n1,不错"\n', 4),
        ('id;text;label\n1;好;a\n2;差;b\n3;"很慢;a\n4;慢;b\n5;不错";b\n6;好;a\n', 4),
    ],
)
def test_a_cell_that_swallowed_rows_is_named_by_its_line(content, line, tmp_path):
    columns = ("text", "label")
    with pytest.raises(UserError, match=rf"a\.csv:{line}: a cell that begins here holds \d lines that look like rows"):
        read_table(write(tmp_path / "a.csv", content), *columns)
    honest = 'text,label\n好,1\n差,0\n"很好,\n下次,再来\n",1\n"一\n二,三\n四,五",0\n'
    assert len(read(write(tmp_path / "b.csv", honest))) == 4


def test_tables_are_read_as_they_were_written_whatever_character_is_in_them(tmp_path, monkeypatch):
    characters = [
        *map(chr, (*range(1, 32), *range(127, 160))),
        "\u2028",
        "\u2029",
        "\r\n",
        '"',
        "\ufeff",
        "\U0001f600",
        ";",
    ]
    texts = [f"第{number}{character}句{character}完" for number, character in enumerate(characters * 2)]
    write_csv(pd.DataFrame({"text": texts, "label": ["1", "0"] * len(characters)}), tmp_path / "a.csv")
    assert [text for text, _ in read(tmp_path / "a.csv")] == texts
    run_prepare(monkeypatch, tmp_path / "a.csv", tmp_path / "out")
    splits, removed, _ = load(tmp_path / "out")
    assert sorted(text for rows in splits.values() for text in rows.text) == sorted(texts) and not len(removed)


def test_encodings_that_cannot_be_read(tmp_path):
    write(tmp_path / "big5.csv", "text,label\n樓下的茶館服務周到,好評\n樓下的麵館態度冷淡,差評\n", "big5")
    with pytest.raises(UserError, match=r"big5\.csv:2: .* probably Big5"):
        read_table(str(tmp_path / "big5.csv"), "text", "label")
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
    assert copy_form("Ｇｏｏｄ！ 很好。") == copy_form("good 很 好")
    assert copy_form("！！！") != copy_form("？？？")
    assert conflict_form("Ｇｏｏｄ　很好") == conflict_form("Good 很\u200b好") != conflict_form("good很好")


@pytest.mark.parametrize(
    "texts",
    [
        ("到手了😍", "到手了😡"),
        ("C++课", "C#课", "C课"),
        ("36.5度", "365度"),
        ("3:1", "31"),
        ("3-5天", "35天"),
        ("A＆B", "AB"),
    ],
)
def test_texts_that_differ_in_what_is_no_sentence_mark_all_stay(texts):
    rows = table(*((text, str(label)) for label, text in enumerate(texts)))
    cleaned, removed = clean_splits({"train": rows})
    assert list(cleaned["train"].text) == list(texts) and not len(removed)
    assert len({copy_form(text) for text in texts}) == len(texts)


def test_texts_that_differ_in_a_sentence_mark_are_copies_but_no_contradiction():
    rows = table(("好吃。", "1"), ("好吃！", "1"), ("好吃？", "0"), ("难吃", "0"), ("难 吃", "1"))
    cleaned, removed = clean_splits({"train": rows})
    assert list(cleaned["train"].text) == ["好吃。", "好吃？"]
    assert [reason.partition(":")[0] for reason in removed.reason] == ["a copy", *["in several classes"] * 2]
    cleaned, removed = clean_splits({"train": rows[2:3], "test": rows[:1]})
    assert not len(cleaned["train"]), "the same words stand on two sides"


def test_labels_that_may_be_slips_are_said_in_a_line_of_each_kind():
    assert doubt_labels(["好", "坏", "C++"]) == []
    alike, joined = doubt_labels(["正面", "正面\u200b", "ＯＫ", "OK", "True", "TRUE", "a", "b", "a|b"])
    assert "'OK' / 'ＯＫ'; 'TRUE' / 'True'; '正面' / '正面\\u200b'" in alike
    assert "multi-label is not supported: 'a|b'" in joined


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
        ("好,1\n不错,1\n坏,0\n一般,2\n", r"single row .*: '0' \(.*a\.csv:4\), '2' \(.*a\.csv:5\)\. Add rows"),
        (
            "好,1\n不错,1\n坏,0\n差,0\n行,0\n行,1\n,1\n",
            r"a third of the 7 rows .*2: in several .*; removed 1: empty text",
        ),
    ],
)
def test_classes_that_cannot_be_learned_are_named(rows, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        load(write(tmp_path / "a.csv", "text,label\n" + rows))


def test_a_label_that_training_never_saw_is_named(tmp_path):
    for name, rows in (("train", "好,1\n坏,0\n"), ("validation", "一般,2\n")):
        write(tmp_path / f"{name}.csv", "text,label\n" + rows)
    with pytest.raises(UserError, match=r"validation rows have labels .*: '2' \(.*validation\.csv:2\)"):
        load(tmp_path)


def test_test_rows_of_their_own(tmp_path):
    rows = "".join(f"第{number}条{'好' if number % 2 else '坏'}评,{number % 2}\n" for number in range(50))
    train = write(tmp_path / "all.csv", "text,label\n" + rows)
    test = write(tmp_path / "later.csv", "text,label\n第7条好评。,1\n新的,0\n")
    columns, shares = ("text", "label"), {"validation": 0.1, "test": 0.1}
    splits, removed, notes = load_tables(train, columns, shares, 0, {"validation": None, "test": test})
    assert notes == [f"train rows: {train}", f"test rows: {test}"]
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [45, 4, 2]
    assert removed.reason.tolist() == [f"in another split as well: {test}:2"] and removed.source.tolist() == [
        f"{train}:9"
    ]


@pytest.mark.parametrize(
    "names",
    [
        ("train.tsv", "validation.csv", "test.csv"),
        ("train_data.csv", "valid_data.csv", "test_data.csv"),
        ("Train.csv", "dev.CSV", "TEST.csv"),
        ("train/1.csv", "val/1.csv", "test/1.csv"),
    ],
)
def test_a_split_is_known_by_its_names_and_every_table_is_named(names, tmp_path):
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        mark = "\t" if name.endswith("tsv") else ","
        write(
            tmp_path / name, f"text{mark}label\n" + "".join(f"第{number}{row}条{mark}{row % 2}\n" for row in range(4))
        )
    write(tmp_path / "removed.csv", "text,label\n,1\n")
    splits, removed, notes = load(tmp_path)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 4, "validation": 4, "test": 4}
    assert notes[0].startswith("left out: ") and not len(removed)
    assert notes[1:] == [
        f"{part} rows: {tmp_path / name}" for part, name in zip(("train", "validation", "test"), names, strict=True)
    ]
    write(tmp_path / "more.csv", "text,label\n好,1\n")
    with pytest.raises(UserError, match=r"beside .*[Tt]rain.* there is .*more\.csv, which would be left out"):
        load(tmp_path)


def test_tables_of_one_name_are_all_read(tmp_path):
    for number, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        rows = "".join(f"第{number}{row}条,{row % 2}\n" for row in range(40))
        write(tmp_path / folder / "train.csv", "text,label\n" + rows)
    splits, _, notes = load(tmp_path)
    assert sum(map(len, splits.values())) == 80 and notes == [
        f"train rows: {tmp_path}/a/train.csv, {tmp_path}/b/train.csv"
    ]
    (tmp_path / "b" / "train.csv").rename(tmp_path / "b" / "test.csv")
    (tmp_path / "a" / "train.csv").rename(tmp_path / "a" / "some.csv")
    with pytest.raises(UserError, match=r"no table is named train, beside .*test\.csv\."):
        load(tmp_path)


def test_a_folder_of_nothing_but_removed_rows(tmp_path):
    write(tmp_path / "removed.csv", "text,label\n好,1\n")
    with pytest.raises(UserError, match=r"no table is named train\. Name"):
        load(tmp_path)


def test_a_class_that_vanished_is_named(tmp_path):
    rows = "".join(f"第{number}条,{number % 2}\n" for number in range(20)) + "同一句,0\n同一句,9\n"
    assert load(write(tmp_path / "a.csv", "text,label\n" + rows))[2] == [
        "no row is left of the classes '9' (1): removed.csv says why"
    ]


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
    run_prepare(monkeypatch, path, tmp_path / "out")
    screen = capsys.readouterr().out
    assert re.search(r"train +160 rows \(.* 80, .* 80\)", screen)
    assert f"removed     1: a copy ({path}:202)" in screen and f"removed     1: empty text ({path}:203)" in screen
    splits, removed, _ = load(tmp_path / "out")
    assert [len(part) for part in splits.values()] == [160, 20, 20] and not len(removed)
    assert pd.read_csv(tmp_path / "out" / "removed.csv").reason.tolist() == [f"a copy: of {path}:5", "empty text"]


def test_nothing_is_overwritten_that_prepare_did_not_write(tmp_path, monkeypatch):
    rows = "".join(f"第{number}条,{number % 2}\n" for number in range(40))
    train, test = (write(tmp_path / name, "text,label\n" + rows) for name in ("train.csv", "test.csv"))
    with pytest.raises(UserError, match=r"holds what was not written here: test\.csv, train\.csv"):
        run_prepare(monkeypatch, train, tmp_path)
    assert all(Path(path).read_text("utf-8") == "text,label\n" + rows for path in (train, test))
    for _ in range(2):  # its own tables it may write again
        run_prepare(monkeypatch, train, tmp_path / "out")
    (tmp_path / "out" / "train.csv").write_text("text,label\n")
    with pytest.raises(UserError, match=r"not written here: train\.csv"):
        run_prepare(monkeypatch, train, tmp_path / "out")


def test_sets_that_packages_bring(tmp_path, monkeypatch):
    files = {"pos.txt": "很好\n\n很好\n不错\n", "neg.txt": "很差\n一般\n"}
    files |= {"THUOCL.json": '{"IT": ["软件", "硬件"], "动物": ["老虎", "狮子"]}'}
    for name, text in files.items():
        write(tmp_path / name, text)
    monkeypatch.setattr(prepare, "find_package_file", lambda package, name: tmp_path / name.rpartition("/")[2])
    splits, removed, _ = load("reviews", test_split=0)
    assert {name: len(part) for name, part in splits.items()} == {"train": 2, "validation": 2}
    assert removed.source.tolist() == ["pos.txt:3"]
    assert "removed     1: a copy (pos.txt:3)" in describe(splits, removed)
    splits, *_ = load("words", test_split=0)
    assert set(splits["train"].label) == {"IT", "动物"}
    monkeypatch.undo()
    with pytest.raises(UserError, match="the package no-such-package is missing: pip install"):
        prepare.find_package_file("no-such-package", "a.txt")
