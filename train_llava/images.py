"""Bytes -> a picture in RGB, or the reason why not; every picture is checked once, by content, before a run.

A batch that a broken picture makes smaller stops ranks that wait for each other, so none is found out while training.
"""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import base64
import binascii
import contextlib
import hashlib
import io
import multiprocessing
import os
import sqlite3
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageFile

from files import UserError

CACHE_DIR = Path(__file__).parent / "cache_data"
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
Image.init()
# No EPS, PDF or WMF: Pillow hands them on to other programs.
FORMATS = [name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF") if name in Image.OPEN]
MAX_PIXELS = 80_000_000
MAX_ASPECT_RATIO = 100  # 20,000 x 3 would be resized to 1,493,333 x 224 on its way to a square
WHITE = (255, 255, 255, 255)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
CHUNK = 64  # pictures that a process works on between two looks at what goes on around it

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS refuses them with a reason


class ImageError(UserError):
    """Why a picture can't be used."""


class Reference(NamedTuple):
    """Where a picture's bytes are: a file, or a part of one (a tar's member, a line's Base64)."""

    path: str
    offset: int = 0
    size: int = -1  # to the end of the file
    coding: str = ""  # "base64", or the bytes as they are


class Verdict(NamedTuple):
    """What was found out about a picture: why it can't be used ("" if it can), its content's SHA-256."""

    reason: str
    sha256: str
    animated: bool


def read_image_bytes(path: str, offset: int = 0, size: int = -1, coding: str = "") -> bytes:
    """The bytes of a `Reference`; raises ImageError where there are none, or no Base64."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise ImageError(f"can't be read: {error.strerror}") from None
    if coding == "base64":
        try:
            return base64.b64decode(data.translate(bytes.maketrans(b"-_", b"+/")), validate=True)
        except binascii.Error as error:
            raise ImageError(f"broken Base64: {error}") from None
    return data


def load_image(data: bytes) -> Image.Image:
    """The picture as one sees it, in RGB: turned as EXIF says, on white where it is transparent, 16 bits scaled to 8.

    Of an animation the first frame.

    Raises:
        ImageError: no picture, a broken or truncated one, one of too many pixels, or too narrow a one.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # where another library has set it, damaged pictures are learnt as grey
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ImageError(f"more than {MAX_PIXELS:,} pixels; make it smaller") from None
    except Exception:  # Pillow's readers raise nearly everything
        kind = "an empty file" if not data else f"no picture of {', '.join(FORMATS)}, or broken from its first bytes on"
        raise ImageError(kind) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height}: more than {MAX_PIXELS:,} pixels; make it smaller")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(f"{width} x {height}: one side is more than {MAX_ASPECT_RATIO} times the other; crop it")
    try:
        image.load()
        return to_rgb(turn(image))
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"{image.format}, broken or truncated: {error}") from None


def turn(image: Image.Image) -> Image.Image:
    """The picture, turned as its EXIF orientation says; as it is where there is none, or none that can be read."""
    orientation = None
    with contextlib.suppress(Exception):  # broken EXIF is no reason to refuse a picture that every viewer shows
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB.

    Plain `convert("RGB")` shows what transparency hides (a palette's first colour, often green or black), and makes
    16-bit grey white.

    Raises:
        ImageError: numbers without a known range.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ImageError(f"its values are of {image.mode}, whose range isn't known; save it with 8 bits")
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")
    return image.convert("RGB")


def judge(data: bytes) -> tuple[str, bool]:
    """Why a picture can't be used ("" if it can), and whether it is an animation."""
    try:
        load_image(data)
    except ImageError as error:
        return str(error), False
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    # An MPO is a photo with a second one for depth or light. Formats of one frame have no such attribute.
    return "", image.format != "MPO" and getattr(image, "is_animated", False)


def open_verdicts() -> sqlite3.Connection:
    """The table of verdicts, whose name says by which code; several processes may write, and any of them be killed."""
    code = Path(__file__).read_bytes() + PIL.__version__.encode()
    CACHE_DIR.mkdir(exist_ok=True)
    table = sqlite3.connect(CACHE_DIR / f"images-{hashlib.sha256(code).hexdigest()[:8]}.sqlite", timeout=600)
    table.execute(
        "CREATE TABLE IF NOT EXISTS files (path TEXT, offset INT, size INT, coding TEXT, file_size INT, ctime_ns INT,"
        " sha256 TEXT, PRIMARY KEY (path, offset, size, coding)) WITHOUT ROWID"
    )
    table.execute("CREATE TABLE IF NOT EXISTS verdicts (sha256 TEXT PRIMARY KEY, reason TEXT, animated INT)")
    return table


def look_up(references: list[Reference], stats: dict[str, tuple[int, int]]) -> list[Verdict | None]:
    """The known verdicts, None for a picture that isn't known, or whose file has changed since."""
    question = (
        "SELECT reason, verdicts.sha256, animated FROM files JOIN verdicts USING (sha256) WHERE path = ? AND offset = ?"
        " AND files.size = ? AND coding = ? AND file_size = ? AND ctime_ns = ?"
    )
    with contextlib.closing(open_verdicts()) as table:
        found = (table.execute(question, (*one, *stats[one.path])).fetchone() for one in references)
        return [Verdict(row[0], row[1], bool(row[2])) if row else None for row in found]


def check_some(references: list[Reference], stats: dict[str, tuple[int, int]]) -> None:
    """Reads some pictures and writes their verdicts; a content that is known already isn't decoded again."""
    with contextlib.closing(open_verdicts()) as table:
        files, verdicts = [], {}
        for one in references:
            try:
                data = read_image_bytes(*one)
            except ImageError:
                continue  # `explain` says why, each time anew: it may be mended without any change of the file
            sha256 = hashlib.sha256(data).hexdigest()
            files.append((*one, *stats[one.path], sha256))
            known = table.execute("SELECT 1 FROM verdicts WHERE sha256 = ?", (sha256,)).fetchone()
            if sha256 not in verdicts and not known:
                verdicts[sha256] = judge(data)
        with table:
            rows = [(sha256, *verdict) for sha256, verdict in verdicts.items()]
            table.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", rows)
            table.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", files)


def read_stats(references: list[Reference]) -> dict[str, tuple[int, int]]:
    """Size and time of change (ctime: of rights and names, too) of each file; (-1, -1) for one that isn't there."""
    stats = {}
    for path in {one.path for one in references}:
        try:
            found = os.stat(path)
            stats[path] = (found.st_size, found.st_ctime_ns)
        except OSError:
            stats[path] = (-1, -1)
    return stats


def explain(reference: Reference) -> Verdict:
    """Why a picture has no verdict."""
    try:
        read_image_bytes(*reference)
    except ImageError as error:
        return Verdict(str(error), "", False)
    return Verdict("it was changed while it was being checked; start again", "", False)


def check_images(references: list[Reference]) -> list[Verdict]:
    """A verdict for each picture. What was checked once is known by path, size and time of change, and not opened."""
    stats = read_stats(references)
    unknown = [one for one, verdict in zip(references, look_up(references, stats), strict=True) if verdict is None]
    if unknown:
        in_processes(check_some, list(dict.fromkeys(unknown)), (stats,), "images checked")
    return [verdict or explain(one) for one, verdict in zip(references, look_up(references, stats), strict=True)]


def run_share(work: Callable, items: list, arguments: tuple, parent: int, number: int, done, errors) -> None:
    """Works on a share in chunks, until it is done or the run that asked for it is gone."""
    for start in range(0, len(items), CHUNK):
        if os.getppid() != parent:
            return
        try:
            work(items[start : start + CHUNK], *arguments)
        except UserError as error:
            errors.put(str(error))
            return
        done[number] = min(start + CHUNK, len(items))


def in_processes(work: Callable, items: list, arguments: tuple, title: str) -> None:
    """Calls `work(chunk of items, *arguments)` on all items, in one process a core where there are many.

    Raises:
        UserError: as `work` does, or a process was killed.
    """
    count = min(len(os.sched_getaffinity(0)), len(items) // (4 * CHUNK))
    if count < 2:
        for start in range(0, len(items), CHUNK):
            work(items[start : start + CHUNK], *arguments)
        return
    done, errors = multiprocessing.Array("q", count, lock=False), multiprocessing.SimpleQueue()
    workers = [
        multiprocessing.Process(
            target=run_share, args=(work, items[number::count], arguments, os.getpid(), number, done, errors)
        )
        for number in range(count)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        while worker.exitcode is None:
            worker.join(timeout=20)
            if worker.exitcode is None:
                print(f"{title}: {sum(done):,} of {len(items):,}", file=sys.stderr, flush=True)
    if not errors.empty():
        raise UserError(errors.get())
    killed = [worker.exitcode for worker in workers if worker.exitcode]
    if killed:
        raise UserError(f"{title}: a process ended with {killed[0]} (-9: killed, as for want of memory); start again.")
