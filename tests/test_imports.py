"""Imports run one way: no two modules of a recipe import each other, in a circle of any length."""

import graphlib
from pathlib import Path, PurePosixPath

from repository import ROOT, list_recipes, parse_python, recipe_files, report
from test_share_nothing import find_imports


def find_circles(root: Path) -> list[str]:
    """The circles of imports, one a folder at the most: the modules of a folder see each other by their names."""
    findings = []
    for recipe in list_recipes(root):
        folders = {}
        for file in recipe_files(root, recipe):
            path = PurePosixPath(file)
            if path.suffix == ".py" and "tests" not in path.parts:
                folders.setdefault(str(path.parent), {})[path.stem] = file
        for folder, modules in folders.items():
            uses = {}
            for name, file in modules.items():
                ((_, tree),) = parse_python(root, file)
                uses[name] = {used for _, used in find_imports(tree)} & set(modules) - {name}
            try:
                graphlib.TopologicalSorter(uses).prepare()
            except graphlib.CycleError as error:
                findings.append(f"{folder}: {' <- '.join(error.args[1])}")
    return findings


def test_no_two_modules_import_each_other():
    findings = find_circles(ROOT)
    assert not findings, report(findings)


def test_circles_are_found(make_tree):
    files = {"a/requirements.txt": "", "a/rows.py": "import os\n", "a/data.py": "from rows import x\n"}
    assert find_circles(make_tree(files)) == []
    files |= {"a/infer.py": "def f():\n    import demo\n", "a/demo.py": "import app\n", "a/app.py": "import infer\n"}
    (finding,) = find_circles(make_tree(files))
    assert finding.startswith("a: ") and {"infer", "demo", "app"} == set(finding.removeprefix("a: ").split(" <- "))
