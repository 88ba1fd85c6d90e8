"""Copies are in step, and the tool that keeps them so does what it says."""

import re

import pytest

from copies import SIGN, collect_copies, find_differences, find_unsigned, main
from repository import ROOT, list_recipes, recipe_files, report


def test_copies_are_in_step():
    findings = find_differences(ROOT)
    assert not findings, report(findings)


def test_what_is_the_same_says_so():
    findings = find_unsigned(ROOT)
    assert not findings, report(findings)


def test_no_test_stands_twice():
    """A shared file is tested once, where it came from."""
    texts = {}
    for recipe in list_recipes(ROOT):
        for file in recipe_files(ROOT, recipe):
            if "/tests/test_" in file:
                texts.setdefault((ROOT / file).read_text(encoding="utf-8"), []).append(file)
    assert not [files for files in texts.values() if len(files) > 1]


RECIPE = {
    "requirements.txt": "torch==2.13.0\n",
    "rows.py": f'"""Rows."""\n\n{SIGN}\nLIMIT = 3\n',
    "train.py": '"""Train."""\n# >>> end\nend()\n# <<< end\nRATE = 1\n',
    "tests/ranks.py": f'"""Ranks."""\n{SIGN}',
    "train.sh": "set -e\n# >>> launch: the same everywhere\ngo\n# <<< launch\n",
    "train_zero2.sh": "# >>> launch: the same everywhere\ngo\n# <<< launch\nstop\n",
    "ds_zero2.json": "{}\n",
}


def two_recipes(**changed: str) -> dict[str, str]:
    """Two recipes that are alike, but for files of the second one."""
    names = {name: name.replace("__", "/", 1) for name in changed}
    second = RECIPE | {re.sub("_(?=(py|sh|json)$)", ".", names[name]): text for name, text in changed.items()}
    return {f"a/{name}": text for name, text in RECIPE.items()} | {f"b/{name}": text for name, text in second.items()}


def test_own_files_and_missing_copies_pass(make_tree):
    own = '"""Train."""\n# >>> end\nend()\n# <<< end\nRATE = 2\n'
    root = make_tree({**two_recipes(train_py=own, rows_py="LIMIT = 4\n"), "b/model.py": "MODEL = 1\n"})
    assert find_differences(root) == []
    assert set(collect_copies(root)["rows.py", ""]) == {"a/rows.py"}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("rows.py", "LIMIT = 3", "LIMIT = 4"),
        ("tests/ranks.py", SIGN, f"{SIGN}import json\n"),
        ("train.sh", "go\n", "stop\n"),
        ("train.py", "end()", "done()"),
        ("ds_zero2.json", "{}", '{"a": 1}'),
    ],
)
def test_a_difference_is_shown_and_one_command_mends_all_copies(make_tree, capsys, file, old, new):
    files = two_recipes()
    files[f"b/{file}"] = files[f"b/{file}"].replace(old, new)
    root = make_tree({**files, **{f"c/{name}": text for name, text in RECIPE.items()}})
    with pytest.raises(SystemExit) as end:
        main([], root)
    shown = capsys.readouterr().out
    assert end.value.code == 1 and f"+{new.splitlines()[-1]}" in shown

    command = re.search(r"take the second: +python tests/copies\.py (--fix b/.*)", shown)[1]
    with pytest.raises(SystemExit) as end:
        main(command.split(), root)
    assert end.value.code == 0 and find_differences(root) == []
    assert all((root / recipe / file).read_text() == files[f"b/{file}"] for recipe in "abc")


def test_the_same_text_without_the_sign_is_found(make_tree):
    root = make_tree(two_recipes(rows_py=RECIPE["rows.py"].replace(SIGN, ""), train_py="RATE = 2\n"))
    (finding,) = find_unsigned(root)
    assert finding.startswith("a/rows.py, b/rows.py: the same text") and SIGN in finding


def test_copies_are_listed_and_what_has_none_is_refused(make_tree, capsys):
    root = make_tree({**two_recipes(), "a/own.py": "A = 1\n"})
    with pytest.raises(SystemExit):
        main(["--list", "a/train.sh"], root)
    assert "launch: a/train.sh, a/train_zero2.sh, b/train.sh, b/train_zero2.sh" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"a/own\.py: neither a shared file nor one with a block"):
        main(["--fix", "a/own.py"], root)


def test_a_new_recipe_starts_as_a_copy(make_tree, capsys):
    root = make_tree({**two_recipes(), "a/data/rows.json": "[]", "a/infer.ipynb": "{}"})
    with pytest.raises(SystemExit) as end:
        main(["--new", "c", "--from", "a"], root)
    own = capsys.readouterr().out
    assert end.value.code == 0 and "c/train.py" in own and "c/rows.py" not in own
    assert (root / "c/rows.py").read_text() == RECIPE["rows.py"]
    assert not (root / "c/data").exists() and not (root / "c/infer.ipynb").exists()
    with pytest.raises(SystemExit, match="c: is there already"):
        main(["--new", "c", "--from", "a"], root)


@pytest.mark.parametrize("script", ["# >>> launch\ngo\n", "go\n# <<< launch\n", "# >>> a\n# <<< b\n"])
def test_a_mark_without_its_partner_is_refused(make_tree, script):
    with pytest.raises(ValueError, match=r"b/train\.sh:\d"):
        find_differences(make_tree(two_recipes(train_sh=script)))
