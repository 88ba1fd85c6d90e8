"""Copies in step: what stands in two recipes under the same name is the same text, character for character.

    python -m pytest tests/test_copies.py
    python tests/test_copies.py --copy train_qwen/data.py:read_rows train_llava/data.py    a function, class, CONSTANT
    python tests/test_copies.py --copy train_qwen/train.sh:launch train_qwen/train_zero2.sh    a block in a script

Recipes share no module, so this is what holds them together. A deliberate difference gets a different name.
"""

import argparse
import ast
import difflib
import re
import sys
from collections import defaultdict
from pathlib import Path, PurePosixPath

import pytest

from repository import ROOT, list_recipes, recipe_files, report

# What a recipe is for stands in these: its steps in their order and its flags. They have to differ.
OWN_IN_EACH = {"main", "ModelArguments", "DataArguments", "TrainingArguments"}


def definitions(source: str) -> dict[str, tuple[int, int]]:
    """Top-level functions, classes and UPPER_CASE constants -> their lines [start, end), decorators included."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name, decorators = node.name, node.decorator_list
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            name, decorators = getattr(target, "id", ""), []
            if not re.fullmatch(r"_?[A-Z][A-Z0-9_]*", name):
                continue
        else:
            continue
        found[name] = (min(part.lineno for part in (node, *decorators)) - 1, node.end_lineno)
    return found


def blocks(source: str) -> dict[str, tuple[int, int]]:
    """Blocks of a script between `# >>> name` and `# <<< name` -> their lines [start, end), both marks included.

    Raises:
        ValueError: a mark without its partner.
    """
    found, name, start = {}, None, 0
    for number, line in enumerate(source.splitlines()):
        mark = re.match(r"# (>>>|<<<) ([\w-]+)", line)
        if mark is None:
            continue
        if (mark[1] == "<<<") != (name is not None) or name not in (None, mark[2]):
            raise ValueError(f"line {number + 1}: {line!r} has no partner")
        if mark[1] == ">>>":
            name, start = mark[2], number
        else:
            found[name], name = (start, number + 1), None
    if name is not None:
        raise ValueError(f"line {start + 1}: # >>> {name} is never closed")
    return found


def read_parts(path: Path) -> dict[str, str]:
    """The named parts of a Python file or a script with their text."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    try:
        spans = definitions(source) if path.suffix == ".py" else blocks(source)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return {name: "".join(lines[start:end]).rstrip("\n") for name, (start, end) in spans.items()}


def collect_copies(root: Path) -> dict[tuple[str, str], dict[str, str]]:
    """(what has to be alike, its name) -> {file: text}, the file to hold the others against first.

    Python counts as alike within modules of the same name, blocks in all scripts, DeepSpeed files as a whole.
    """
    copies = defaultdict(dict)
    for recipe in sorted(list_recipes(root), key=lambda recipe: (recipe != "train_qwen", recipe)):
        for file in recipe_files(root, recipe):
            path = PurePosixPath(file)
            module = str(path.relative_to(recipe))
            if path.match("ds_*.json"):
                copies[module, ""][file] = (root / file).read_text(encoding="utf-8")
            elif path.suffix == ".sh":
                for name, text in read_parts(root / file).items():
                    copies["*.sh", name][file] = text
            elif path.suffix == ".py" and (not module.startswith("tests/") or module == "tests/conftest.py"):
                for name, text in read_parts(root / file).items():
                    if name not in OWN_IN_EACH:
                        copies[module, name][file] = text
    return copies


def find_differences(root: Path) -> list[str]:
    """Each copy that differs from the first, as a diff and the command that puts it right."""
    findings = []
    for (_, name), texts in collect_copies(root).items():
        (source, expected), *others = texts.items()
        for file, text in others:
            if text == expected:
                continue
            lines = difflib.unified_diff(
                expected.splitlines(), text.splitlines(), f"{source} {name}", f"{file} {name}", lineterm=""
            )
            # Texts that differ in the last line's end only have no diff to show.
            diff = "\n".join(lines) or f"{source} and {file} end in different white space"
            fixes = [
                f"python tests/test_copies.py --copy {a}:{name} {b}" if name else f"cp {a} {b}"
                for a, b in ((source, file), (file, source))
            ]
            findings.append(
                f"\n{diff}\n\n  take the first:   {fixes[0]}\n  take the second:  {fixes[1]}\n"
                "  meant to differ:  give one of them another name\n"
            )
    return findings


def copy_part(source: Path, name: str, target: Path) -> None:
    """Replaces the part `name` of `target` by that of `source`.

    Raises:
        ValueError: one of the two has no such part.
    """
    text = target.read_text(encoding="utf-8")
    for path in (source, target):
        if name not in read_parts(path):
            raise ValueError(f"{path}: has no {name}; write the name where it belongs, then copy into it")
    start, end = (definitions(text) if target.suffix == ".py" else blocks(text))[name]
    lines = text.splitlines(keepends=True)
    target.write_text("".join([*lines[:start], read_parts(source)[name] + "\n", *lines[end:]]), encoding="utf-8")


def test_copies_are_in_step():
    findings = find_differences(ROOT)
    assert not findings, report(findings)


RECIPE = {
    "requirements.txt": "torch==2.13.0\n",
    "train.py": "class ModelArguments:\n    lora_r: int = 8\n\n\ndef main():\n    pass\n",
    "data.py": "import functools\n\nLIMIT = 3  # rows\n\n\n@functools.cache\ndef read(path):\n    return path\n",
    "tests/test_data.py": "def test_read():\n    pass\n",
    "tests/conftest.py": "def make_rows():\n    return []\n",
    "train.sh": "set -e\n# >>> launch: the same everywhere\ngo\n# <<< launch\n",
    "ds_zero2.json": "{}\n",
}


def made_up_recipes(**changed: str) -> dict[str, str]:
    """Two recipes that are alike, but for files of the second one."""
    second = {**RECIPE, **{re.sub("_(?=py|sh|json)", ".", name): text for name, text in changed.items()}}
    return {f"a/{name}": text for name, text in RECIPE.items()} | {f"b/{name}": text for name, text in second.items()}


def test_equal_and_missing_copies_pass(make_tree):
    own_words = "class ModelArguments:\n    lora_r: int = 16\n\n\ndef main():\n    print()\n"
    root = make_tree({**made_up_recipes(train_py=own_words, data_py="ROWS = 3\n"), "b/tests/test_data.py": "\n"})
    assert find_differences(root) == []
    assert set(collect_copies(root)["data.py", "read"]) == {"a/data.py"}


@pytest.mark.parametrize(
    "file, old, new, shown",
    [
        ("data.py", "# rows", "# lines", "-LIMIT = 3  # rows\n+LIMIT = 3  # lines"),
        ("data.py", "@functools.cache\n", "", "-@functools.cache"),
        ("tests/conftest.py", "[]", "[1]", "+    return [1]"),
        ("train.sh", "go\n", "stop\n", "-go\n+stop"),
    ],
)
def test_difference_is_shown_and_the_command_mends_it(make_tree, monkeypatch, file, old, new, shown):
    files = made_up_recipes()
    files[f"b/{file}"] = files[f"b/{file}"].replace(old, new)
    root = make_tree(files)
    (finding,) = find_differences(root)
    assert shown in finding

    monkeypatch.chdir(root)
    run_command(re.search(r"take the first: +python tests/test_copies\.py (.*)", finding)[1].split())
    assert find_differences(root) == []
    assert (root / "b" / file).read_text() == RECIPE[file]


def test_blocks_of_one_recipe_and_whole_files_are_compared(make_tree):
    other_block = "# >>> launch\ngo\n# <<< launch\n"
    root = make_tree({**made_up_recipes(ds_zero2_json='{"a": 1}\n'), "a/train_zero2.sh": other_block})
    findings = "".join(find_differences(root))
    assert "cp a/ds_zero2.json b/ds_zero2.json" in findings
    assert "--copy a/train.sh:launch a/train_zero2.sh" in findings


@pytest.mark.parametrize("script", ["# >>> launch\ngo\n", "go\n# <<< launch\n", "# >>> a\n# <<< b\n"])
def test_mark_without_partner_is_refused(make_tree, script):
    with pytest.raises(ValueError, match=r"b/train\.sh: line \d"):
        find_differences(make_tree(made_up_recipes(train_sh=script)))


def test_copying_a_name_that_is_not_there_is_refused(make_tree):
    root = make_tree(made_up_recipes(data_py="ROWS = 3\n"))
    with pytest.raises(ValueError, match=r"b/data\.py: has no read"):
        copy_part(root / "a/data.py", "read", root / "b/data.py")


def run_command(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copy", metavar="FILE:NAME", required=True, help="the part to copy")
    parser.add_argument("targets", nargs="+", type=Path, help="files that have a part of this name")
    args = parser.parse_args(argv)
    source, _, name = args.copy.rpartition(":")
    for target in args.targets:
        try:
            copy_part(Path(source), name, target)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_command()
