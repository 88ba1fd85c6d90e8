"""Every kind of file and encoding is read alike; what can't be read is named by file, line and column."""

import gzip
import json

import pandas as pd
import pytest

from conftest import settings
from data import load_encoded, load_splits
from files import detect_encoding, identify_file, list_files, list_unread_files, read_records
from rows import UserError, read_rows


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
        (f"[{row}]\n[{row}]", "2:1", "there is more after its end"),
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
    with pytest.raises(UserError, match=r"the folder holds none of \.json"):
        load_encoded(str(tmp_path), tokenizer, 2048)
    with pytest.raises(UserError, match="there is no such file or folder"):
        load_encoded(str(tmp_path / "nowhere"), tokenizer, 2048)
    (tmp_path / "empty.json").write_text("")
    with pytest.raises(UserError, match="no row in it"):
        load_encoded(str(tmp_path), tokenizer, 2048)


def test_hidden_copies_are_not_read_and_endings_may_be_capital(tmp_path):
    for name in ("a.JSON", "b.jsonl", "c.txt", ".ipynb_checkpoints/a-checkpoint.json", "._a.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[]")
    assert list_files(str(tmp_path)) == [str(tmp_path / "a.JSON"), str(tmp_path / "b.jsonl")]
    assert list_unread_files(str(tmp_path)) == [str(tmp_path / "c.txt")]


@pytest.mark.parametrize("ending", ["csv", "gb18030.csv", "tsv", "jsonl.gz", "parquet", "pretty.json", "data.json"])
def test_files_of_other_kinds_are_read_alike(ending, tmp_path):
    rows = [
        {"instruction": f"第{i}问", "input": "甲，\n乙" if i else None, "output": "答：龘𠮷"}
        for i in range(1 + (ending != "pretty.json"))
    ]
    path, table = tmp_path / f"rows.{ending}", pd.DataFrame(rows)
    if ending.endswith(("csv", "tsv")):
        encoding, separator = "gb18030" if ending.startswith("gb") else "utf-8-sig", "\t" if ending == "tsv" else ","
        table.to_csv(path, index=False, sep=separator, encoding=encoding)
        with path.open("a") as file:
            file.write(f"{separator * 2}\n")  # Excel's empty line is none
    elif ending == "parquet":
        table.to_parquet(path)
    elif ending == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    else:
        path.write_text(json.dumps(rows[0] if ending == "pretty.json" else {"n": [{}], "data": rows}, indent=1))
    read = list(read_rows([str(path)], [identify_file(str(path))[0]]))
    assert [json.loads(row["messages"])[0]["content"] for row in read] == ["第0问", "第1问\n甲，\n乙"][: len(rows)]
    lines = {"parquet": [1, 2], "jsonl.gz": [1, 2], "pretty.json": [1], "data.json": [6, 11]}.get(ending, [2, 3])
    assert [row["source"] for row in read] == [f"{path}:{line}" for line in lines]


def test_a_picture_in_a_table_is_not_written_out_as_text(tmp_path):
    pd.DataFrame([{"image": {"bytes": bytes(10**6)}, "day": pd.Timestamp("2026-01-02")}]).to_parquet(
        tmp_path / "a.parquet"
    )
    ((_, record, text),) = read_records(str(tmp_path / "a.parquet"), "")
    assert len(record["image"]["bytes"]) == 10**6
    assert text == '{"image": {"bytes": "1000000 bytes"}, "day": "2026-01-02 00:00:00"}'


def test_json_that_python_cannot_hold_is_a_bad_row(tmp_path):
    for value, reason in (("9" * 5000, "digits"), ("[" * 100_000 + "]" * 100_000, "recursion")):
        row = f'{{"instruction": "问", "output": "答", "id": {value}}}'
        path = tmp_path / "rows.jsonl"
        path.write_text(f"{row}\n{json.dumps({'instruction': '问', 'output': '答'})}\n", encoding="utf-8")
        errors = [row["error"] for row in read_rows([str(path)], ["utf-8"])]
        assert "JSON that can't be read" in errors[0] and reason in errors[0] and not errors[1]
        path.write_text(f"[\n{row}]", encoding="utf-8")
        with pytest.raises(UserError, match=r"rows\.jsonl:2:1: no JSON: can't be read"):
            list(read_rows([str(path)], ["utf-8"]))


def test_a_gz_that_is_damaged_within_is_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    whole = bytearray(gzip.compress(b"".join(b'{"row": %d}\n' % number for number in range(1000))))
    whole[200:210] = b"\xff" * 10
    path.write_bytes(whole)
    with pytest.raises(UserError, match="rows.jsonl.gz: the compressed file is broken"):
        identify_file(str(path))
