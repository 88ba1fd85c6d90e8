"""Every format gives the same conversation; what is wrong is named by file and line, and nothing gets lost."""

import base64
import io
import json
import os
import re
import tarfile

import pytest
from small_processor import ask, write_json, write_lines, write_pictures

import images
from images import read_image_bytes
from rows import IMAGE_MARK, UserError, find_again, find_files, identify_files, join_parts, list_unread_files, read_rows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CACHE_DIR", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """A data folder with 0.png to 2.png in images_dl/."""
    write_pictures(tmp_path / "data" / "images_dl", 3)
    return tmp_path / "data"


def read(path) -> list[dict]:
    files = find_files(str(path))
    return list(read_rows(files, identify_files(files)[0]))


def conversation(row: dict) -> tuple[list[dict], list[str]]:
    assert not row["error"], row["error"]
    return json.loads(row["messages"]), [os.path.basename(path) for path, *_ in json.loads(row["images"])]


def errors(rows: list[dict], folder) -> list[str]:
    return [f"{row['source']}: {row['error']}".replace(f"{folder}/", "") for row in rows if row["error"]]


def data_url(folder, name: str) -> str:
    return "data:image/png;base64," + base64.b64encode((folder / "images_dl" / name).read_bytes()).decode()


def test_llavas_chat_json(folder):
    """`image` a string or a list, marks anywhere in the question, rows of text alone among them."""
    turns = [{"from": "human", "value": "<image>\n这是什么？"}, {"from": "gpt", "value": "图。"}]
    more = [{"from": "human", "value": "比较<image>和<image>"}, {"from": "gpt", "value": "一样。"}]
    rows = [
        {"id": 1, "image": "0.png", "conversations": turns},
        {"image": ["0.png", "1.png", "2.png"], "conversations": turns + more},
        {"image": "", "conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "好。"}]},
    ]
    write_json(folder / "chat.json", rows)
    one, several, text = read(folder)
    assert conversation(one) == (ask("<image>\n这是什么？", "图。"), ["0.png"])
    expected = [*ask("<image>\n这是什么？", "图。"), *ask("比较<image>和<image>", "一样。")]
    assert conversation(several) == (expected, ["0.png", "1.png", "2.png"])
    assert conversation(text) == (ask("你好", "好。"), [])
    assert json.loads(one["images"])[0][0] == str(folder / "images_dl" / "0.png")
    assert [row["unused_keys"] for row in (one, several)] == ['["id"]', "[]"]
    assert one["source"] == f"{folder}/chat.json:2" and one["notes"] == "[]"


def test_llama_factorys_demo(folder):
    """The form of mllm_demo.json, with a list of images in the folder that the table lies in."""
    write_pictures(folder / "mllm_demo_data", 2)
    rows = [
        {
            "messages": [
                {"content": "<image>Who are they?", "role": "user"},
                {"content": "Two players.", "role": "assistant"},
                {"content": "What are they doing?", "role": "user"},
                {"content": "Celebrating.", "role": "assistant"},
            ],
            "images": ["mllm_demo_data/0.png"],
        },
        {
            "messages": [
                {"content": "<image><image>他们是谁？", "role": "user"},
                {"content": "两个人。", "role": "assistant"},
            ],
            "images": ["mllm_demo_data/0.png", "mllm_demo_data/1.png"],
        },
    ]
    first, second = read(write_json(folder / "mllm_demo.json", rows))
    assert conversation(first) == (rows[0]["messages"], ["0.png"])
    assert conversation(second) == (rows[1]["messages"], ["0.png", "1.png"])


def test_typed_parts_and_pictures_in_the_row(folder):
    """TRL's parts take the row's pictures in their order, or bring their own: a path, a data URL, a part of a table."""
    part = {"type": "text", "text": "比较"}
    own = [{"type": "image", key: "1.png"} for key in ("image", "path", "url")]
    own += [{"type": "image_url", "image_url": {"url": data_url(folder, "1.png")}}]
    content = [{"type": "image"}, {"type": "text", "text": ""}, part, *own, {"type": "text", "text": "。"}]
    row = {"images": ["0.png"], "messages": [{"role": "user", "content": content}, ask("", "好")[1]]}
    [found] = read(write_lines(folder / "rows.jsonl", [row]))
    messages, names = conversation(found)
    assert messages[0]["content"] == "<image>\n比较" + "<image>" * 4 + "\n。"
    assert names[:4] == ["0.png", "1.png", "1.png", "1.png"]
    kept = json.loads(found["images"])[4]
    assert read_image_bytes(*kept) == (folder / "images_dl" / "1.png").read_bytes()
    assert join_parts([None, None, "\n看", None]) == "<image><image>\n看<image>"


def test_a_file_s_address(folder):
    name = folder / "images_dl" / "1 张.png"
    name.write_bytes((folder / "images_dl" / "1.png").read_bytes())
    [found] = read(write_lines(folder / "rows.jsonl", [{"image": name.as_uri(), "messages": ask("<image>", "好")}]))
    assert json.loads(found["images"])[0][0] == str(name)


def test_tables_of_other_kinds(folder):
    """Parquet with a picture's bytes as data sets on the hub have it, and CSV with JSON in its cells."""
    import pyarrow
    import pyarrow.parquet

    data = (folder / "images_dl" / "2.png").read_bytes()
    row = {"images": [{"bytes": data, "path": "elsewhere.png"}], "messages": ask("<image>？", "好")}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), folder / "rows.parquet")
    [found] = read(folder / "rows.parquet")
    assert conversation(found)[0] == row["messages"] and read_image_bytes(*json.loads(found["images"])[0]) == data
    cells = [json.dumps(value, ensure_ascii=False).replace('"', '""') for value in (["0.png"], row["messages"])]
    (folder / "rows.csv").write_text(f'images,messages\n"{cells[0]}","{cells[1]}"\n', encoding="gb18030")
    assert conversation(read(folder / "rows.csv")[0]) == (row["messages"], ["0.png"])
    (folder / "[图]1.png").write_bytes(data)  # which is no JSON
    (folder / "one.tsv").write_text("image\tinstruction\toutput\n[图]1.png\t看\t好\n", encoding="utf-8")
    assert conversation(read(folder / "one.tsv")[0]) == (ask("<image>\n看", "好"), ["[图]1.png"])


def test_the_only_picture_without_a_mark_goes_before_the_first_question_and_is_noted(folder):
    system = {"role": "system", "content": "看图。"}
    rows = [
        {"image": "0.png", "messages": [system, *ask("这是？", "图"), *ask("再问", "再答")]},
        {"image": "0.png", "messages": ask("", "一张图")},
    ]
    first, alone = read(write_lines(folder / "rows.jsonl", rows))
    assert conversation(first)[0] == [system, *ask("<image>\n这是？", "图"), *ask("再问", "再答")]
    assert first["notes"] == alone["notes"] == '["mark added"]'
    assert conversation(alone)[0][0]["content"] == IMAGE_MARK


def pack(path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_tars(folder):
    """Rows in a tar with its pictures, key.json beside key.jpg, and a table whose pictures are in a tar beside it."""
    data = [(folder / "images_dl" / f"{number}.png").read_bytes() for number in range(3)]
    rows = [{"image": "a.png", "messages": ask("<image>？", "一")}, {"image": "none.png", "messages": ask("？", "二")}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    key = json.dumps({"conversations": ask("<image>看", "三")}).encode()
    pack(folder / "x.tar", {"images/a.png": data[0], "chat.jsonl": lines, "k/7.png": data[1], "k/7.json": key})
    write_lines(folder / "beside.jsonl", [{"image": "k/7.png", "messages": ask("<image>四", "四")}])
    beside, one, missing, sample = read(folder)
    for row, number in ((one, 0), (beside, 1), (sample, 1)):
        assert read_image_bytes(*json.loads(row["images"])[0]) == data[number]
    assert one["source"] == f"{folder}/x.tar:chat.jsonl:1" and sample["source"] == f"{folder}/x.tar:k/7.json:1"
    assert errors([missing], folder)[0].startswith("x.tar:chat.jsonl:2: there is no image none.png")
    # A picture that came later, beside the tar in a folder below.
    assert find_again([("late.png", f"{folder}/images_dl/y.tar:k/7.json:1")], str(folder)) == []
    (folder / "images_dl" / "images").mkdir()
    (folder / "images_dl" / "images" / "late.png").write_bytes(data[0])
    assert find_again([("late.png", f"{folder}/images_dl/y.tar:k/7.json:1")], str(folder)) == ["late.png"]
    whole = (folder / "x.tar").read_bytes()
    (folder / "x.tar").write_bytes(whole[: 512 + len(data[0]) // 2])
    (folder / "beside.jsonl").unlink()
    assert "x.tar:images/a.png: the tar is cut off within it" in errors(read(folder), folder)[0]


def test_what_else_is_in_a_tar_is_named_once(folder):
    """WebDataset's captions; macOS's ._ files are passed over; names that aren't UTF-8 can be written."""
    row = json.dumps({"messages": ask("看", "好")}).encode()
    pack(
        folder / "x.tar",
        {"1.txt": b"1", "a\udcff.json": row, "2.txt": b"2", "._b.json": b"\0", "b.json": row, "c": b""},
    )
    first, second = read(folder)
    assert first["source"] == rf"{folder}/x.tar:a\udcff.json:1" and second["source"] == f"{folder}/x.tar:b.json:1"
    assert json.loads(first["unread"]) == [f"{folder}/x.tar: 2 x .txt", f"{folder}/x.tar: 1 x (no ending)"]
    assert second["unread"] == "[]"
    pack(folder / "x.tar", {"1.txt": b"1"})
    with pytest.raises(UserError, match=r"x\.tar: no row in it\. Not read: .*x\.tar: 1 x \.txt\."):
        read(folder)


BAD = [
    (
        {"images": ["0.png"], "messages": ask("<image><image>", "好")},
        "2 <image> in its text, 1 in images; each mark",
    ),
    ({"images": ["0.png", "1.png"], "messages": ask("<image>", "好")}, "1 <image> in its text, 2 in images; each mark"),
    ({"images": ["0.png"], "image": "1.png", "messages": ask("<image>", "好")}, "images and image are both given"),
    ({"image": "\ud800.png", "messages": ask("<image>", "好")}, r"there is no image \\ud800\.png"),
    ({"images": ["0.png", "1.png"], "messages": ask("看", "好")}, "0 <image> in its text, 2 in images; each mark"),
    ({"messages": ask("<image>看", "好")}, "1 <image> in its text, 0 in images; each mark"),
    (
        {"image": "0.png", "messages": ask("看", "<image>")},
        r"message 2 \(assistant\): <image> stands in what",
    ),
    (
        {"image": "0.png", "system": "<image>", "messages": ask("看", "好")},
        r"message 1 \(system\): <image> stands",
    ),
    (
        {"image": "../outside.png", "messages": ask("<image>", "好")},
        "the image ../outside.png lies outside",
    ),
    (
        {"image": "{outside}", "messages": ask("<image>", "好")},
        "the image /.*outside.png lies outside",
    ),
    ({"image": "link.png", "messages": ask("<image>", "好")}, "the image link.png lies outside of the data folder"),
    ({"image": "linked/outside.png", "messages": ask("<image>", "好")}, "the image linked/outside.png lies outside of"),
    ({"image": "9.png", "messages": ask("<image>", "好")}, "there is no image 9.png; looked in "),
    ({"image": "x\0y.png", "messages": ask("<image>", "好")}, "there is no image x"),
    ({"image": "https://a.b/c.png", "messages": ask("<image>", "好")}, "the image is an address .*: download it first"),
    ({"image": "data:image/png;base64,%%", "messages": ask("<image>", "好")}, "a data URL of broken Base64"),
    ({"image": "data:image/svg+xml,<svg/>", "messages": ask("<image>", "好")}, "a data URL without Base64"),
    (
        {"image": 7, "messages": ask("<image>", "好")},
        "an image is given as its path, .* this is '7",
    ),
    ({"image": {"id": 3}, "messages": ask("<image>", "好")}, "an image is given as its path"),
    (
        {"image": "0.png", "messages": ask("<image>", "好")[::-1]},
        "message 1: roles in the wrong order, assistant",
    ),
    ({"image": "0.png", "messages": ask("<image>", " ")}, r"message 2 \(assistant\): the text is empty"),
    ({"messages": ask(" ", "好")}, r"message 1 \(user\): the text is empty"),
    ({"image": "0.png", "messages": ask("<image>", "好")[:1]}, "no assistant turn"),
    ({"image": "0.png", "messages": [*ask("<image>", "好"), ask("呢", "")[0]]}, "the last message is the user's"),
    ({"video": "a.mp4", "messages": ask("看", "好")}, "video: only pictures and text can be trained on here"),
    ({"audios": ["a.wav"], "messages": ask("听", "好")}, "audios: only pictures and text"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, r"message 1 \(user\): a part .* is video; only"),
    ({"messages": [{"role": "user", "content": 3}]}, r"message 1 \(user\): the text is int, not a string"),
    ({"messages": [{"role": "tool", "content": "3"}]}, "a tool call or its result; train_qwen trains on those"),
    ({"messages": [{"role": "robot", "content": "3"}]}, "unknown role 'robot'"),
    ({"messages": ask("好\ud83d", "好")}, "a lone surrogate"),
    ({"image": "0.png", "caption": "好"}, "none of messages.*; chinese_clip_ddp trains on pictures and their captions"),
    ({"prompt": "问", "chosen": "好", "rejected": "坏"}, "a preference row .*baichuan2_dpo"),
    ({"image": "0.png", "messages": "看"}, "messages holds no JSON"),
    (["看"], "a row is a JSON object, this is a list"),
]


def test_every_bad_row_is_named_by_file_and_line(folder):
    """Among good rows, which stay."""
    outside = folder.parent / "outside.png"
    outside.write_bytes((folder / "images_dl" / "0.png").read_bytes())
    (folder / "link.png").symlink_to(outside)
    (folder / "linked").symlink_to(folder.parent)
    good = {"image": "0.png", "messages": ask("<image>", "好")}
    lines = [json.dumps(each).replace("{outside}", str(outside)) for bad, _ in BAD for each in (bad, good)]
    (folder / "rows.jsonl").write_text("\n".join([*lines, "{no JSON"]))
    rows = read(folder)
    assert len(rows) == len(lines) + 1 and all(not row["error"] for row in rows[1::2])
    for number, (_, reason) in enumerate(BAD):
        row = rows[2 * number]
        assert row["source"] == f"{folder}/rows.jsonl:{2 * number + 1}"
        assert re.search(reason, row["error"]), row["error"]
        assert row["raw"] and row["images"] == "[]"
    assert rows[-1]["error"].startswith("no JSON")


def test_missing_pictures_that_have_come_are_found_again_and_other_files_are_listed(folder):
    [row] = read(write_lines(folder / "rows.jsonl", [{"image": r"deep\9.png", "messages": ask("<image>", "好")}]))
    pair = (row["missing"], row["source"])
    assert row["error"].startswith("there is no image deep/9.png") and find_again([pair], str(folder)) == []
    (folder / "deep").mkdir()
    (folder / "deep" / "9.png").write_bytes(b"1")
    assert find_again([pair], str(folder)) == [row["missing"]]
    assert conversation(read(folder)[0])[1] == ["9.png"]
    for name in ("captions.txt", "readme.md", "rows.docx", "scenes.txt"):
        (folder / name).write_text("")
    assert list_unread_files(str(folder)) == [f"{folder}/captions.txt", f"{folder}/rows.docx"]
