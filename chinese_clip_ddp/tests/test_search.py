"""The index: what it finds, what an update embeds and what it leaves, SIGKILL, another process, another model."""

import fcntl
import io
import json
import os
import shutil
import signal
import tarfile
from pathlib import Path

import pytest
import torch
from ranks import server
from small_gallery import build_model, draw_gallery, open_index

import search
from files import UserError
from gallery import Gallery, open_reference, read_gallery
from search import identify_model, join_captions, main, shorten


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder of 12 scenes, and their captions."""
    folder = tmp_path_factory.mktemp("gallery") / "scenes"
    return folder, draw_gallery(folder)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def counted(monkeypatch):
    """How many images were embedded, batch by batch."""
    batches, embed = [], search.embed_pictures

    def count(model, pixels, pictures):
        batches.append(len(pictures))
        return embed(model, pixels, pictures)

    monkeypatch.setattr(search, "embed_pictures", count)
    return batches


def test_images_and_captions_are_found_in_the_order_of_their_cosines(drawn, loaded, tmp_path):
    folder, captions = drawn
    with open_index(tmp_path / "my.db", loaded) as index:
        counts = index.update(read_gallery(str(folder)))
        assert counts["new"] == counts["new_captions"] == 12 and index.count() == {"images": 12, "captions": 12}
        texts = index.embed_texts(captions)
        images = torch.cat(
            [index.embed_image(open_reference(hit.reference)) for hit in index.find_images(texts[:1], 12)]
        )
        scores = [hit.score for hit in index.find_images(texts[:1], 12)]
        assert scores == pytest.approx((images @ texts[0]).tolist(), abs=1e-5) and scores == sorted(
            scores, reverse=True
        )

        picture = open_reference(read_gallery(str(folder)).images.popitem()[1][0])
        (itself, *_) = index.find_images(index.embed_image(picture), 3)
        assert itself.score == pytest.approx(1, abs=1e-5) and itself.captions == [captions[-1]]
        found = index.find_captions(index.embed_image(picture), 12)
        cosines = (texts @ index.embed_image(picture)[0]).tolist()
        assert dict(zip(captions, cosines, strict=True)) == pytest.approx(
            {text: score for score, text in found}, abs=1e-5
        )

        word = captions[3][:2]
        some = index.find_images(texts[:1], 12, f'path like "%/00%" and captions like "{word}%"')
        expected = [number for number in range(10) if captions[number].startswith(word)]
        assert sorted(int(Path(hit.reference.path).stem) for hit in some) == expected
        with pytest.raises(UserError, match="'colour == 1' can't be used: unknown field.* It may ask for path"):
            index.find_images(texts[:1], 3, "colour == 1")
        with pytest.raises(UserError, match="top_k is 0; between 1 and 1000"):
            index.find_images(texts[:1], 0)
        assert index.root() == str(folder / "images")


def test_an_update_embeds_what_is_new_by_content_and_drops_what_has_gone(drawn, loaded, tmp_path, counted):
    folder = shutil.copytree(drawn[0], tmp_path / "scenes")
    table = folder / "gallery.jsonl"
    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    with open_index(tmp_path / "my.db", loaded) as index:
        index.update(read_gallery(str(folder)))
        assert counted == [12]

    shutil.move(folder / "images/000.png", folder / "images/moved.png")
    shutil.copy(folder / "images/001.png", folder / "images/copy.png")
    draw_gallery(tmp_path / "others", 13)
    shutil.copy(tmp_path / "others/images/012.png", folder / "images/new.png")
    (folder / "images/broken.png").write_bytes((folder / "images/001.png").read_bytes()[:100])
    texts = {"moved": rows[0]["text"], "001": rows[1]["text"], "copy": "又一个", "new": "新的"}
    texts |= {"broken": "坏的", "gone": "没有"}
    changed = [{"image": f"images/{name}.png", "text": text} for name, text in texts.items()]
    table.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in changed), encoding="utf-8")
    gallery = read_gallery(str(folder))
    assert [reason.split(": ")[0].split("/")[-1] for reason in gallery.unusable] == ["gallery.jsonl:6", "broken.png"]
    with open_index(tmp_path / "my.db", loaded) as index:
        counts = index.update(gallery)
        kept = {Path(row["path"]).stem: row["captions"].splitlines() for row in index.read_all("images").values()}
        (moved,) = index.find_images(index.embed_texts(["天"]), 5, 'path like "%moved.png"')
    assert moved.captions == [rows[0]["text"]] and moved.reference.path == str(folder / "images/moved.png")
    assert counted == [12, 1]
    assert counts == {
        "new": 1,
        "moved": 2,
        "removed": 10,
        "unchanged": 0,
        "copies": 1,
        "unusable": 2,
        "new_captions": 2,
    }
    assert kept == {"moved": [rows[0]["text"]], "001": [rows[1]["text"], "又一个"], "new": ["新的"]}


def test_photos_without_captions_and_the_members_of_a_tar_are_searched_too(drawn, loaded, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(drawn[0] / "images", photos / "images")
    (photos / "images/003.txt").write_text("三号\n第三张\n", encoding="utf-8")
    (tmp_path / "link").symlink_to(photos)
    gallery = read_gallery(str(tmp_path / "link"))
    assert len(gallery.images) == 12 and gallery.unusable == [] and gallery.copies == 0
    assert [captions for _, captions in gallery.images.values() if captions] == [["三号", "第三张"]]

    with tarfile.open(tmp_path / "my.tar", "w") as tar:
        for name in ("000.png", "001.png"):
            tar.add(drawn[0] / "images" / name, name)
        caption = "零号".encode()
        member = tarfile.TarInfo("000.txt")
        member.size = len(caption)
        tar.addfile(member, io.BytesIO(caption))
    gallery = read_gallery(str(tmp_path / "my.tar"))
    assert sorted(captions for _, captions in gallery.images.values()) == [[], ["零号"]] and gallery.unusable == []
    with open_index(tmp_path / "tar.db", loaded) as index:
        index.update(gallery)
        assert {hit.reference.path for hit in index.find_images(index.embed_texts(["零号"]))} == {
            str(tmp_path / "my.tar")
        }


def fill(path: Path, folder: Path, model_folder: str, log) -> None:
    """In a process of its own: brings an index up to date one image at a time, and tells what is acknowledged."""
    from infer import load_trained_model

    search.BATCH_SIZE = 1
    with open_index(path, load_trained_model(model_folder)) as index:
        log.put(index.count()["images"])
        index.update(read_gallery(str(folder)), lambda done, total: log.put(done))
        log.put("complete")


def start_filling(*arguments):
    log = server.SimpleQueue()
    process = server.Process(target=fill, args=(*arguments, log))
    process.start()
    return process, log


def test_after_sigkill_nothing_is_lost_and_nothing_there_twice(drawn, loaded, tmp_path):
    folder = tmp_path / "scenes"
    draw_gallery(folder, 60)
    model_folder = loaded[0].name_or_path
    process, log = start_filling(tmp_path / "my.db", folder, model_folder)
    assert log.get() == 0
    while log.get() < 20:
        pass
    with pytest.raises(UserError, match=rf"process {process.pid} on .*, since 20\d\d-.* has this index open"):
        open_index(tmp_path / "my.db", loaded)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    process, log = start_filling(tmp_path / "my.db", folder, model_folder)
    start = log.get()
    assert 20 <= start < 60
    steps = [log.get() for _ in range(60 - start)]
    assert steps == list(range(1, 61 - start)), "what was there already was embedded again"
    assert log.get() == "complete"
    process.join()
    with open_index(tmp_path / "my.db", loaded) as index:
        assert index.count() == {"images": 60, "captions": 60}
        assert len(index.find_images(index.embed_texts(["天"]), 1000)) == 60
        assert index.update(read_gallery(str(folder)))["unchanged"] == 60


def test_the_index_of_another_model_is_refused_until_it_is_rebuilt(drawn, loaded, tmp_path):
    model, tokenizer, image_processor = loaded
    gallery = read_gallery(str(drawn[0]))
    with open_index(tmp_path / "my.db", loaded) as index:
        index.update(gallery)
        with pytest.raises(UserError, match=f"process {os.getpid()} .* index.close()"):
            open_index(tmp_path / "my.db", loaded)
    identity = identify_model(*loaded)
    with torch.no_grad():
        model.logit_scale += 1
    try:
        assert identify_model(*loaded) != identity
        with pytest.raises(UserError, match=rf"of the model tiny \({identity}\), this is tiny .* by --rebuild"):
            open_index(tmp_path / "my.db", loaded)
        with open_index(tmp_path / "my.db", loaded, rebuild=True) as index:
            assert index.count() == {"images": 0, "captions": 0}
            assert index.update(gallery)["new"] == 12
    finally:
        with torch.no_grad():
            model.logit_scale -= 1
    with pytest.raises(UserError, match="this is tiny"):
        open_index(tmp_path / "my.db", loaded)


def test_what_cannot_be_an_index_is_told(drawn, loaded, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="ends in .db"):
        open_index(tmp_path / "my.index", loaded)
    (tmp_path / "file.db").write_text("no index")
    with pytest.raises(UserError, match="file.db: can't be opened as an index"):
        open_index(tmp_path / "file.db", loaded)
    open_index(tmp_path / "used.db", loaded).close()
    (tmp_path / "used.db.holder").write_text("process 1, which was killed,")
    with open(tmp_path / "used.db/LOCK") as lock:  # as a program of one's own has it that uses pymilvus
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="used.db: another program has this index open"):
            open_index(tmp_path / "used.db", loaded)
    with pytest.raises(UserError, match="NaN or infinity"):
        search.check_finite(torch.tensor([[torch.nan]]))
    with pytest.raises(UserError, match="there is no such file or folder"):
        read_gallery(str(tmp_path / "nothing"))
    long = "长" * 30_000
    assert len(shorten(long).encode()) < 65_535 and shorten(long).endswith("长…") and shorten("短") == "短"
    assert join_captions(["一 \n二", "三"]) == "一 二\n三"
    with open_index(tmp_path / "my.db", loaded) as index:
        folder = shutil.copytree(drawn[0], tmp_path / "scenes")
        gallery = read_gallery(str(folder))
        (folder / "images/000.png").unlink()  # after it was checked
        counts = index.update(gallery)
        assert counts["new"] == 11 and counts["unusable"] == 1
        shutil.rmtree(folder)
        captions, pictures = index.examples()
        assert len(captions) == 6 and pictures == []
        index.update(Gallery({}, 0, []))
        assert index.find_images(index.embed_texts(["天"])) == [] and index.root() == ""


def test_the_command_builds_asks_and_explains(drawn, loaded, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which gRPC would ask for the index's own server
    model, index = loaded[0].name_or_path, ["--index", str(tmp_path / "my.db")]
    with pytest.raises(SystemExit, match="there is no image in the index yet; fill it by --data_path"):
        main([model, *index, "--text", "天"])
    with pytest.raises(SystemExit, match="nothing is asked: give --data_path, --text or --image"):
        main([model, *index])
    image = str(drawn[0] / "images/005.png")
    main([model, *index, "--data_path", str(drawn[0]), "--image", image, "--top_k", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("12 new, 0 moved, 0 removed, 0 unchanged, 0 copies, 0 unusable, 12 new captions")
    assert lines[1] == f"1.000  {image}  {drawn[1][5]}" and len(lines) == 5
