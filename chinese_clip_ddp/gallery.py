"""A gallery to search in: all images of a table, a tar or a folder, by content, with the captions that they have.

Training needs a caption for each image, a gallery doesn't: photos without any are found as well.
"""

import os
from typing import NamedTuple

from data import number_of
from files import UserError
from images import IMAGE_ENDINGS, Reference, check_images, load_image, read_image_bytes
from rows import find_files, identify_files, read_rows
from tars import read_members


class Gallery(NamedTuple):
    """What an index is to hold: content hash -> place of the image and captions, and what was found on the way."""

    images: dict[int, tuple[Reference, list[str]]]
    copies: int  # files whose content is another's
    unusable: list[str]  # "place: reason"


def read_gallery(data_path: str, language: str = "zh") -> Gallery:
    """All images of a table, a tar or a folder, with the captions that they have; of equal ones the first place.

    Raises:
        UserError: there is nothing that can be read, or no image in it can be used.
    """
    files = find_files(data_path)
    root = os.path.realpath(files.root)
    loose = {path: place_of(path) for path in files.images if is_within(path, root)}
    for tar in files.tars:
        for member in read_members(tar):
            if member.name.lower().endswith(IMAGE_ENDINGS) and not member.error:
                loose[f"{tar}:{member.name}"] = Reference(os.path.abspath(tar), member.offset, member.size)
    captions, unusable = {}, []
    for row in read_rows(files, identify_files(files)[0], language):
        place = Reference(*(row[name] for name in Reference._fields))
        if not row["error"]:
            captions.setdefault(place, []).append(row["text"])
        elif row["source"] not in loose or not row["error"].startswith("no caption"):
            unusable.append(f"{row['source']}: {row['error']}")
    for place in loose.values():
        captions.setdefault(place, [])
    images, copies = {}, 0
    for place, verdict in zip(captions, check_images(list(captions)), strict=True):
        if verdict.reason:
            unusable.append(f"{place.path}: {verdict.reason}")
            continue
        known = images.setdefault(number_of(verdict.sha256), (place, []))
        known[1].extend(text for text in captions[place] if text not in known[1])
        copies += known[0] != place
    if not images:
        raise UserError(f"{data_path}: no image in it can be used; the first reason: {unusable[0]}")
    return Gallery(images, copies, unusable)


def place_of(path: str) -> Reference:
    """As `read_rows` gives it, also where the folder is a link."""
    return Reference(os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)))


def is_within(path: str, root: str) -> bool:
    return os.path.commonpath([os.path.realpath(path), root]) == root


def open_reference(reference: Reference):
    """The picture at a place; raises ImageError where it has gone or is broken."""
    return load_image(read_image_bytes(*reference))
