"""Takes the readmes apart: text, blocks, headings, and the commands in a piece of bash."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from repository import list_files

SHELL = {"bash", "sh", "shell", "console"}


@dataclass
class Readme:
    """A readme taken apart; lines count from 1."""

    name: str
    text: list[tuple[int, str]] = field(default_factory=list)  # line, what stands there
    blocks: list[tuple[int, str, str]] = field(default_factory=list)  # first line, language, code


def list_readmes(root: Path) -> list[str]:
    names = {"README.md", "README_zh.md", "CONTRIBUTING.md", "benchmarks/README.md"}
    return [name for name in list_files(root) if name in names or name.endswith(("/readme.md", "/readme_zh.md"))]


def read_readme(root: Path, name: str) -> Readme:
    """Separates the fenced blocks from the text."""
    readme, fence = Readme(name), None
    for number, line in enumerate((root / name).read_text(encoding="utf-8").splitlines(), 1):
        mark = re.match(r"\s*(```+|~~~+)\s*(\w*)", line)
        if mark and fence is None:
            fence, start, language, code = mark[1], number + 1, mark[2], []
        elif mark and mark[1].startswith(fence) and not mark[2]:
            readme.blocks.append((start, language, "\n".join(code)))
            fence = None
        elif fence is not None:
            code.append(line)
        else:
            readme.text.append((number, line))
    assert fence is None, f"{name}:{start - 1}: the block is never closed"
    return readme


def slugs(readme: Readme) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    headings = [match[1] for _, text in readme.text if (match := re.match(r"#+ (.*)", text))]
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def split_commands(code: str) -> Iterator[tuple[int, list[str]]]:
    """Line (from 0) and words of each command in a piece of bash; comments and what `>` writes are left out.

    Raises:
        ValueError: a quote that is never closed.
    """
    pending, start = "", 0
    for number, line in enumerate(code.splitlines()):
        start = start if pending else number
        pending += re.sub(r"(^|\s)#.*", "", line)
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        lexer = shlex.shlex(pending.removeprefix("$ "), posix=True, punctuation_chars=";&|>")
        lexer.whitespace_split, lexer.commenters = True, ""
        try:
            parts = [*lexer, ";"]
        except ValueError:  # the quote goes on in the next line
            pending += "\n"
            continue
        pending, words = "", []
        for before, part in zip([""] + parts, parts, strict=False):
            if ">" in before or ">" in part:
                continue
            if part.strip(";&|"):
                words.append(part)
            elif words:
                yield start, words
                words = []
    if pending:
        raise ValueError(f"{pending!r}: a quote or a line is not finished")
