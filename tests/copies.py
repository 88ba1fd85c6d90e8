"""Copies in step: a shared file is the same in every recipe that has it, a block the same wherever it stands.

    python tests/copies.py                                        shows what differs
    python tests/copies.py --fix train_qwen/rows.py               carries this file, and its blocks, to all other copies
    python tests/copies.py --list train_qwen/rows.py              where its copies are
    python tests/copies.py --new chinese_bloom --from train_qwen  a new recipe: the shared files, and its own to edit

A shared file has the line `# The same in every recipe that has it: ...` under its docstring (DeepSpeed's JSON needs
none). A block stands between `# >>> name` and `# <<< name`, in a script or in a recipe's own Python file.
"""

import argparse
import difflib
import re
import sys
from collections import defaultdict
from pathlib import Path, PurePosixPath

from repository import ROOT, list_recipes, recipe_files

SIGN = "# The same in every recipe that has it: python tests/copies.py --fix FILE\n"
MARK = re.compile(r"\s*# (>>>|<<<) ([\w-]+)")


def read_blocks(path: Path) -> dict[str, tuple[int, int]]:
    """Names of the blocks of a file -> their lines [start, end), both marks included.

    Raises:
        ValueError: a mark without its partner.
    """
    found, name, start = {}, None, 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        mark = MARK.match(line)
        if mark is None:
            continue
        if (mark[1] == "<<<") != (name is not None) or name not in (None, mark[2]):
            raise ValueError(f"{path}:{number + 1}: {line.strip()!r} has no partner")
        if mark[1] == ">>>":
            name, start = mark[2], number
        else:
            found[name], name = (start, number + 1), None
    if name is not None:
        raise ValueError(f"{path}:{start + 1}: # >>> {name} is never closed")
    return found


def is_shared(path: Path) -> bool:
    return path.match("ds_*.json") or (path.suffix == ".py" and SIGN in path.read_text(encoding="utf-8"))


def collect_copies(root: Path) -> dict[tuple[str, str], dict[str, str]]:
    """(path within the recipe, "") of a shared file, or ("", name) of a block -> {file: text}, train_qwen's first."""
    copies = defaultdict(dict)
    for recipe in sorted(list_recipes(root), key=lambda recipe: (recipe != "train_qwen", recipe)):
        for file in recipe_files(root, recipe):
            path = root / file
            if path.suffix not in (".py", ".sh", ".json"):
                continue
            if is_shared(path):
                module = str(PurePosixPath(file).relative_to(recipe))
                copies[module, ""][file] = path.read_text(encoding="utf-8")
            if path.suffix != ".json":
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                for name, (start, end) in read_blocks(path).items():
                    copies["", name][file] = "".join(lines[start:end])
    return copies


def find_differences(root: Path) -> list[str]:
    """Each copy that differs from the first, as a diff and the commands that put it right."""
    findings = []
    for (_, block), texts in collect_copies(root).items():
        (first, expected), *others = texts.items()
        for file, text in others:
            if text != expected:
                lines = difflib.unified_diff(
                    expected.splitlines(), text.splitlines(), f"{first} {block}", f"{file} {block}", lineterm=""
                )
                # Texts that differ in the last line's end only have no diff to show.
                diff = "\n".join(lines) or f"{first} and {file} end in different white space"
                findings.append(
                    f"\n{diff}\n\n  take the first:   python tests/copies.py --fix {first}\n"
                    f"  take the second:  python tests/copies.py --fix {file}\n"
                )
    return findings


def find_unsigned(root: Path) -> list[str]:
    """Files that are the same in two recipes and don't say so, or say so in one of them only."""
    texts = defaultdict(lambda: defaultdict(list))
    for recipe in list_recipes(root):
        for file in recipe_files(root, recipe):
            module = str(PurePosixPath(file).relative_to(recipe))
            if file.endswith(".py") and (root / file).stat().st_size > 0:
                texts[module][(root / file).read_text(encoding="utf-8").replace(SIGN, "")].append(file)
    return [
        f"{', '.join(files)}: the same text, but not signed as a shared file; put under the docstring:\n  {SIGN}"
        for same in texts.values()
        for files in same.values()
        if len(files) > 1 and not all(is_shared(root / file) for file in files)
    ]


def fix_copies(root: Path, source: str) -> list[str]:
    """Carries a shared file to all its copies, and its blocks into all files that have them; what was written.

    Raises:
        ValueError: it is no shared file and has no block.
    """
    written, found = [], False
    for (_, block), texts in collect_copies(root).items():
        if source not in texts:
            continue
        found = True
        for file, text in texts.items():
            if text == texts[source]:
                continue
            whole = (root / file).read_text(encoding="utf-8")
            new = texts[source] if not block else whole.replace(text, texts[source])
            (root / file).write_text(new, encoding="utf-8")
            written.append(file)
    if not found:
        raise ValueError(f"{source}: neither a shared file nor one with a block; the path is taken from {root}")
    return written


def list_copies(root: Path, source: str) -> list[str]:
    """Where else a shared file or a block of this file stands."""
    return [
        f"{block or 'the whole file'}: {', '.join(texts)}"
        for (_, block), texts in collect_copies(root).items()
        if source in texts
    ]


def start_recipe(root: Path, name: str, model: str) -> list[str]:
    """Copies what git knows of a recipe into a new folder, notebooks and data left out; its own files, to be edited.

    Raises:
        ValueError: there is no such recipe, or the folder is there already.
    """
    if model not in list_recipes(root):
        raise ValueError(f"{model}: no recipe; there are {', '.join(list_recipes(root))}")
    if (root / name).exists():
        raise ValueError(f"{name}: is there already")
    own = []
    for file in recipe_files(root, model):
        path = PurePosixPath(file).relative_to(model)
        if path.suffix == ".ipynb" or path.parts[0] == "data":
            continue
        target = root / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((root / file).read_bytes())
        target.chmod((root / file).stat().st_mode)
        own += [] if is_shared(target) else [f"{name}/{path}"]
    return own


def main(argv: list[str] | None = None, root: Path = ROOT) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--fix", metavar="FILE", help="carry this file, and its blocks, to all other copies")
    task.add_argument("--list", metavar="FILE", help="where the copies of this file and of its blocks are")
    task.add_argument("--new", metavar="RECIPE", help="start a recipe in this folder")
    parser.add_argument("--from", metavar="RECIPE", dest="model", default="train_qwen", help="what --new copies")
    args = parser.parse_args(argv)
    try:
        if args.fix:
            lines = [f"written: {file}" for file in fix_copies(root, args.fix)]
        elif args.list:
            lines = list_copies(root, args.list)
        elif args.new:
            lines = ["its own files, to be edited:", *start_recipe(root, args.new, args.model)]
        else:
            lines = find_differences(root) + find_unsigned(root)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(lines) or "all copies are in step")
    sys.exit(1 if lines and not (args.fix or args.list or args.new) else 0)


if __name__ == "__main__":
    main()
