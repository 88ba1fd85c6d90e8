"""The picture that a row names -> the place of its bytes: in the data folder, in a tar there, or in the row itself."""

import base64
import binascii
import functools
import hashlib
import os
import re
import stat
from pathlib import Path
from urllib.parse import unquote

import images
from files import UserError
from images import Reference
from tars import read_members

FOLDERS = ("", "images_dl", "images")  # where the pictures of a table are looked for, beside it and in the data folder
SOURCE_KEYS = ("bytes", "image", "image_url", "path", "url")  # of an object that holds a picture, or names it


class ImageNotFound(UserError):
    """There is no picture of that name, or none that may be read; that may change while the table stays the same."""

    def __init__(self, reason: str, name: str):
        super().__init__(reason)
        self.name = name


def keep_bytes(data: bytes) -> Reference:
    """Writes a picture that stands in a row into the cache, by its content; its place there."""
    name = hashlib.sha256(data).hexdigest()
    path = images.CACHE_DIR / "pictures" / name[:2] / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"{name}.{os.getpid()}")
        scratch.write_bytes(data)
        scratch.rename(path)
    return Reference(str(path.resolve()))


def read_data_url(address: str) -> bytes:
    """The bytes in a data URL; raises UserError where they are no Base64."""
    head, _, data = address.partition(",")
    if not head.endswith(";base64"):
        raise UserError(f"the image is a data URL without Base64 ({address[:40]}...)")
    try:
        return base64.b64decode(re.sub(r"\s", "", data), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"the image is a data URL of broken Base64: {error}") from None


class PictureFolder:
    """Finds pictures beside their table, in its `images_dl/` or `images/`, the same in the data folder, in tars there.

    Args:
        root: the data folder; no picture may lie outside of it.
    """

    def __init__(self, root: str):
        self.root, self.real_root = root, os.path.realpath(root)
        self.real_folder = functools.lru_cache(os.path.realpath)

    def find(self, source: object, table: str, tar: str | None = None) -> tuple[Reference, str]:
        """The place of a picture's bytes, and how to name it.

        Args:
            source: a path, a data URL, or an object with one of `SOURCE_KEYS`, as Parquet files have it.
            table: the file whose row names it; of a table in a tar, its member's name.
            tar: the tar, where the table is in one.

        Raises:
            ImageNotFound: there is none, or it lies outside of the data folder.
            UserError: an address, or nothing that names a picture.
        """
        while isinstance(source, dict):
            source = next((source[key] for key in SOURCE_KEYS if source.get(key)), None)
        if isinstance(source, bytes):
            return keep_bytes(source), "(bytes in the row)"
        if not isinstance(source, str) or not source.strip():
            raise UserError(f"an image is given as its path, its bytes or a data URL, this is {str(source)[:40]!r}")
        name = source.strip()
        if name.startswith("data:"):
            return keep_bytes(read_data_url(name)), "(data URL)"
        if name.startswith("file://"):
            name = unquote(name.removeprefix("file://"))
        if re.match(r"\w+://", name):
            raise UserError(f"the image is an address ({name[:60]}): download it first, give its file")
        return self.find_name(name, table, tar), name

    def find_name(self, name: str, table: str, tar: str | None) -> Reference:
        beside = os.path.dirname(tar or table) or "."
        folders = [beside] if self.real_folder(beside) == self.real_root else [beside, self.root]
        if tar:
            inner = [os.path.join(folder, below) for folder in (os.path.dirname(table), "") for below in FOLDERS]
            for path in (os.path.normpath(os.path.join(place, name)) for place in inner):
                if path in (members := self.members(tar)):
                    return members[path]
        places = [os.path.normpath(os.path.join(folder, below)) for folder in folders for below in FOLDERS]
        for path in (os.path.normpath(os.path.join(place, name)) for place in places):
            try:
                kind = os.lstat(path).st_mode
            except (OSError, ValueError):
                continue
            real = os.path.join(self.real_folder(os.path.dirname(path)), os.path.basename(path))
            real = os.path.realpath(real) if stat.S_ISLNK(kind) else real
            if os.path.commonpath([real, self.real_root]) != self.real_root:
                raise ImageNotFound(
                    f"the image {name} lies outside of the data folder {self.root}; copy it there", name
                )
            if os.path.isfile(real):
                return Reference(real)
        for folder in folders:
            for path in (os.path.normpath(os.path.join(below, name)) for below in FOLDERS):
                if path in (members := self.members_of_folder(folder)):
                    return members[path]
        if "\\" in name:  # as Windows writes paths
            return self.find_name(name.replace("\\", "/"), table, tar)
        raise ImageNotFound(f"there is no image {name}; looked in {', '.join(places)}, and in the tars there", name)

    @functools.lru_cache  # noqa: B019  (it lives as long as one reading of the rows)
    def members(self, tar: str) -> dict[str, Reference]:
        """The files in a tar that can be used, by their names."""
        return {
            os.path.normpath(member.name): Reference(os.path.abspath(tar), member.offset, member.size)
            for member in read_members(tar)
            if not member.error
        }

    @functools.lru_cache  # noqa: B019
    def members_of_folder(self, folder: str) -> dict[str, Reference]:
        """The same of all tars in a folder."""
        found = {}
        for tar in sorted(map(str, Path(folder).glob("*.tar")), reverse=True):
            found |= self.members(tar)
        return found
