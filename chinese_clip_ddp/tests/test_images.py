"""Every kind of picture becomes what one sees, or is refused with its reason; each is read and judged once."""

import base64
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from PIL import Image, ImageFile

import images
from images import ImageError, Reference, check_images, load_image, read_image_bytes
from odd_images import SIZE, draw_arrow, draw_bad, draw_good, encode, turned_photo


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CACHE_DIR", tmp_path / "cache")


def write_pictures(folder, count: int) -> list[Reference]:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return [Reference(str(folder / f"{number}.png")) for number in range(count)]


@pytest.mark.parametrize("kind", [kind for kind in draw_good() if kind not in ("16 bit", "1 x 1")])
def test_every_kind_shows_the_arrow_on_white(kind):
    image = load_image(draw_good()[kind])
    assert image.mode == "RGB" and image.size == SIZE
    seen, expected = np.asarray(image).astype(int), np.asarray(draw_arrow()).astype(int)
    if kind in ("grey + alpha", "1 bit"):  # the ground is white; the arrow has lost its colour
        seen, expected = seen[:, :10], expected[:, :10]
    assert np.abs(seen - expected).mean() < 12


def test_sixteen_bits_are_scaled_and_one_pixel_is_a_picture():
    ramp = np.asarray(load_image(draw_good()["16 bit"]))
    assert np.array_equal(ramp[0, :, 0], np.round(np.linspace(0, 65535, SIZE[0]).astype(np.uint16) / 257))
    assert load_image(draw_good()["1 x 1"]).getpixel((0, 0)) == (200, 30, 30)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "an empty file"),
        ("no picture", "no picture of JPEG, PNG"),
        ("page", "no picture of JPEG, PNG"),
        ("EPS", "no picture of JPEG, PNG"),
        ("truncated JPEG", "JPEG, broken or truncated"),
        ("truncated PNG", "PNG, broken or truncated"),
        ("truncated GIF", "GIF, broken or truncated"),
        ("damaged PNG", "PNG, broken or truncated"),
        ("20000 x 3", "20000 x 3: one side is more than 100 times the other"),
        ("100 million", "10000 x 10000: more than 80,000,000 pixels"),
        ("float TIFF", "its values are of F"),
    ],
)
def test_what_is_no_whole_picture_says_why(kind, reason, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as another library may have set it
    with pytest.raises(ImageError, match=reason):
        load_image(draw_bad()[kind])


def test_broken_exif_leaves_the_picture_as_it_is():
    broken = turned_photo(6).replace(b"Exif\0\0MM\0*", b"Exif\0\0XX\0*")
    assert broken != turned_photo(6) and load_image(broken).size == SIZE[::-1]


def test_a_picture_is_read_from_a_part_of_a_file_and_from_base64(tmp_path):
    data = draw_good()["JPEG"]
    coded = base64.urlsafe_b64encode(data)
    (tmp_path / "file").write_bytes(b"12345" + data + b"12345" + coded + b"\n")
    path = str(tmp_path / "file")
    assert read_image_bytes(path, 5, len(data)) == data
    assert read_image_bytes(path, 10 + len(data), len(coded), "base64") == data
    with pytest.raises(ImageError, match="broken Base64"):
        read_image_bytes(path, 11 + len(data), len(coded) - 3, "base64")


def test_a_second_check_opens_no_picture_and_a_changed_one_is_read_again(tmp_path, monkeypatch):
    references = write_pictures(tmp_path / "pictures", 5)
    (tmp_path / "pictures/1.png").write_bytes(draw_bad()["truncated PNG"])
    (tmp_path / "pictures/2.png").write_bytes(draw_good()["animated"])
    (tmp_path / "pictures/4.png").write_bytes((tmp_path / "pictures/3.png").read_bytes())
    first = check_images(references + [Reference(str(tmp_path / "none.png"))])
    assert [bool(verdict.reason) for verdict in first] == [False, True, False, False, False, True]
    assert first[2].animated and first[3].sha256 == first[4].sha256 and "No such file" in first[5].reason
    opened, decoded = [], []
    monkeypatch.setattr(images, "read_image_bytes", lambda *place: opened.append(place[0]) or read_image_bytes(*place))
    monkeypatch.setattr(images, "load_image", lambda data: decoded.append(data) or load_image(data))
    assert check_images(references) == first[:5] and not opened
    os.rename(tmp_path / "pictures/3.png", tmp_path / "pictures/5.png")  # a known content under another name
    (tmp_path / "pictures/1.png").write_bytes(draw_good()["JPEG"])
    moved = check_images([references[1], Reference(str(tmp_path / "pictures/5.png"))])
    assert not moved[0].reason and moved[1] == first[3] and len(opened) == 2 and len(decoded) == 1


def test_two_checks_at_once_agree_and_one_that_is_killed_leaves_what_it_knows(tmp_path):
    references = write_pictures(tmp_path / "pictures", 600)
    (tmp_path / "pictures/7.png").write_bytes(b"nothing")
    both = [multiprocessing.Process(target=check_images, args=(references,)) for _ in range(2)]
    for each in both:
        each.start()
    time.sleep(0.1)
    os.kill(both[0].pid, signal.SIGKILL)
    for each in both:
        each.join()
    assert both[1].exitcode == 0
    verdicts = check_images(references)
    assert [number for number, verdict in enumerate(verdicts) if verdict.reason] == [7]
    assert len({verdict.sha256 for verdict in verdicts}) == 600


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


def test_an_error_in_a_process_comes_to_the_user(two_cores):
    with pytest.raises(images.UserError, match="number 3"):
        images.in_processes(fail, list(range(600)), (), "tried")


def test_a_process_that_is_killed_is_said(two_cores):
    with pytest.raises(images.UserError, match="tried: a process ended with -9"):
        images.in_processes(die, list(range(600)), (), "tried")


def die(chunk):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(chunk):
    if 3 in chunk:
        raise images.UserError("number 3")


def test_a_jpeg_of_two_pictures_is_no_animation():
    pair = encode(draw_arrow(), "MPO", save_all=True, append_images=[draw_arrow()])
    assert images.judge(pair) == ("", False)
