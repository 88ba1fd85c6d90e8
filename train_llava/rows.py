"""Records of several formats -> checked conversations with their pictures, every row good or bad with its reason.

Read are LLaVA's chat.json (`image`, `conversations` of from and value), `messages` + `images` as LLaMA-Factory and
ms-swift have it, TRL's typed parts (`{"type": "image"}`), and instruction, input, output. In a conversation, each
picture stands as `IMAGE_MARK`, in its order.
"""

import contextlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from files import ENDINGS, UserError, detect_encoding, identify_file, read_records
from images import IMAGE_ENDINGS, Reference, read_image_bytes, read_stats
from picture_files import SOURCE_KEYS, ImageNotFound, PictureFolder
from tars import Member, read_members

IMAGE_MARK = "<image>"
SPELLED_MARK = "<image >"  # in its place where a model has spelled it, by other tokens: it comes back with the history
ROLES = {
    **{"system": "system", "developer": "system", "user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant"},
}
TOOL_ROLES = ("function_call", "tool", "observation", "function")
USED_OF_A_MESSAGE = {"role", "from", "content", "value", "reasoning_content"}
LEARNED = ("weight", "loss", "train")  # OpenAI's, ms-swift's and axolotl's name: 0 or false takes a turn out
OTHER_MEDIA = ("video", "videos", "audio", "audios")
IMAGE_PARTS = ("image", "image_url")
TAR_TABLES = (".json", ".jsonl")  # read in a tar
PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


class Files(NamedTuple):
    """What of a data folder, or of the one file, gives rows; no picture may lie outside of the folder `root`."""

    root: str
    tables: list[str]
    tars: list[str]


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
    """The files that give rows: tables and tars; raises UserError where there is none."""
    if not os.path.exists(data_path):
        raise UserError(f"{data_path}: there is no such file or folder; check --data_path / DATA.")
    names = list_names(data_path)
    tables = [name for name in names if name.lower().endswith(ENDINGS)]
    tars = [name for name in names if name.lower().endswith(".tar")]
    if not tables and not tars:
        packed = [name for name in names if name.lower().endswith(PACKED_TARS)]
        hint = f" Unpack {packed[0]} first." if packed else ""
        raise UserError(f"{data_path}: can't be read; give a table ({', '.join(ENDINGS)}) or a .tar.{hint}")
    root = data_path if os.path.isdir(data_path) else os.path.dirname(data_path) or "."
    return Files(root, tables, tars)


def identify_files(files: Files) -> tuple[list[str], list]:
    """The tables' encodings, and what decides the rows: contents of tables, size and time of tars."""
    identified = [identify_file(path) for path in files.tables]
    folders = {os.path.dirname(table) or "." for table in files.tables} | {files.root}
    beside = [os.path.join(folder, name) for folder in folders for name in os.listdir(folder) if name.endswith(".tar")]
    stats = read_stats([Reference(path) for path in [*files.tars, *beside]])
    return [encoding for encoding, _ in identified], [files, identified, sorted(stats.items())]


def list_unread_files(data_path: str) -> list[str]:
    """The files of a folder that are neither tables nor tars nor pictures nor notes on them, by name."""
    known = (*ENDINGS, *IMAGE_ENDINGS, ".tar", ".md", f"{os.sep}scenes.txt")  # the last: data01_scenes.py's
    return [name for name in list_names(data_path) if not name.lower().endswith(known)]


def list_members(tar: str) -> Iterator[Member]:
    """A tar's members but whole hidden ones, such as the ._ files that macOS packs beside each."""
    return (one for one in read_members(tar) if one.error or not os.path.basename(one.name).startswith("."))


def list_unread_members(tars: list[str]) -> list[str]:
    """What in some tars is neither a table nor a picture, as WebDataset's key.txt: each ending, with its number."""
    members = ((tar, one) for tar in tars for one in list_members(tar) if not one.error)
    found = Counter((tar, os.path.splitext(one.name)[1]) for tar, one in members)
    unread = [(*of, count) for of, count in found.items() if of[1].lower() not in (*TAR_TABLES, *IMAGE_ENDINGS)]
    return [f"{tar}: {count:,} x {ending or '(no ending)'}" for tar, ending, count in unread]


def is_empty(value: object) -> bool:
    """None, and NaN: what spreadsheets and Parquet have where nothing was given."""
    return value is None or value != value


def without_empty(record: dict) -> dict:
    return {key: value for key, value in record.items() if not is_empty(value)}


def from_json(value: object, name: str) -> object:
    """The value, read as JSON where it is a text, as tables and ShareGPT's tools have it; raises UserError."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} holds no JSON: {error}") from None


def refuse_lone_surrogates(value: object) -> None:
    """Raises UserError where a text holds half a character, which no file and no tokenizer can."""
    if any("\ud800" <= character <= "\udfff" for character in json.dumps(value, ensure_ascii=False)):
        raise UserError("a lone surrogate (a \\ud... without its other half)")


def join_parts(parts: list[str | None]) -> str:
    """The text of a message's parts, where None is a picture: its mark, on a line of its own before what follows it."""
    text = ""
    for part in parts:
        if part and text.endswith(IMAGE_MARK) and not part[0].isspace():
            text += "\n"
        text += IMAGE_MARK if part is None else part
    return text


def read_content(content: object) -> tuple[str, list]:
    """A message's text with its marks, and for each mark what the message itself says of its picture, None if nothing.

    Args:
        content: a string, or a list of parts: `{"type": "text", "text"}`, `{"type": "image"}` (the row's next picture),
            `{"type": "image", "image": ...}` (see `picture_files.SOURCE_KEYS`).

    Raises:
        UserError: it is neither, or a part is of another kind.
    """
    if is_empty(content):
        return "", []
    if isinstance(content, str):
        return content, [None] * content.count(IMAGE_MARK)
    if not isinstance(content, list):
        raise UserError(f"the text is {type(content).__name__}, not a string")
    parts, sources = [], []
    for part in content:
        part = without_empty(part) if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind in IMAGE_PARTS:
            parts.append(None)
            sources.append({key: part[key] for key in SOURCE_KEYS if part.get(key)} or None)
            continue
        text = part.get("text", part.get("value")) if kind == "text" else None
        if not isinstance(text, str):
            raise UserError(f"a part of its content is {kind}; only text and images can be trained on here")
        parts.append(text)
        sources += [None] * text.count(IMAGE_MARK)
    return join_parts(parts), sources


def standard_message(turn: object) -> tuple[dict, list, list[str]]:
    """A message of any format under its standard names, what it says of its pictures, and the keys that were not used.

    Returns:
        `role`, `content` and, where there are some, `reasoning_content`, and `weight` 0 on a turn that is not to be
        learned; for each mark a picture or None (see `read_content`).

    Raises:
        UserError: what is wrong with it.
    """
    turn = without_empty(turn)
    given = turn.get("role", turn.get("from"))
    role = ROLES.get(given) if isinstance(given, str) else None
    if given in TOOL_ROLES or turn.get("tool_calls"):
        raise UserError("a tool call or its result; train_qwen trains on those")
    if role is None:
        raise UserError(f"unknown role {given!r}, known are {', '.join(ROLES)}")
    content, sources = read_content(turn.get("content", turn.get("value")))
    message = {"role": role, "content": content}
    if sources and role != "user":
        raise UserError(f"{IMAGE_MARK} stands in what the {role} says; pictures belong to the user's messages")
    if role == "assistant" and (thought := read_content(turn.get("reasoning_content"))[0]).strip():
        message["reasoning_content"] = thought
        if IMAGE_MARK in thought:
            raise UserError(f"{IMAGE_MARK} stands in a thought; pictures belong to the user's messages")
    refuse_lone_surrogates(message)
    unused = set(turn) - USED_OF_A_MESSAGE - set(LEARNED)
    for key in LEARNED:
        if role != "assistant" and turn.get(key):
            unused.add(key)
        elif turn.get(key, 1) not in (0, 1):
            raise UserError(f"{key} is {turn[key]!r}; a turn is learned (1, true) or not (0, false)")
        elif role == "assistant" and not turn.get(key, 1):
            message["weight"] = 0
    return message, sources, sorted(unused)


def read_images(row: dict) -> tuple[list, set[str]]:
    """What a row says of its pictures, beside its messages, and the keys that do; raises UserError for a video."""
    for key in OTHER_MEDIA:
        if row.get(key) not in (None, "", [], "[]"):
            raise UserError(f"{key}: only pictures and text can be trained on here")
    found = []
    for key in ("images", "image"):
        value = [] if row.get(key) in (None, "") else row[key]
        if isinstance(value, str) and re.fullmatch(r"\s*\[.*\]\s*", value, re.DOTALL):  # a table's cell
            value = from_json(value, key)
        found.append(value if isinstance(value, list) else [value])
    if all(found) and found[0] != found[1]:
        raise UserError("images and image are both given, and differ; leave one out")
    return found[0] or found[1], {"image", "images", *OTHER_MEDIA}


def to_conversation(row: object) -> tuple[list[dict], list, list[str], list[str]]:
    """One row of any format as messages, its pictures in their marks' order, the keys not used, and notes on it.

    Raises:
        UserError: what the row lacks, in words.
    """
    if not isinstance(row, dict):
        raise UserError(f"a row is a JSON object, this is a {type(row).__name__}")
    row = without_empty(row)
    name = next((name for name in ("messages", "conversations") if name in row), None)
    if "chosen" in row and "rejected" in row:
        raise UserError("a preference row (chosen, rejected); baichuan2_dpo trains on those")
    if row.get("tools") not in (None, "", [], "[]"):
        raise UserError("tools; train_qwen trains on tool calls")
    if name:
        turns, used = from_json(row[name], name), {name, "system", "tools"}
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise UserError(f"{name} is a list of objects with role and content, or from and value")
    elif "instruction" in row or "output" in row:
        turns, used = read_instruction(row), {"instruction", "input", "output", "history", "system", "tools"}
    else:
        hint = "; chinese_clip_ddp trains on pictures and their captions" if "text" in row or "caption" in row else ""
        raise UserError(f"none of messages, conversations, instruction among its keys {sorted(row)}{hint}")
    if row.get("system"):
        turns = [{"role": "system", "content": row["system"]}, *turns]
    row_images, image_keys = read_images(row)
    messages, sources, unused = [], [], set(row) - used - image_keys
    for number, turn in enumerate(turns, start=1):
        try:
            message, sources_of_it, unused_of_it = standard_message(turn)
        except UserError as error:
            raise UserError(f"message {number} ({turn.get('role', turn.get('from'))}): {error}") from None
        messages.append(message)
        sources += sources_of_it
        unused |= {f"{name or 'history'}[].{key}" for key in unused_of_it}
    sources, notes = match_images(messages, sources, row_images)
    check_order(messages)
    return messages, sources, sorted(unused), notes


def match_images(messages: list[dict], sources: list, row_images: list) -> tuple[list, list[str]]:
    """The picture of each mark, and a note where the only picture's mark was missing: set before the first question.

    Raises:
        UserError: marks and pictures don't match.
    """
    notes, first = [], next((message for message in messages if message["role"] == "user"), None)
    if not sources and len(row_images) == 1 and first:
        first["content"] = join_parts([None, first["content"]])
        sources, notes = [None], ["mark added"]
    open_marks = sources.count(None)
    if open_marks != len(row_images):
        raise UserError(f"{open_marks} {IMAGE_MARK} in its text, {len(row_images)} in images; each mark is one picture")
    images = iter(row_images)
    return [next(images) if source is None else source for source in sources], notes


def read_instruction(row: dict) -> list[dict]:
    """The turns of a row of instruction, input, output and history; raises UserError where one is missing."""
    if "output" not in row:
        raise UserError("no output")
    question, addition, history = row.get("instruction", ""), row.get("input", ""), row.get("history", [])
    if not isinstance(question, str) or not isinstance(addition, str):
        raise UserError("instruction and input are strings")
    history = from_json(history, "history")
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError("history is a list of [question, answer] pairs")
    pairs = [*history, ("\n".join(text for text in (question, addition) if text.strip()), row["output"])]
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def check_order(messages: list[dict]) -> None:
    """Raises UserError where a text is empty, an answer has no question, or the end no answer.

    Questions in a row and later system messages are left to the chat template. A picture alone is a question.
    """
    for number, message in enumerate(messages, start=1):
        if not message["content"].strip():
            raise UserError(f"message {number} ({message['role']}): the text is empty")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError("no assistant turn, so there is nothing to learn")
    before, asked = "system", False
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role == "assistant" and not (before == "user" or asked and before == "system"):
            raise UserError(f"message {number}: roles in the wrong order, assistant where user was expected")
        before, asked = role, asked or role == "user"
    if before != "assistant":
        raise UserError(f"the last message is the {before}'s, so its answer is missing")


EMPTY_ROW = {"messages": "[]", "images": "[]", "image_names": "[]", "missing": "", "notes": "[]"}
EMPTY_ROW |= {"source": "", "error": "", "raw": "", "unused_keys": "[]", "unread": "[]"}


def bad_row(source: str, reason: str, raw: str = "", missing: str = "") -> dict:
    return EMPTY_ROW | {"source": source, "error": reason, "raw": raw.strip(), "missing": missing}


def to_row(value: object, text: str, source: str, find) -> dict:
    """A record as a row, good or bad.

    Args:
        find: what a record says of a picture -> its `Reference` and how to name it; raises UserError.
    """
    try:
        if isinstance(value, UserError):
            raise value
        messages, sources, unused, notes = to_conversation(value)
        found = [find(each) for each in sources]
    except ImageNotFound as error:
        return bad_row(source, str(error), text, error.name)
    except UserError as error:
        return bad_row(source, str(error), text)
    values = {"messages": messages, "unused_keys": unused, "notes": notes}
    values |= {"images": [place for place, _ in found], "image_names": [name for _, name in found]}
    written = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
    return EMPTY_ROW | written | {"source": source}


def read_tar(path: str, folder: PictureFolder) -> Iterator[dict]:
    """The rows of the .json and .jsonl files in a tar; a key.json that names no picture has the key.jpg beside it."""
    tables, pictures = [], {}
    for member in list_members(path):
        stem, ending = os.path.splitext(member.name)
        if member.error:
            yield bad_row(f"{path}:{member.name}", member.error)
        elif ending.lower() in TAR_TABLES:
            tables.append(member)
        elif ending.lower() in IMAGE_ENDINGS:
            pictures[stem] = member.name
    for member in tables:
        beside = pictures.get(os.path.splitext(member.name)[0])
        for number, value, text in read_member(path, member):
            if beside and isinstance(value, dict) and not value.get("images") and not value.get("image"):
                value = value | {"image": os.path.basename(beside)}
            source = f"{path}:{member.name}:{number}"
            yield to_row(value, text, source, lambda name, member=member: folder.find(name, member.name, path))


def read_member(tar: str, member: Member) -> Iterator[tuple[int, object, str]]:
    """The records of a table in a tar, as `read_records` gives them; what is broken is the last of them."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = os.path.join(scratch, os.path.basename(member.name))
        with open(copy, "wb") as file:
            file.write(read_image_bytes(tar, member.offset, member.size))
        try:
            yield from read_records(copy, detect_encoding(copy)[0])
        except UserError as error:
            yield 1, UserError(str(error).replace(f"{copy}:", "").strip()), ""


def read_rows(files: Files, encodings: list[str]) -> Iterator[dict]:
    """Every row, good or bad: messages and pictures as JSON, `file:line`, what is wrong; the first one's `unread`."""
    unread, found = list_unread_members(files.tars), False
    for row in read_each(files, encodings):
        row |= {} if found else {"unread": json.dumps(unread, ensure_ascii=False)}
        # Half a character, as names in a tar of GBK are read, no file can hold: it is written as its number.
        yield {name: value.encode(errors="backslashreplace").decode() for name, value in row.items()}
        found = True
    if not found:
        hint = f" Not read: {', '.join(unread)}." if unread else ""
        raise UserError(f"{', '.join([*files.tables, *files.tars])}: no row in it.{hint}")


def read_each(files: Files, encodings: list[str]) -> Iterator[dict]:
    folder = PictureFolder(files.root)
    for path, encoding in zip(files.tables, encodings, strict=True):
        for number, value, text in read_records(path, encoding):
            yield to_row(value, text, f"{path}:{number}", lambda name, path=path: folder.find(name, path))
    for path in files.tars:
        yield from read_tar(path, folder)


def find_again(missing: list[tuple[str, str]], root: str) -> list[str]:
    """Those of the pictures that were missing (name, `file:line`) which are there now."""
    folder, found = PictureFolder(root), []
    for name, source in missing:
        with contextlib.suppress(UserError):
            folder.find_name(name, source.rpartition(":")[0].partition(".tar:")[0], None)
            found.append(name)
    return found
