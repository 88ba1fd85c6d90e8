"""Pairs survive the way through every form; a conversion that fails leaves nothing behind."""

import pyarrow
import pyarrow.parquet
import pytest
from made_pairs import make_pictures, write_table

import convert_data
import images
from convert_data import convert, read_pairs
from odd_images import draw_bad, draw_good
from rows import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CACHE_DIR", tmp_path / "cache")


def content(path) -> list[tuple]:
    """What a training would see of the pairs, in any order."""
    rows = read_pairs(str(path), "zh", False)[0]
    return sorted((row["sha256"], row["text"], row["group"], row["kind"], tuple(row["choices"])) for row in rows)


def test_the_way_through_every_form_and_back(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_data, "PAIRS_OF_A_TAR", 3)
    rows = make_pictures(tmp_path / "start", 5)
    rows[1] |= {"group": "g", "kind": "colour", "choices": ["红", "绿"]}
    rows += [{"image": "1.png", "text": ["红", "图2"]}, {"image": "4.png", "text": "图2"}]
    (tmp_path / "start/copy.png").write_bytes((tmp_path / "start/0.png").read_bytes())
    (tmp_path / "start/2.png").write_bytes(draw_good()["CMYK"])
    write_table(tmp_path / "start/t.jsonl", [*rows, {"image": "copy.png", "text": "图0"}])
    before, expected = tmp_path / "start", content(tmp_path / "start")
    for form in ("tar", "chinese-clip", "jsonl", "tar", "jsonl", "chinese-clip"):
        after = tmp_path / f"{before.name}-{form}"
        said = convert(str(before), str(after), form)
        assert content(after) == expected and said == f"{after}: 9 pairs of 5 different images; 0 bad rows left out"
        before = after
    assert sorted(path.name for path in (tmp_path / "start-tar").iterdir()) == ["00000.tar", "00001.tar"]
    assert len(list((tmp_path / "start-tar-chinese-clip-jsonl/images").iterdir())) == 5
    with pytest.raises(UserError, match="is there already"):
        convert(str(before), str(before), "tar")


def test_bad_rows_stop_it_or_are_left_out_and_nothing_is_left_behind(tmp_path):
    rows = make_pictures(tmp_path / "d", 3)
    (tmp_path / "d/1.png").write_bytes(draw_bad()["truncated PNG"])
    path = write_table(tmp_path / "d/t.jsonl", [*rows, {"image": "none.png", "text": "好"}])
    with pytest.raises(
        UserError, match=r"2 of 4 rows are bad(.|\n)*t.jsonl:2: image 1.png: PNG, broken(.|\n)*:4: there"
    ):
        convert(path, str(tmp_path / "out"), "tar")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["cache", "d"]
    assert "2 pairs of 2 different images; 2 bad rows left out" in convert(
        path, str(tmp_path / "out"), "tar", skip_bad_rows=True
    )


def test_parquet_with_pictures_inside(tmp_path):
    pictures = [{"bytes": draw_good()[kind], "path": None} for kind in ("JPEG", "palette")]
    table = pyarrow.table({"image": pictures, "caption": ["一", "二"], "url": ["a", None]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    said = convert(str(tmp_path / "d.parquet"), str(tmp_path / "out"), "jsonl")
    assert "; keys that are not carried over: url; 0 bad rows" in said
    rows = read_pairs(str(tmp_path / "out"), "zh", False)[0]
    assert [(row["image"], row["text"]) for row in rows] == [
        ("images/000000000.jpg", "一"),
        ("images/000000001.png", "二"),
    ]
