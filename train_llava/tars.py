"""A tar's members and where their bytes are, from its headers alone: nothing is unpacked, each can be read by itself.

Streaming readers bunch what they shuffle, give ranks unequal batches and can't go on in the middle; places don't.
"""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import os
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from files import UserError

BLOCK = 512
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}


class Member(NamedTuple):
    """A member's name, the place of its bytes, and why it can't be used ("" if it can)."""

    name: str
    offset: int
    size: int
    error: str


def why_refused(member: tarfile.TarInfo, file_size: int) -> str:
    """Why a member can't be used, "" if it can."""
    name = member.name
    if os.path.isabs(name) or ".." in name.split("/"):
        return "its name points outside of the archive"
    if not member.isreg() or member.issparse():
        return "no plain file (a link, a device or a sparse file)"
    if member.offset_data + member.size > file_size:
        return f"the tar is cut off within it: {file_size - member.offset_data} of {member.size} bytes"
    return ""


def read_members(path: str) -> Iterator[Member]:
    """The files in a tar, in their order; what is broken in it comes as a member with an error, the rest is read on.

    Raises:
        UserError: a compressed tar, whose members can't be read each for itself, or no tar at all.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(6)
    packed = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
    if packed:
        raise UserError(
            f"{path}: packed by {packed}, so that no member can be read by itself; unpack it: tar xf {path}"
        )
    end = found = 0  # end: of the last member, where the next header or the end's zeros are expected
    with open(path, "rb") as file:
        try:
            # Blocks that are no header are skipped over, instead of taken for the end.
            with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True, errorlevel=0) as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # a million of them would be held
                    if member.offset > end and not is_zero(path, end, member.offset):
                        yield Member(f"byte {end}", end, 0, f"{member.offset - end} broken bytes between two members")
                    blocks = -(-member.size // BLOCK) if member.isreg() else 0
                    end, found = member.offset_data + blocks * BLOCK, found + 1
                    if not member.isdir():
                        yield Member(member.name, member.offset_data, member.size, why_refused(member, size))
                    if member.isreg() and member.offset_data + member.size > size:
                        return
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            yield Member(f"byte {end}", end, 0, f"broken, nothing behind it can be read: {error}")
            return
    if not found:
        raise UserError(f"{path}: no tar, or one without any file in it.")
    if size <= end or not is_zero(path, end, size):
        yield Member(f"byte {end}", end, 0, "the tar is cut off or broken: no end of an archive behind its last member")


def is_zero(path: str, start: int, end: int) -> bool:
    """Whether all bytes of a part of a file are zero."""
    with open(path, "rb") as file:
        file.seek(start)
        while start < end and (chunk := file.read(min(1 << 20, end - start))):
            if chunk.strip(b"\0"):
                return False
            start += len(chunk)
    return True
