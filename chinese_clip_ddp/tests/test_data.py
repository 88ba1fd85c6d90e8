"""Pairs are checked, encoded and cached by content; no picture stands in training and in validation."""

import base64
import json
import multiprocessing
import os

import numpy as np
import pytest
from made_pairs import data_settings, make_pictures, make_tokenizer, write_table, write_tar

import data
import images
from data import caption_number, column, load_encoded, load_splits
from odd_images import draw_bad, draw_good
from rows import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for module in (images, data):
        monkeypatch.setattr(module, "CACHE_DIR", tmp_path / "cache")


@pytest.fixture
def opened(monkeypatch):
    """The pictures that are opened."""
    paths, read = [], images.read_image_bytes
    monkeypatch.setattr(images, "read_image_bytes", lambda *place: paths.append(place) or read(*place))
    return paths


def test_captions_keep_the_special_tokens_and_cut_ones_are_counted(tokenizer, tmp_path):
    rows = make_pictures(tmp_path / "d", 3)
    rows[1]["text"] = "红" * 5000
    train, galleries, summary = load_splits(
        data_settings(write_table(tmp_path / "d/t.jsonl", rows)), tokenizer, 0, None
    )
    assert tokenizer.convert_ids_to_tokens(train["input_ids"][1]) == ["[CLS]", *["红"] * 14, "[SEP]"]
    assert train["cut"][:] == [False, True, False] and summary["captions_cut"] == 1 and not galleries
    assert summary["tokens"] == column(train, "length").sum() == 4 + 16 + 4
    train = load_splits(data_settings(tmp_path / "d", max_seq_length=3), tokenizer, 0, None)[0]
    assert column(train, "length").tolist() == [3, 3, 3]
    with pytest.raises(UserError, match="give --max_seq_length"):
        load_splits(data_settings(tmp_path / "d"), make_tokenizer(tmp_path / "t", int(1e30)), 0, None)


def test_equal_pictures_and_equal_captions_have_equal_numbers(tokenizer, tmp_path):
    rows = make_pictures(tmp_path / "d", 3)
    (tmp_path / "d/copy.png").write_bytes((tmp_path / "d/0.png").read_bytes())
    rows += [{"image": "copy.png", "text": " 图１ "}, {"image": "2.png", "text": "图 2"}]
    train, _, summary = load_splits(data_settings(write_table(tmp_path / "d/t.jsonl", rows)), tokenizer, 0, None)
    ids, captions = column(train, "image_id"), column(train, "caption_id")
    assert ids[0] == ids[3] and ids[2] == ids[4] and len(set(ids)) == 3 == summary["images"]
    assert captions[1] == captions[3] and captions[2] == captions[4] and summary["duplicate_captions"] == 2
    assert caption_number("a b") == caption_number("ab") != caption_number("abc")


def test_bad_pictures_stop_the_run_or_are_skipped_counted_and_written(tokenizer, tmp_path):
    rows = make_pictures(tmp_path / "d", 9)
    for number, kind in ((1, "truncated PNG"), (2, "no picture"), (3, "20000 x 3")):
        (tmp_path / f"d/{number}.png").write_bytes(draw_bad()[kind])
    for number, kind in ((4, "CMYK"), (5, "animated"), (6, "16 bit"), (7, "1 x 1")):
        (tmp_path / f"d/{number}.png").write_bytes(draw_good()[kind])
    rows[8]["text"] = ""
    path = write_table(tmp_path / "d/t.jsonl", rows)
    with pytest.raises(UserError, match=r"4 of 9 rows.*\n.*t.jsonl:2: image 1.png: PNG, broken or truncated") as error:
        load_splits(data_settings(path), tokenizer, 0, None)
    assert "t.jsonl:4: image 3.png: 20000 x 3: one side" in str(error.value) and ":9: the caption" in str(error.value)
    report = tmp_path / "bad_rows.jsonl"
    train, _, summary = load_splits(data_settings(path, skip_bad_rows=True), tokenizer, 0, str(report))
    assert (len(train), summary["bad_rows"], summary["animated_images"]) == (5, 4, 1)
    written = [json.loads(line)["source"] for line in report.read_text(encoding="utf-8").splitlines()]
    assert written == [f"{path}:{line}" for line in (2, 3, 4, 9)]


def test_broken_base64_is_named_by_its_line(tokenizer, tmp_path):
    coded = base64.b64encode(draw_good()["JPEG"]).decode()
    (tmp_path / "a_imgs.tsv").write_text(f"1\t{coded}\n2\t{coded[:-101]}*{coded[-100:]}\n3\t{coded[:-100]}\n")
    write_table(tmp_path / "a_texts.jsonl", [{"text_id": 1, "text": "好", "image_ids": [1, 2, 3]}])
    rows, _ = load_encoded(str(tmp_path / "a_texts.jsonl"), tokenizer, 16)
    assert not rows[0]["error"]
    assert rows[1]["error"].startswith(f"image {tmp_path}/a_imgs.tsv:2: broken Base64")
    assert rows[2]["error"].startswith(f"image {tmp_path}/a_imgs.tsv:3: JPEG, broken or truncated")


def test_a_second_run_opens_no_picture_and_what_has_changed_is_seen(tokenizer, tmp_path, opened):
    rows = make_pictures(tmp_path / "d", 5) + [{"image": "late.png", "text": "好"}]
    path = write_table(tmp_path / "d/t.jsonl", rows)
    first, content_hash = load_encoded(path, tokenizer, 16)
    assert len(opened) == 5 and first["error"][5].startswith("there is no image late.png")
    assert load_encoded(path, tokenizer, 16)[1] == content_hash and len(opened) == 5
    assert load_encoded(path, tokenizer, 8)[1] != content_hash and len(opened) == 5  # other lengths, known pictures
    os.utime(tmp_path / "d/0.png")
    assert load_encoded(path, tokenizer, 16)[1] == content_hash and len(opened) == 6
    (tmp_path / "d/1.png").write_bytes(draw_good()["JPEG"])
    (tmp_path / "d/late.png").write_bytes(draw_good()["CMYK"])
    changed, other_hash = load_encoded(path, tokenizer, 16)
    assert other_hash != content_hash and changed["image_id"][1] != first["image_id"][1] and not changed["error"][5]
    (tmp_path / "d/images").mkdir()
    (tmp_path / "d/2.png").rename(tmp_path / "d/images/2.png")
    assert load_encoded(path, tokenizer, 16)[1] == other_hash
    (tmp_path / "d/images/2.png").unlink()
    assert "there is no image 2.png" in load_encoded(path, tokenizer, 16)[0]["error"][2]


def test_two_runs_at_once_open_each_picture_once(tokenizer, tmp_path, monkeypatch):
    path = write_table(tmp_path / "d.jsonl", make_pictures(tmp_path / "images", 6))
    opened, judge = multiprocessing.Value("i", 0), images.judge
    monkeypatch.setattr(images, "judge", lambda data: add_one(opened) or judge(data))
    runs = [multiprocessing.Process(target=load_encoded, args=(path, tokenizer, 16)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0] and opened.value == 6


def add_one(value) -> None:
    with value.get_lock():
        value.value += 1


def test_errors_of_a_whole_file_come_as_they_are(tokenizer, tmp_path):
    for name, content, reason in (("a.jsonl", b"\n", "no row in it"), ("b.tar", b"x" * 2048, "no tar")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=reason):
            load_encoded(str(tmp_path / name), tokenizer, 16)


def test_data_size_checks_no_more_than_it_reads(tokenizer, tmp_path, opened):
    path = write_table(tmp_path / "d.jsonl", make_pictures(tmp_path / "images", 6))
    assert len(load_splits(data_settings(path, data_size=2), tokenizer, 0, None)[0]) == 2 == len(opened)


def test_splits_share_no_picture_by_content(tokenizer, tmp_path):
    rows = make_pictures(tmp_path / "d", 10)
    for number in range(10):
        (tmp_path / f"d/copy{number}.png").write_bytes((tmp_path / f"d/{number}.png").read_bytes())
    rows += [{"image": f"copy{number}.png", "text": f"好{number}"} for number in range(10)]
    path = write_table(tmp_path / "d/t.jsonl", rows)
    train, galleries, summary = load_splits(data_settings(path, validation_split=0.3), tokenizer, 0, None)
    assert not np.isin(column(train, "image_id"), column(galleries["validation"], "image_id")).any()
    assert (len(train), summary["validation_rows"]) == (14, 6)
    again = load_splits(data_settings(path, validation_split=0.3), tokenizer, 1, None)[1]["validation"]
    assert set(again["source"][:]) != set(galleries["validation"]["source"][:])
    with pytest.raises(UserError, match="no row is left.*--validation_split 0"):
        load_splits(data_settings(path, validation_split=1.0), tokenizer, 0, None)


def test_galleries_and_what_their_copies_cost(tokenizer, tmp_path):
    rows = make_pictures(tmp_path / "d", 6)
    path = write_table(tmp_path / "d/t.jsonl", rows)
    for name, numbers in (("new", (0, 1)), ("old_seen", (2, 3))):
        copies = make_pictures(tmp_path / "eval", 6)
        write_table(tmp_path / f"eval/{name}.jsonl", [copies[number] for number in numbers])
    settings = data_settings(path, eval_data_path=str(tmp_path / "eval"))
    train, galleries, summary = load_splits(settings, tokenizer, 0, None)
    assert {name: len(gallery) for name, gallery in galleries.items()} == {"new": 2, "old_seen": 2}
    assert len(train) == 4 and summary["copies_of_validation_rows_removed"] == 2
    (tmp_path / "eval/NEW2.JSONL").write_bytes((tmp_path / "eval/new.jsonl").read_bytes())
    write_tar(tmp_path / "eval/more.tar", {"1.jpg": draw_good()["JPEG"], "1.txt": b"x"})
    write_tar(tmp_path / "eval/pictures.tar", {"1.jpg": draw_good()["JPEG"]})
    (tmp_path / "eval/new.csv").write_text("image,text\n1.png,好\n", encoding="utf-8")
    assert sorted(load_splits(settings, tokenizer, 0, None)[1]) == ["NEW2", "more", "new", "new.jsonl", "old_seen"]
    settings.eval_data_path = str(tmp_path / "eval/new.jsonl")
    assert list(load_splits(settings, tokenizer, 0, None)[1]) == ["new"]


def test_a_folder_of_training_and_test_parts_is_not_trained_on_as_a_whole(tokenizer, tmp_path):
    folder = tmp_path / "d"
    rows = make_pictures(folder / "images", 4)
    train, valid = (write_table(folder / f"{name}.jsonl", rows) for name in ("train", "valid"))
    with pytest.raises(UserError, match="holds train.jsonl and valid.jsonl, .*--eval_data_path .*/valid.jsonl"):
        load_splits(data_settings(folder), tokenizer, 0, None)
    assert len(load_encoded(train, tokenizer, 16)[0]) == 4
    os.rename(valid, folder / "valley.jsonl")
    assert len(load_encoded(str(folder), tokenizer, 16)[0]) == 8


def test_what_was_not_used_is_reported(tokenizer, tmp_path):
    rows = make_pictures(tmp_path / "d/images", 4)[:3]
    rows[0] |= {"url": "u", "group": "g"}
    (tmp_path / "d/notes.md").write_text("x")
    summary = load_splits(data_settings(write_table(tmp_path / "d/t.jsonl", rows)), tokenizer, 0, None)[2]
    assert summary["files_not_read"] == [] and summary["images_not_used"] == 0  # a single file was given
    summary = load_splits(data_settings(tmp_path / "d"), tokenizer, 0, None)[2]
    assert summary["unused_keys"] == {"url": 1} and summary["files_not_read"] == [f"{tmp_path}/d/notes.md"]
    assert (summary["images_not_used"], summary["groups"]) == (1, 1)
