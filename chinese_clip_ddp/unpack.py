"""Unpacks a .tar (.gz, .bz2, .xz) or .zip: nothing lands outside of the folder, and a second start goes on.

    python unpack.py my_pictures.tar.gz my_data

A file appears under its name when it is whole, so those of an earlier start are known by their sizes.
"""

import argparse
import lzma
import os
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from files import UserError

ZIP_NAMES_ARE_UTF8 = 0x800
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def read_tar(path: str) -> Iterator[tuple[str, int, str, BinaryIO | None]]:
    """(name, size, why it is left out, its content) of each member but folders, in one pass."""
    with tarfile.open(path, "r|*") as tar:
        for member in tar:
            if member.isreg():
                yield member.name, member.size, "", tar.extractfile(member)
            elif not member.isdir():
                yield member.name, 0, "a link or a device", None


def read_zip(path: str) -> Iterator[tuple[str, int, str, BinaryIO | None]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename
            if not member.flag_bits & ZIP_NAMES_ARE_UTF8 and not name.isascii():
                name = name.encode("cp437").decode("gb18030", errors="replace")  # Windows in China
            if member.flag_bits & 1:
                yield name, 0, "encrypted", None
            elif member.compress_type not in ZIP_METHODS:
                yield name, 0, "packed by a method that Python can't undo (Deflate64?); unpack it by 7z", None
            elif not member.is_dir():
                yield name, member.file_size, "", archive.open(member)


def find_target(folder: str, name: str) -> str | None:
    """Where a member belongs; None if that is outside of the folder, be it by a link that lies in the folder."""
    root, target = os.path.realpath(folder), os.path.normpath(os.path.join(folder, name))
    parent = os.path.realpath(os.path.dirname(target))
    if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
        return None
    return target if os.path.commonpath([parent, root]) == root and not os.path.islink(target) else None


def unpack(path: str, folder: str) -> tuple[int, int, list[str]]:
    """Files written, files that were there already, and what was left out with its reason.

    Raises:
        UserError: no archive, or one that is cut off.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such file.")
    written, there, left_out = 0, 0, []
    read = read_zip if zipfile.is_zipfile(path) else read_tar
    try:
        for name, size, reason, content in read(path):
            target = None if reason else find_target(folder, name)
            if target is None:
                left_out.append(f"{name}: {reason or 'points outside of the folder'}")
            elif os.path.isfile(target) and os.path.getsize(target) == size:
                there += 1
            else:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                with content, open(f"{target}.part", "wb") as file:
                    shutil.copyfileobj(content, file, 1 << 20)
                os.replace(f"{target}.part", target)
                written += 1
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise UserError(
            f"{path}: no .tar, .tar.gz, .tar.bz2, .tar.xz or .zip, or one that is cut off ({error}). "
            f"Download it again; {written + there} files are unpacked."
        ) from None
    return written, there, left_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive")
    parser.add_argument("folder")
    flags = parser.parse_args()
    try:
        written, there, left_out = unpack(flags.archive, flags.folder)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{flags.archive}: {written:,} files written to {flags.folder}, {there:,} were there already")
    if left_out:
        listed = "\n".join(f"  {line}" for line in left_out[:10])
        sys.exit(f"error: {len(left_out)} members were left out:\n{listed}")


if __name__ == "__main__":
    main()
