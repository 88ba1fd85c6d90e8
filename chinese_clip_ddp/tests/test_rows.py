"""Every form of data gives the same pairs; what is wrong is named by file and line, and nothing gets lost."""

import base64
import json
import os
import re

import pytest
from made_pairs import write_tar

from odd_images import draw_arrow, draw_bad, draw_good, encode
from rows import UserError, find_again, find_files, identify_files, list_unread_files, read_rows
from tars import read_members

JPEG = draw_good()["JPEG"]


def read(path, language: str = "zh") -> list[dict]:
    files = find_files(str(path))
    return list(read_rows(files, identify_files(files)[0], language))


def texts(rows: list[dict]) -> list[tuple[str, str]]:
    return [(row["image"].rpartition("/")[2].rpartition(":")[2], row["text"]) for row in rows if not row["error"]]


def errors(rows: list[dict], folder) -> list[str]:
    return [f"{row['source']}: {row['error']}".replace(f"{folder}/", "") for row in rows if row["error"]]


def write_lines(path, records: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """Three pictures: beside the table, in images/, and in a folder deeper."""
    for name in ("a.jpg", "images/b.jpg", "deep/c.d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(JPEG)
    return tmp_path


def test_keys_and_languages(folder):
    both = {"file_path": "images/b.jpg", "prompt": "an arrow", "zh_prompt": "箭头", "id": 7}
    rows = [{"image": "a.jpg", "text": " 箭 头 "}, both, {"img": "deep/c.d.jpg", "caption": ["一", "二"], "group": 3}]
    write_lines(folder / "train.jsonl", rows)
    zh = read(folder)
    assert texts(zh) == [("a.jpg", "箭 头"), ("b.jpg", "箭头"), ("c.d.jpg", "一"), ("c.d.jpg", "二")]
    assert [row["group"] for row in zh] == ["", "", "3", "3"]
    assert [row["unused_keys"] for row in zh] == ["[]", '["id"]', "[]", "[]"]
    assert zh[3]["source"] == f"{folder}/train.jsonl:3" and zh[1]["path"] == f"{folder}/images/b.jpg"
    assert texts(read(folder / "train.jsonl", "en"))[1] == ("b.jpg", "an arrow")
    write_lines(folder / "train.jsonl", [{"image": "a.jpg", "text": "an arrow", "zh_prompt": "箭头"}])
    assert texts(read(folder)) == [("a.jpg", "箭头")] and texts(read(folder, "en")) == [("a.jpg", "an arrow")]


def test_relative_paths(folder, monkeypatch):
    write_lines(folder / "t.jsonl", [{"image": "b.jpg", "text": "好"}, {"image": "x.jpg", "text": "好"}])
    for working_folder, path in ((folder.parent, folder.name), (folder, "."), (folder, "t.jsonl")):
        monkeypatch.chdir(working_folder)
        rows = read(path)
        assert texts(rows) == [("b.jpg", "好")] and rows[0]["path"] == f"{folder}/images/b.jpg"
        assert str(folder) not in rows[1]["error"] and rows[1]["error"].count("images") == 1


def test_choices_and_kind(folder):
    row = {"image": "a.jpg", "text": "红", "kind": "colour"}
    write_lines(folder / "t.jsonl", [row | {"choices": ["蓝", "绿"]}, row | {"choices": '["蓝"]'}])
    assert [(one["kind"], one["choices"]) for one in read(folder)] == [("colour", ["蓝", "绿"]), ("colour", ["蓝"])]


def test_tables_of_excel(folder):
    for name, tab in (("t.csv", ","), ("t.tsv", "\t")):
        lines = [tab.join(cells) for cells in (("image", "text"), ("deep\\c.d.jpg", "红色的箭头"), ("b.jpg", ""))]
        (folder / name).write_bytes("\r\n".join(lines).encode("gb18030"))
    rows = read(folder)
    assert texts(rows) == [("deep\\c.d.jpg", "红色的箭头")] * 2
    assert errors(rows, folder)[1].startswith("t.tsv:3: no caption: none of zh_prompt, text, caption")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"image": "none.jpg", "text": "好"}, "there is no image none.jpg; looked in .*/images"),
        ({"image": "deep", "text": "好"}, "there is no image deep"),
        ({"image": "../a.jpg", "text": "好"}, "lies outside of the data folder"),
        ({"image": "/etc/hostname", "text": "好"}, "lies outside of the data folder"),
        ({"image": "link.jpg", "text": "好"}, "lies outside of the data folder"),
        ({"image": "https://a.b/c.jpg", "text": "好"}, "is an address .*download it first"),
        ({"image": {"bytes": "..."}, "text": "好"}, "is the path of one image, this is a dict; pictures inside"),
        ({"image": ["a.jpg"], "text": "好"}, "is the path of one image, this is a list"),
        ({"text": "好"}, "no image: none of image, file_path"),
        ({"image": "a.jpg"}, "no caption: none of zh_prompt, text, caption"),
        ({"image": "a.jpg", "text": " \u3000"}, "the caption .text. is empty"),
        ({"image": "a.jpg", "text": ["好", ""]}, "the caption .text. is empty"),
        ({"image": "a.jpg", "zh_prompt": "", "prompt": "ok"}, "the caption .zh_prompt. is empty"),
        ({"image": "a.jpg", "text": 3}, "text is a text or a list of texts"),
        ({"image": "a.jpg", "text": "\ud83d"}, "a lone surrogate"),
        ({"image": "a.jpg", "text": "好", "choices": "红"}, "choices holds no JSON"),
        ({"image": "a.jpg", "text": "好", "choices": [1]}, "choices is a list of texts"),
        ({"image": "a.jpg", "text": "好", "group": [1]}, "group is a text or a number"),
        ("[1, 2", "no JSON"),
        ("[1, 2]", "a row is a JSON object, this is a list"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path, record, reason):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    (data / "a.jpg").write_bytes(JPEG)
    (data / "link.jpg").symlink_to(tmp_path / "a.jpg")
    line = json.dumps(record) if isinstance(record, dict) else record
    write_lines(data / "t.jsonl", [{"image": "a.jpg", "text": "好"}, line])
    good, bad = read(data)
    assert not good["error"] and bad["source"] == f"{data}/t.jsonl:2" and bad["raw"]
    assert re.search(reason, bad["error"])


def test_a_picture_that_was_missing_is_found_again(folder):
    write_lines(folder / "t.jsonl", [{"image": "late.jpg", "text": "好"}])
    missing = [(row["image"], row["source"]) for row in read(folder)]
    assert find_again(missing, str(folder)) == []
    (folder / "images/late.jpg").write_bytes(JPEG)
    assert find_again(missing, str(folder)) == ["late.jpg"]


def test_folders_without_a_table(tmp_path):
    for name in ("猫/1.jpg", "狗/2.png", "狗/3.jpg", "images/4.jpg", "5.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(JPEG)
    (tmp_path / "狗/3.txt").write_bytes("一只狗\n\n它在跑\n".encode("gb18030"))
    (tmp_path / "5.txt").write_text("\n")
    (tmp_path / "notes.md").write_text("x")
    rows = read(tmp_path)
    assert sorted(texts(rows)) == [("1.jpg", "猫"), ("2.png", "狗"), ("3.jpg", "一只狗"), ("3.jpg", "它在跑")]
    assert [row["source"] for row in rows if row["text"] == "它在跑"] == [f"{tmp_path}/狗/3.txt:3"]
    found = errors(rows, tmp_path)
    assert len(found) == 2 and "5.jpg: no caption: 5.txt is empty" in found
    used = {row["path"] for row in rows}
    assert list_unread_files(str(tmp_path), used) == ([f"{tmp_path}/notes.md"], 2)
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")  # a name in another encoding
    (tmp_path / "5.jpg").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff/5.jpg"))
    assert any("a lone surrogate" in row["error"] for row in read(tmp_path))


def test_what_cannot_be_read_says_what_can(tmp_path):
    with pytest.raises(UserError, match="there is no such file or folder"):
        find_files(str(tmp_path / "none"))
    (tmp_path / "data.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match=r"give a table .*Unpack .*data.tar.gz first: bash unzip_data.sh"):
        find_files(str(tmp_path))
    write_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(UserError, match=r"empty.jsonl: no row in it"):
        read(tmp_path)


def test_chinese_clip_tables(tmp_path):
    coded = base64.b64encode(JPEG).decode()
    write_lines(tmp_path / "train_imgs.tsv", [f"1\t{coded}", f"2\t{coded}", "3 no tab", f"2\t{coded}"])
    records = [
        {"text_id": 8, "text": "高级感", "image_ids": [1, 2]},
        {"text_id": 9, "text": "箭头", "image_ids": [5]},
        {"text_id": 10, "text": "箭头"},
    ]
    write_lines(tmp_path / "train_texts.jsonl", records)
    rows = read(tmp_path / "train_texts.jsonl")
    good = [row for row in rows if not row["error"]]
    assert [row["image"] for row in good] == [f"{tmp_path}/train_imgs.tsv:{line}" for line in (1, 2)]
    assert {row["text"] for row in good} == {"高级感"} and good[0]["coding"] == "base64"
    data = (tmp_path / "train_imgs.tsv").read_bytes()
    assert [data[row["offset"] :][: row["size"]].decode() for row in good] == [coded, coded]
    assert errors(rows, tmp_path) == [
        "train_imgs.tsv:3: no tab between the id and the picture",
        "train_imgs.tsv:4: the id 2 again",
        "train_texts.jsonl:2: there is no image 5 in train_imgs.tsv",
        "train_texts.jsonl:3: image_ids is a list of the ids of its images, and can't be empty",
    ]
    (tmp_path / "alone_imgs.tsv").write_text(f"1\t{coded}\n")
    assert list_unread_files(str(tmp_path), set()) == ([f"{tmp_path}/alone_imgs.tsv"], 0)


def test_tars(tmp_path):
    long_name = "长" * 60 + ".jpg"  # 180 bytes: a header of its own
    members = {
        "v1.2.jpg": JPEG,
        "v1.2.txt": "点\n号".encode("gb18030"),
        "x/b.png": JPEG,
        "x/b.json": json.dumps({"caption": "乙", "group": "g", "url": "u"}).encode(),
        long_name: JPEG,
        long_name.replace("jpg", "txt"): "长".encode(),
        "alone.jpg": JPEG,
        "lost.txt": b"x",
        "bad.jpg": JPEG,
        "bad.json": b"{",
        "v1.2.png": JPEG,
    }
    write_tar(tmp_path / "a.tar", members)
    rows = read(tmp_path)
    expected = [("v1.2.jpg", "点"), ("v1.2.jpg", "号"), ("b.png", "乙"), (long_name, "长")]
    assert texts(rows) == expected
    of_json = next(row for row in rows if row["text"] == "乙")
    assert of_json["group"] == "g" and of_json["unused_keys"] == '["url"]'
    data = (tmp_path / "a.tar").read_bytes()
    assert all(data[row["offset"] :][: row["size"]] == JPEG for row in rows if not row["error"])
    found = errors(rows, tmp_path)
    assert found[0] == "a.tar:v1.2.png: the key v1.2 has another v1.2.jpg already"
    assert found[1].startswith("a.tar:alone.jpg: no caption") and found[2].startswith("a.tar:lost.txt: no image")
    assert found[3].startswith("a.tar:bad.jpg: bad.json: no JSON") and len(found) == 4


def test_members_that_point_outside_and_links_are_refused(tmp_path):
    names = {"../evil.jpg": JPEG, "/tmp/evil.jpg": JPEG, "good.jpg": JPEG, "good.txt": "好".encode()}
    write_tar(tmp_path / "a.tar", names, {"link.jpg": "/etc/passwd"})
    rows = read(tmp_path)
    assert texts(rows) == [("good.jpg", "好")]
    assert errors(rows, tmp_path) == [
        "a.tar:../evil.jpg: its name points outside of the archive",
        "a.tar:/tmp/evil.jpg: its name points outside of the archive",
        "a.tar:link.jpg: no plain file (a link, a device or a sparse file)",
    ]


def test_a_tar_with_a_broken_header_and_one_that_is_cut_off(tmp_path):
    members = {f"{number}.{kind}": JPEG for number in range(4) for kind in ("jpg", "txt")}
    members |= {name: "好".encode() for name in members if name.endswith("txt")}
    data = write_tar(tmp_path / "whole.tar", members)
    places = {member.name: member for member in read_members(str(tmp_path / "whole.tar"))}
    header = places["2.jpg"].offset - 512
    (tmp_path / "whole.tar").write_bytes(data[:header] + b"\xff" * 100 + data[header + 100 :])
    rows = read(tmp_path)
    assert texts(rows) == [(f"{number}.jpg", "好") for number in (0, 1, 3)]
    broken = 512 + -(-len(JPEG) // 512) * 512
    found = errors(rows, tmp_path)
    assert found[0] == f"whole.tar:byte {header}: {broken} broken bytes between two members"
    assert found[1].startswith("whole.tar:2.txt: no image") and len(found) == 2
    (tmp_path / "whole.tar").write_bytes(data[: places["3.jpg"].offset + 10])
    rows = read(tmp_path)
    assert len(texts(rows)) == 3
    assert errors(rows, tmp_path) == [f"whole.tar:3.jpg: the tar is cut off within it: 10 of {len(JPEG)} bytes"]
    (tmp_path / "whole.tar").write_bytes(data[: places["3.jpg"].offset - 512])
    [found] = errors(read(tmp_path), tmp_path)
    assert "the tar is cut off or broken: no end of an archive" in found
    (tmp_path / "whole.tar").write_bytes(data + data)  # tars that were put together by `cat`
    assert len(texts(read(tmp_path))) == 4 and not errors(read(tmp_path), tmp_path)
    members["0.txt"] = "另一个".encode()
    other = write_tar(tmp_path / "whole.tar", members)
    (tmp_path / "whole.tar").write_bytes(data + other)  # of shards that both count from 0
    assert errors(read(tmp_path), tmp_path) == ["whole.tar:0.txt: the key 0 has another 0.txt already"]
    for content, reason in ((b"\x1f\x8b" + data, "packed by gzip"), (b"x" * 2048, "no tar")):
        (tmp_path / "whole.tar").write_bytes(content)
        with pytest.raises(UserError, match=reason):
            read(tmp_path)


def test_a_table_may_name_pictures_of_a_tar_beside_it(tmp_path):
    write_tar(
        tmp_path / "pictures.tar", {"./p/1.png": encode(draw_arrow(), "PNG"), "p/2.png": draw_bad()["truncated PNG"]}
    )
    write_lines(tmp_path / "t.jsonl", [{"image": "p/1.png", "text": "一"}, {"image": "p/3.png", "text": "三"}])
    for path in (tmp_path, tmp_path / "t.jsonl"):
        rows = read(path)
        assert texts(rows) == [("1.png", "一")] and len(errors(rows, tmp_path)) == 1
        assert rows[0]["path"] == f"{tmp_path}/pictures.tar" and rows[0]["offset"] > 0
