"""Files of every kind -> documents; whatever is broken is named with its file and place."""

import gzip
import json
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

import rows
from rows import UserError, list_files, list_unread_files, read_documents

TEXTS = ["第一篇。\n第二行", "第二篇\t有制表符", "第三篇 </s> 😀"]


def read(path, separator: str = "blank_line", text_key: str | None = None) -> list[str]:
    found = list(read_documents(str(path), separator, text_key))
    assert all(place.startswith(f"{path}") for place, _ in found)
    return [text for _, text in found]


def lines(records: list) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def zstd(raw: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(raw, asbytes=True)


@pytest.fixture(params=[7, 1 << 20], ids=["7 bytes at once", "a megabyte at once"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK", request.param)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_text_is_split_as_asked(tmp_path, chunk, encoding, newline):
    path = tmp_path / "a.txt"

    def write(text: str) -> None:
        path.write_bytes(text.replace("\n", newline).encode(encoding))

    expected = [text.replace("\n", newline) for text in TEXTS]
    write("\n\n" + "\n \u3000\n\n".join(TEXTS) + "\n")
    assert read(path) == expected
    assert [place for place, _ in read_documents(str(path), "blank_line", None)] == [f"{path}:{n}" for n in (3, 7, 10)]
    write("\n".join(TEXTS) + "\n")
    assert read(path, "file") == [newline.join(expected)]
    write("\n<|end|>\n".join(TEXTS) + "<|end|>")
    assert read(path, "<|end|>") == expected
    write("\n\n".join(TEXTS))
    assert read(path, "第") == [
        text.replace("\n", newline) for text in ("一篇。", "二行", "二篇\t有制表符", "三篇 </s> 😀")
    ]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
def test_records_of_every_kind(tmp_path, chunk, pack):
    ending = {bytes: "", gzip.compress: ".gz", zstd: ".zst"}[pack]
    kinds = {
        "a.jsonl": lines([{"text": text} for text in TEXTS]),
        "b.json": lines([{"text": text, "id": 1} for text in TEXTS]),
        "c.json": json.dumps([{"content": text, "title": ""} for text in TEXTS]).encode(),
        "d.json": json.dumps(TEXTS, indent=2, ensure_ascii=False).encode("gb18030"),
        "e.json": "\n".join(json.dumps({"text": text}, indent=1) for text in TEXTS).encode(),
    }
    for name, raw in kinds.items():
        (tmp_path / (name + ending)).write_bytes(pack(raw))
        assert read(tmp_path / (name + ending)) == TEXTS, name
    if pack is not bytes:  # two packed files end to end are one
        (tmp_path / f"a.jsonl{ending}").write_bytes(pack(kinds["a.jsonl"]) + pack(kinds["a.jsonl"]))
        assert read(tmp_path / f"a.jsonl{ending}") == TEXTS * 2


def test_wudao_rows_keep_their_title_and_parquet_reads_what_it_needs(tmp_path):
    row = {"uniqueKey": "1", "titleUkey": "2", "dataType": "百科", "title": "标题", "content": "正文", "id": 7}
    (tmp_path / "part-1.json").write_text(json.dumps([row]))
    assert read(tmp_path / "part-1.json") == ["标题\n正文"]
    columns = {name: [value] * 600 for name, value in row.items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["标题\n正文"] * 600
    assert read(tmp_path / "a.parquet", text_key="dataType") == ["百科"] * 600


def test_sources_are_folders_and_files_without_numbers(tmp_path):
    for name in ("news.txt", "part-0001.json", "part-0002.json.gz", "web/x/1.txt", "web/2.jsonl", "199801.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    for name in ("readme.md", ".hidden.txt", "web/a.bin"):
        (tmp_path / name).write_text("x")
    assert [source for source, _ in list_files(str(tmp_path))] == ["199801", "news", "part", "part", "web", "web"]
    assert list_files(str(tmp_path / "news.txt")) == [("news", str(tmp_path / "news.txt"))]
    assert list_unread_files(str(tmp_path)) == [str(tmp_path / "readme.md"), str(tmp_path / "web" / "a.bin")]
    for name, message in {"web/a.bin": "none of .txt", "nothing": "there is no such file"}.items():
        with pytest.raises(UserError, match=message):
            list_files(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.txt", "好\n".encode() * 3 + b"\0", "NUL at byte 12: UTF-16 or binary"),
        ("a.txt", "好好\n".encode() + b"\xff\xff", r"neither UTF-8 \(first bad byte at offset 7\) nor GB18030"),
        ("a.txt", "好好\n".encode() + "好".encode()[:2], "a.txt:1: is UTF-8, but not all lines are"),
        ("a.txt", "好好\n".encode() + "好".encode()[:1], r"neither UTF-8 \(first bad byte at offset 7\)"),
        ("a.json", b'[{"text": "a"}, {"text": "b"}', "the array isn't closed behind record 2"),
        ("a.json", b'[{"text": "a"}, {"te', "no JSON behind record 1, before byte 20"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "behind record 1.*a comma or ] is missing"),
        ("a.json", b'[{"text": "a"}] x', "there is more after its end"),
        ("a.json", b'[{"text": "a"},]', "no JSON behind record 1"),
        (
            "a.txt.gz",
            gzip.compress(b"text\n" * 1000, mtime=0)[:-9],
            "broken, or ends early, behind byte .* of what it unpacks",
        ),
        ("a.txt.zst", zstd(bytes(range(1, 250)) * 999)[:-9], "broken, or ends early, behind byte .* of what it unp"),
        ("a.txt.gz", gzip.compress(b"a" * 99 + b"\0", mtime=0), "NUL at byte 99 of what it unpacks to"),
        ("a.txt.gz", b"no gzip", "broken, or ends early, behind byte 0"),
        ("a.parquet", b"PAR1" + b"x" * 100, "behind row 0 of a file of 104 bytes"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(tmp_path, name, raw, message):
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".zst", zstd)])
def test_a_packed_file_that_ends_early_says_where_to_within_64_kilobytes(tmp_path, ending, pack):
    raw = "".join(f"{number * number}\n" for number in range(100_000)).encode()
    packed = pack(raw)
    (tmp_path / f"a.txt{ending}").write_bytes(packed[: len(packed) * 2 // 3])
    with pytest.raises(UserError, match="ends early, behind byte") as error:
        read(tmp_path / f"a.txt{ending}")
    offset = int(str(error.value).split("behind byte ")[1].split()[0])
    assert 0.5 * len(raw) < offset < 0.8 * len(raw)


def test_a_truncated_parquet_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS * 1000}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="a.parquet: no Parquet file, or one that is broken or ends early"):
        read(path)


def test_a_byte_of_another_encoding_far_into_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "HEAD", 100)
    monkeypatch.setattr(rows, "CHUNK", 50)
    (tmp_path / "a.txt").write_bytes("好好\n".encode() * 100 + b"\xff" + "好\n".encode())
    with pytest.raises(UserError, match="a.txt: byte 700 is not UTF-8, as what stands before it is"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"body": "x", "id": 1}, "no key text or content among body, id; name the text's by --text_key"),
        ({"text": 5}, "text holds a int, not a text"),
        ([1], "an object or a text, this is a list"),
        ({"text": "\ud800"}, "a lone surrogate"),
    ],
)
def test_a_bad_record_is_named_and_the_others_are_read(tmp_path, record, message):
    path = tmp_path / "a.jsonl"
    raw = [json.dumps(value) for value in ({"text": "好"}, record, {"text": None}, {"text": " \n"}, {"text": "坏"})]
    path.write_text("\n".join(raw) + '\n{"text": "half')
    found = list(read_documents(str(path), "blank_line", None))
    assert [place for place, _ in found] == [f"{path}:{line}" for line in (1, 2, 5, 6)]
    assert found[0][1] == "好" and found[2][1] == "坏"
    assert message in str(found[1][1]) and "no JSON" in str(found[3][1])


def test_a_long_document_is_cut_at_lines_and_a_long_line_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LONGEST", 1000)
    monkeypatch.setattr(rows, "CHUNK", 300)
    monkeypatch.setattr(rows, "HEAD", 300)
    text = "\n".join(f"{number}" for number in range(2000))
    (tmp_path / "a.txt").write_text(text)
    parts = read(tmp_path / "a.txt", "file")
    assert "\n".join(parts) == text and len(parts) > 8 and max(map(len, parts)) <= 1000
    (tmp_path / "a.txt").write_text(f"short\n\n{'x' * 5000}")
    with pytest.raises(UserError, match="a.txt: a line of more than 1,000 characters; it goes on at byte 1[0-9]00"):
        read(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 5000}))
    with pytest.raises(UserError, match="a.jsonl: a line of more than 1,000 characters"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x"}, {"text": "x" * 5000}]))
    with pytest.raises(UserError, match="a.json: no JSON behind record 1, .* longer than 1,000 characters"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl.gz"])
def test_memory_is_bounded_whatever_the_size(tmp_path, monkeypatch, name):
    """A line of 16 MB is refused, and 8 MB of records are read, within what a few of the longest documents take."""
    for bound in ("CHUNK", "HEAD"):
        monkeypatch.setattr(rows, bound, 1 << 16)
    monkeypatch.setattr(rows, "LONGEST", 1 << 18)
    record = b'{"text": "' + b"x" * 1000 + b'"}'
    if name == "a.txt":
        (tmp_path / name).write_bytes(b"x" * (16 << 20))
    elif name == "a.json":
        (tmp_path / name).write_bytes(b"[" + b",".join([record] * 8000) + b"]")
    else:
        (tmp_path / name).write_bytes(gzip.compress(b"\n".join([record] * 8000), 1))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_documents(str(tmp_path / name), "blank_line", None)) == 8000
    except UserError as error:
        assert name == "a.txt" and "a line of more than 262,144 characters" in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6
