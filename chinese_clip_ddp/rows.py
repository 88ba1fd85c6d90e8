"""Pairs of picture and caption, of whatever form -> one kind of row, good or bad with its reason.

Read are tables (`{"image", "text"}`, `{"file_path", "prompt", "zh_prompt"}`), Chinese-CLIP's `*_imgs.tsv` beside
`*_texts.jsonl`, tars of `key.jpg` beside `key.txt` or `key.json`, and folders of pictures alone.
"""

import contextlib
import functools
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from files import ENDINGS, UserError, identify_file, read_records
from images import IMAGE_ENDINGS, Reference, read_image_bytes, read_stats
from tars import Member, read_members

IMAGE_KEYS = ("image", "file_path", "img", "image_path")
TEXT_KEYS = {"zh": ("zh_prompt", "text", "caption", "prompt"), "en": ("text", "caption", "prompt", "zh_prompt")}
TRANSLATIONS = {"zh_prompt", "prompt"}
NO_CLASSES = {"images", "image", "imgs", "img", "pictures"}
PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


class Files(NamedTuple):
    """What is in a data folder, or the one file; `root` is the folder that no picture may lie outside of."""

    root: str
    tables: list[str]
    tars: list[str]
    images: list[str]  # that give rows by themselves, since there is neither a table nor a tar


class ImageNotFound(UserError):
    """There is no picture of that name, or none that may be read; that may change while the table stays the same."""

    def __init__(self, reason: str, name: str):
        super().__init__(reason)
        self.name = name


def list_names(data_path: str) -> list[str]:
    """All files below a folder but hidden ones, by name; or the one file."""
    if not os.path.isdir(data_path):
        return [data_path]
    names = []
    for folder, folders, files in os.walk(data_path):  # three times as fast as pathlib, and there may be a million
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [os.path.join(folder, name) for name in files if not name.startswith(".")]
    return sorted(names)


def find_files(data_path: str) -> Files:
    """The files that give rows: tables and tars, or the pictures of a folder that has neither.

    Raises:
        UserError: there is nothing that can be read.
    """
    if not os.path.exists(data_path):
        raise UserError(f"{data_path}: there is no such file or folder; check --data_path / DATA.")
    names, is_folder = list_names(data_path), os.path.isdir(data_path)
    tables = [name for name in names if name.lower().endswith(ENDINGS) and not name.endswith("_imgs.tsv")]
    tars = [name for name in names if name.lower().endswith(".tar")]
    images = [name for name in names if name.lower().endswith(IMAGE_ENDINGS)] if is_folder else []
    if not tables and not tars and not images:
        packed = [name for name in names if name.lower().endswith(PACKED_TARS)]
        hint = f" Unpack {packed[0]} first: bash unzip_data.sh {packed[0]}" if packed else ""
        wanted = f"a table ({', '.join(ENDINGS)}), a .tar or a folder of pictures"
        raise UserError(f"{data_path}: can't be read; give {wanted}.{hint}")
    root = data_path if is_folder else os.path.dirname(data_path) or "."
    return Files(root, tables, tars, [] if tables or tars else images)


def list_unread_files(data_path: str, used: set[str]) -> tuple[list[str], int]:
    """The files of a folder that give neither rows nor pictures nor captions, and how many pictures aren't `used`."""
    files, unread, pictures, real_folder = find_files(data_path), [], 0, functools.lru_cache(os.path.realpath)
    known = {*files.tables, *files.tars} | {f"{os.path.splitext(name)[0]}.txt" for name in files.images}
    known |= {name.removesuffix("_texts.jsonl") + "_imgs.tsv" for name in files.tables}
    for name in list_names(data_path):
        if name.lower().endswith(IMAGE_ENDINGS):
            folder, file = os.path.split(name)
            pictures += os.path.join(real_folder(folder), file) not in used
        elif name not in known:
            unread.append(name)
    return unread, pictures


class ImageFolder:
    """Finds the picture that a table names: beside the table, in `images/`, in the root, in a tar of these folders."""

    def __init__(self, root: str):
        self.root, self.real_root = root, os.path.realpath(root)
        self.real_folder = functools.lru_cache(os.path.realpath)

    def find(self, name: str, table: str) -> Reference:
        """The picture's file, or its place in a tar.

        Raises:
            ImageNotFound: there is none, or it lies outside of the root.
        """
        if re.match(r"\w+://", name) or name.startswith("data:"):
            raise UserError(f"the image is an address ({name[:40]}...): download it first, give its file")
        beside = os.path.dirname(table) or "."
        folders = [beside] if self.real_folder(beside) == self.real_root else [beside, self.root]
        places = [os.path.join(folder, *below) for folder in folders for below in ((), ("images",))]
        for place in places:
            path = os.path.normpath(os.path.join(place, name))
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
            if os.path.normpath(name) in (members := self.tar_members(folder)):
                return members[os.path.normpath(name)]
        if "\\" in name:  # as Windows writes paths
            return self.find(name.replace("\\", "/"), table)
        raise ImageNotFound(f"there is no image {name}; looked in {', '.join(places)}, and in the tars there", name)

    @functools.lru_cache  # noqa: B019  (it lives as long as one reading of the rows)
    def tar_members(self, folder: str) -> dict[str, Reference]:
        """The pictures of the tars of a folder by their names."""
        tars = sorted(str(path) for path in Path(folder).glob("*.tar"))
        return {
            os.path.normpath(member.name): Reference(os.path.abspath(tar), member.offset, member.size)
            for tar in tars
            for member in read_members(tar)
            if not member.error
        }


def read_tsv(path: str) -> tuple[dict[str, tuple[Reference, str]], list[tuple[str, str]]]:
    """Chinese-CLIP's pictures: id -> place of its Base64 and `file:line`; and (`file:line`, reason) of bad lines."""
    found, bad, offset = {}, [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            name, tab, coded = line.partition(b"\t")
            source, key = f"{path}:{number}", name.decode(errors="replace").strip()
            if tab and key not in found:
                place = Reference(os.path.abspath(path), offset + len(name) + 1, len(coded.rstrip()), "base64")
                found[key] = (place, source)
            elif line.strip():
                reason = f"the id {key} again" if tab else "no tab between the id and the picture"
                bad.append((source, reason))
            offset += len(line)
    return found, bad


def read_texts(record: dict, language: str) -> tuple[list[str], str]:
    """The captions of a record, without white space around them, and the key that they stood under.

    Raises:
        UserError: there is none, or it isn't text.
    """
    key = next((name for name in TEXT_KEYS[language] if name in record), None)
    if key is None:
        raise UserError(f"no caption: none of {', '.join(TEXT_KEYS[language])} among its keys {sorted(record)}")
    texts = record[key] if isinstance(record[key], list) else [record[key]]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{key} is a text or a list of texts")
    return [check_text(text, key) for text in texts], key


def check_text(text: str, key: str) -> str:
    """The text without white space around it; raises UserError where nothing is left, or it is no text at all."""
    if not text.strip():
        raise UserError(f"the caption ({key}) is empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{key}: a lone surrogate (a \\ud... without its other half)")
    return text.strip()


def read_extras(record: dict) -> dict:
    """`group`, `kind` and `choices` of a record; raises UserError where they aren't text, or a list of texts."""
    group, kind, choices = record.get("group", ""), record.get("kind", ""), record.get("choices", [])
    if isinstance(choices, str):
        try:
            choices = json.loads(choices)
        except ValueError as error:
            raise UserError(f"choices holds no JSON: {error}") from None
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in choices):
        raise UserError("choices is a list of texts, the wrong captions")
    choices = [check_text(text, "choices") for text in choices]
    if isinstance(group, bool) or not isinstance(group, str | int) or not isinstance(kind, str):
        raise UserError("group is a text or a number, kind a text")
    return {"group": str(group), "kind": kind, "choices": choices}


def to_pairs(record: object, language: str, find) -> Iterator[dict]:
    """The rows of a record: one for each of its pictures and captions.

    Args:
        find: the record's image keys -> the picture's `Reference` and how to name it, for each of its pictures.

    Raises:
        UserError: what the record lacks, in words.
    """
    if not isinstance(record, dict):
        raise UserError(f"a row is a JSON object, this is a {type(record).__name__}")
    record = {key: value for key, value in record.items() if value is not None and value == value}
    texts, text_key = read_texts(record, language)
    extras = read_extras(record)
    images, used = find(record)
    used = {text_key, *used, "group", "kind", "choices", *(TRANSLATIONS if text_key in TRANSLATIONS else ())}
    unused = json.dumps(sorted(set(record) - used), ensure_ascii=False)
    for reference, image in images:
        for text in texts:
            yield {**reference._asdict(), "image": image, "text": text, **extras, "unused_keys": unused}


def find_in_folder(record: dict, folder: ImageFolder, table: str) -> tuple[list, set[str]]:
    """The one picture that a record of a table names, and the key that does; raises UserError where there is none."""
    key = next((name for name in IMAGE_KEYS if name in record), None)
    if key is None:
        raise UserError(f"no image: none of {', '.join(IMAGE_KEYS)} among its keys {sorted(record)}")
    name = record[key]
    if not isinstance(name, str) or not name.strip():
        hint = "; pictures inside of Parquet: convert_data.py" if isinstance(name, dict) else ""
        raise UserError(f"{key} is the path of one image, this is a {type(name).__name__}{hint}")
    return [(folder.find(name.strip(), table), name.strip())], {key}


def find_in_tsv(record: dict, images: dict, tsv: str) -> tuple[list, set[str]]:
    """The pictures whose ids a record of Chinese-CLIP names; raises UserError where one isn't there."""
    names = record.get("image_ids")
    if not isinstance(names, list) or not names:
        raise UserError("image_ids is a list of the ids of its images, and can't be empty")
    for name in names:
        if str(name) not in images:
            raise UserError(f"there is no image {name} in {tsv}")
    return [images[str(name)] for name in names], {"image_ids", "text_id"}


EMPTY_ROW = Reference("")._asdict() | {"image": "", "text": "", "group": "", "kind": "", "choices": []}
EMPTY_ROW |= {"unused_keys": "[]", "source": "", "error": "", "raw": ""}


def bad_row(source: str, reason: str, raw: str = "") -> dict:
    return EMPTY_ROW | {"source": source, "error": reason, "raw": raw.strip()[:1000]}


def read_table(path: str, encoding: str, folder: ImageFolder, language: str) -> Iterator[dict]:
    """The rows of a table; one named ..._texts.jsonl with ..._imgs.tsv beside it has its pictures there."""
    find = functools.partial(find_in_folder, folder=folder, table=path)
    tsv = path.removesuffix("_texts.jsonl") + "_imgs.tsv"
    if path.endswith("_texts.jsonl") and os.path.isfile(tsv):
        images, bad = read_tsv(tsv)
        yield from (bad_row(*one) for one in bad)
        find = functools.partial(find_in_tsv, images=images, tsv=tsv)
    for number, record, raw in read_records(path, encoding):
        source = f"{path}:{number}"
        try:
            if isinstance(record, UserError):
                raise record
            for row in list(to_pairs(record, language, find)):
                yield EMPTY_ROW | row | {"source": source}
        except ImageNotFound as error:
            yield bad_row(source, str(error), raw) | {"image": error.name}
        except UserError as error:
            yield bad_row(source, str(error), raw)


def has_captions(tar: str) -> bool:
    """Whether a tar's pictures give rows by themselves; else it only holds the pictures of tables."""
    return any(member.name.lower().endswith((".txt", ".json")) for member in read_members(tar))


def read_tar(path: str, language: str, has_tables: bool) -> Iterator[dict]:
    """The rows of a tar, one for each of its pictures; none where it holds the pictures of tables only."""
    if has_tables and not has_captions(path):
        return
    samples = {}
    for member in read_members(path):
        if member.error:
            yield bad_row(f"{path}:{member.name}", member.error)
            continue
        stem, ending = os.path.splitext(member.name)
        kind = "image" if ending.lower() in IMAGE_ENDINGS else ending.lower()
        parts = samples.setdefault(stem, {})
        if kind in parts and not is_copy(path, parts[kind], member):
            yield bad_row(f"{path}:{member.name}", f"the key {stem} has another {parts[kind].name} already")
        else:
            parts[kind] = member
    for parts in samples.values():
        first = next(iter(parts.values()))
        source = f"{path}:{parts.get('image', first).name}"
        try:
            yield from (EMPTY_ROW | row | {"source": source} for row in read_sample(path, parts, language, source))
        except UserError as error:
            yield bad_row(source, str(error))


def is_copy(tar: str, one: Member, other: Member) -> bool:
    return one.name == other.name and read_image_bytes(tar, *one[1:3]) == read_image_bytes(tar, *other[1:3])


def read_sample(tar: str, parts: dict[str, Member], language: str, image: str) -> list[dict]:
    """The rows of one key of a tar; raises UserError where it lacks a picture or a caption."""
    if "image" not in parts:
        raise UserError(f"no image of {', '.join(IMAGE_ENDINGS)} beside it in the tar")
    record = {}
    if ".json" in parts:
        try:
            record = json.loads(read_image_bytes(tar, *parts[".json"][1:3]))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{parts['.json'].name}: no JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{parts['.json'].name}: no JSON object")
    if ".txt" in parts:
        lines = decode_text(read_image_bytes(tar, *parts[".txt"][1:3]), parts[".txt"].name).splitlines()
        record |= {"text": [line for line in lines if line.strip()]}
    record |= {f"a member {kind}": "" for kind in set(parts) - {"image", ".json", ".txt"}}
    place = Reference(os.path.abspath(tar), *parts["image"][1:3])
    return list(to_pairs(record, language, lambda _: ([(place, image)], {"__key__"})))


def decode_text(data: bytes, name: str) -> str:
    """UTF-8, else GB18030, strictly; raises UserError where it is neither."""
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise UserError(f"{name}: neither UTF-8 nor GB18030. Save the file as UTF-8.")


def read_folder(images: list[str], root: str) -> Iterator[dict]:
    """The rows of a folder without a table: `x.txt` beside `x.png`, one caption a line; else its folder's name."""
    real_root = os.path.realpath(root)
    for path in images:
        texts, folder = Path(path).with_suffix(".txt"), Path(path).parent
        captions = [(path, folder.name)]
        try:
            if os.path.commonpath([os.path.realpath(path), real_root]) != real_root:
                raise UserError(f"the image lies outside of the data folder ({real_root}); copy it there")
            if texts.is_file():
                lines = decode_text(texts.read_bytes(), str(texts)).splitlines()
                captions = [(f"{texts}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
            elif folder == Path(root) or folder.name.lower() in NO_CLASSES:
                raise UserError(f"no caption: no table, no {texts.name} beside it, no sub-folder that names its class")
            if not captions:
                raise UserError(f"no caption: {texts.name} is empty")
            captions = [(source, check_text(text, "text")) for source, text in captions]
        except UserError as error:
            yield bad_row(path, str(error))
            continue
        for source, text in captions:
            place = Reference(os.path.join(os.path.realpath(folder), Path(path).name))._asdict()
            yield EMPTY_ROW | place | {"image": path, "text": text, "source": source}


def read_rows(files: Files, encodings: tuple[str, ...], language: str) -> Iterator[dict]:
    """Every row of the files, good or bad: place of the picture, caption, `file:line`, and what is wrong."""
    row = None
    folder = ImageFolder(files.root)
    for path, encoding in zip(files.tables, encodings, strict=True):
        for row in read_table(path, encoding, folder, language):
            yield row
    for path in files.tars:
        for row in read_tar(path, language, bool(files.tables)):
            yield row
    for row in read_folder(files.images, files.root):
        yield row
    if row is None:
        raise UserError(f"{', '.join([*files.tables, *files.tars])}: no row in it.")


def identify_files(files: Files) -> tuple[tuple[str, ...], list]:
    """The tables' encodings, and what decides the rows: contents of tables, size and time of all that is too large."""
    identified = [identify_file(path) for path in files.tables]
    others = [*files.tars, *files.images]
    others += [f"{os.path.splitext(image)[0]}.txt" for image in files.images]
    for table in files.tables:
        others += [table.removesuffix("_texts.jsonl") + "_imgs.tsv", *map(str, Path(table).parent.glob("*.tar"))]
    stats = read_stats([Reference(path) for path in others])
    return tuple(encoding for encoding, _ in identified), [files, identified, sorted(stats.items())]


def find_again(missing: list[tuple[str, str]], root: str) -> list[str]:
    """Those of the pictures that were missing (name, `file:line`) which are there now."""
    folder, found = ImageFolder(root), []
    for name, source in missing:
        with contextlib.suppress(UserError):
            folder.find(name, source.rpartition(":")[0])
            found.append(name)
    return found
