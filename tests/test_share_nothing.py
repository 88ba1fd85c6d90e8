"""Share nothing: a recipe needs its own folder, the standard library and its requirements.txt, and no more."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path, PurePosixPath

import pytest
from packaging.utils import canonicalize_name

from repository import ROOT, list_files, list_python, list_recipes, parse_python, recipe_files, report
from test_requirements import read_requirements

CD = 'cd "$(dirname "$0")"'
# What changes a launch script's run, or how Python finds modules: a copied-out run starts without them.
LAUNCH_VARIABLES = {"PYTHONPATH", "MODEL", "DATA", "OUTPUT", "GPUS", "NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR"}
LAUNCH_VARIABLES |= {"MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"}

# What brings a module of another name, in an environment that isn't this one (verl_base has its own).
NOT_HERE = {"hydra": "hydra-core"}

distributions = cache(packages_distributions)


def find_imports(tree: ast.Module) -> list[tuple[int, str]]:
    """Line and top-level name of each absolute import, `import_module("name")` among them."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.lineno, node.module))
        elif isinstance(node, ast.Call) and re.search(r"\b(import_module|__import__)$", ast.unparse(node.func)):
            found += [(node.lineno, arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return [(line, name.split(".")[0]) for line, name in found]


def own_modules(root: Path, recipe: str, file: str) -> set[str]:
    """Modules and packages that stand in the recipe's folder or beside `file`."""
    folders = {recipe, str(PurePosixPath(file).parent)}
    own = set()
    for name in recipe_files(root, recipe):
        path = PurePosixPath(name)
        if path.suffix == ".py":
            own |= {path.stem} if str(path.parent) in folders else set()
            own |= {path.parent.name} if str(path.parent.parent) in folders else set()
    return own


def find_foreign_imports(root: Path) -> list[str]:
    """Imports that neither the recipe's folder, nor the standard library, nor its requirements provide."""
    tests_need = root / "requirements-test.txt"
    in_tests = set(read_requirements(tests_need)) if tests_need.is_file() else set()
    others = {name.split("/")[0].removesuffix(".py") for name in list_files(root)}
    findings = []
    for recipe in list_recipes(root):
        named = {name for path in (root / recipe).glob("requirements*.txt") for name in read_requirements(path)}
        for file in list_python(root, recipe):
            allowed = named | in_tests if file.startswith(f"{recipe}/tests/") else named
            own = own_modules(root, recipe, file)
            for place, tree in parse_python(root, file):
                for line, name in find_imports(tree):
                    brings = distributions().get(name, [NOT_HERE.get(name, name)])
                    providers = {canonicalize_name(found) for found in brings}
                    if name in sys.stdlib_module_names or name in own or providers & allowed:
                        continue
                    if name in others:
                        advice = "that is outside of the recipe; copy what is needed here, under the same name"
                    elif name in distributions():
                        lists = f"{recipe}/requirements.txt{' or requirements-test.txt' * (allowed is not named)}"
                        advice = f"name {' or '.join(sorted(providers))} in {lists}, or do without"
                    else:
                        advice = "nothing that is installed here brings it; correct the name, or name what brings it"
                        advice += f" in {recipe}/requirements.txt and install that"
                    findings.append(f"{place}:{line}: import {name}: {advice}")
    return findings


def steps_up(node: ast.expr, names: dict[str, int]) -> int | None:
    """How many folders above `__file__` an expression lies; None where that isn't to be seen.

    Args:
        names: variables for which it is known.
    """
    match node:
        case ast.Name(id="__file__"):
            return 0
        case ast.Name(id=name):
            return names.get(name)
        case ast.Attribute(value=inner, attr="parent"):
            above = 1
        case ast.Subscript(value=ast.Attribute(value=inner, attr="parents"), slice=ast.Constant(value=index)):
            above = index + 1
        case ast.Call(func=ast.Attribute(value=inner, attr="resolve" | "absolute"), args=[]):
            above = 0
        case ast.Call(func=ast.Attribute(attr="dirname") | ast.Name(id="dirname"), args=[inner]):
            above = 1
        case ast.Call(func=ast.Attribute(attr="abspath" | "realpath") | ast.Name(id="Path" | "str"), args=[inner]):
            above = 0
        case _:
            return None
    below = steps_up(inner, names)
    return None if below is None else below + above


def leads_out(root: Path, recipe: str, file: str, text: str) -> bool:
    """Whether a string is a path with `..` that leaves the recipe.

    Tests hand such paths to a recipe as bad input; there it counts only where something is.
    """
    if not re.search(r"(^|[/\\])\.\.([/\\]|$)", text) or re.search(r"\s|\w:/", text):
        return False
    home, in_tests = root / recipe, file.startswith(f"{recipe}/tests/")
    for base in {home, (root / file).parent}:
        target = Path(os.path.normpath(base / text))
        if not target.is_relative_to(home) and (target.exists() or not in_tests):
            return True
    return False


def find_ways_out(root: Path) -> list[str]:
    """Paths that leave the recipe, changes of sys.path, launch scripts that depend on where they are called."""
    findings = []
    for recipe in list_recipes(root):
        for file in list_python(root, recipe):
            for place, tree in parse_python(root, file):
                findings += [
                    f"{place}:{line}: {what}" for line, what in find_ways_out_in_python(root, recipe, file, tree)
                ]
        for file in recipe_files(root, recipe):
            if not file.endswith(".sh"):
                continue
            script = (root / file).read_text(encoding="utf-8")
            depth = file.count("/") - recipe.count("/") - 1  # a lesson's script starts in the recipe, too
            home = CD.replace('")"', f'"){"/.." * depth}"')
            if home not in script:
                findings.append(f"{file}: add {home} before the first command, so that it can be called from anywhere")
            for number, line in enumerate(script.replace(home, "").splitlines(), 1):
                if re.search(r"(?<![.\w])\.\.(?![.\w])", line) and not line.lstrip().startswith("#"):
                    findings.append(f"{file}:{number}: {line.strip()}: '..' leaves the recipe's folder")
    return findings


def find_ways_out_in_python(root: Path, recipe: str, file: str, tree: ast.Module) -> list[tuple[int, str]]:
    """Line and finding of each way out in one file or cell."""
    findings, names, in_tests = [], {}, file.startswith(f"{recipe}/tests/")
    depth = file.count("/") - recipe.count("/")  # folders from the file up to the recipe's own
    compared = {id(part) for node in ast.walk(tree) if isinstance(node, ast.Compare) for part in ast.walk(node)}
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if (above := steps_up(value, names)) is not None:
                names[name] = above
            case ast.ImportFrom(level=level) if level > depth:
                findings.append((node.lineno, "relative import from above the recipe's folder"))
            case ast.Constant(value=str(text)) if id(node) not in compared and leads_out(root, recipe, file, text):
                findings.append((node.lineno, f"the path {text!r} leaves the recipe's folder; put the file into it"))
            case ast.Attribute(attr="pardir"):
                findings.append((node.lineno, "os.pardir leaves the recipe's folder"))
            case ast.Attribute(value=ast.Name(id="sys"), attr="path") if not in_tests:
                findings.append(
                    (node.lineno, "sys.path: the recipe's own folder is on it already; nothing else needs to be")
                )
        if isinstance(node, ast.expr) and (above := steps_up(node, names)) is not None and above > depth:
            findings.append((node.lineno, f"{ast.unparse(node)} is above the recipe's folder"))
    return sorted(set(findings))


# What takes no flags of ours: a first stage, a vision tower's training, questions about many pictures.
SHORTER = (
    ("train_zero2.sh", "--save_total_limit 1 ", "--save_total_limit 1 --max_steps 2 "),
    ("train_zero2.sh", "--save_strategy no ", "--save_strategy no --max_steps 2 "),
    ("pretrain_tower.py", "LEARNING_RATE, WARMUP_STEPS = 1300,", "LEARNING_RATE, WARMUP_STEPS = 2,"),
    ("data01_scenes.py", "VIEWS, EVAL_VIEWS = 6, 2", "VIEWS, EVAL_VIEWS = 1, 1"),
)


def copy_out(root: Path, recipe: str, folder: Path) -> Path:
    """Copies what git knows of a recipe, and nothing else, into an otherwise empty folder."""
    for name in recipe_files(root, recipe):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, folder / name)
    return folder / recipe


def run_alone(command: list[str], folder: Path, seconds: int) -> tuple[int, str]:
    """Runs a command without this repository's help: exit status, and what it printed."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment["HF_HUB_OFFLINE"] = "1"  # the embedded default needs no hub
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks too
        raise
    return process.returncode, output


def test_imports_stay_in_the_recipe():
    assert list_recipes(ROOT), "no folder with a requirements.txt"
    findings = find_foreign_imports(ROOT)
    assert not findings, report(findings)


def test_paths_stay_in_the_recipe():
    findings = find_ways_out(ROOT)
    assert not findings, report(findings)


@pytest.mark.parametrize("recipe", [name for name in list_recipes(ROOT) if (ROOT / name / "train_zero2.sh").is_file()])
def test_recipe_trains_where_it_is_copied_to(recipe, tmp_path):
    place = (
        tmp_path / "别处 elsewhere"
    )  # a space and a Chinese name: paths are quoted, and no encoding is taken for granted
    alone = copy_out(ROOT, recipe, place)
    script = alone / "train_zero2.sh"
    for name, long, short in SHORTER:
        if (alone / name).is_file():
            text = (alone / name).read_text(encoding="utf-8")
            (alone / name).write_text(text.replace(long, short), encoding="utf-8")
    command = ["bash", str(script), "--max_steps", "2", "--num_train_epochs", "1"]
    status, output = run_alone(command, tmp_path, seconds=400)
    assert status == 0, output[-5000:]
    assert json.loads((alone / "output_zero2" / "train_results.json").read_text(encoding="utf-8"))
    assert os.listdir(place) == [recipe.split("/")[0]], "something was written beside the recipe's folder"


def test_checks_find_what_is_wrong(make_tree):
    cell = {"cell_type": "code", "source": ["%matplotlib inline\n", "import other\n"]}
    files = {
        "requirements-test.txt": "pytest==9\n",
        "other/requirements.txt": "torch==2.13.0\n",
        "other/data.py": "",
        "a/requirements.txt": "torch==2.13.0\n",
        "a/data.py": "import os\nimport torch.nn\nimport numpy\nimport pytest\nimport nowhere_to_be_found\n",
        "a/model.py": "from pathlib import Path\nimport sys\nimport data\nHERE = Path(__file__).resolve().parent\n"
        "sys.path.append('x')\nprint(HERE.parent)\nopen('../other/data.py')\n",
        "a/refuse.py": "assert '..' not in 'a/b'\nfrom pathlib import Path\nprint(Path(__file__).parent / 'data')\n",
        "a/tests/conftest.py": "import sys\nfrom pathlib import Path\nimport pytest\nimport data\n"
        "RECIPE = Path(__file__).parents[1]\nsys.path.insert(0, str(RECIPE))\n",
        "a/tests/test_a.py": "from conftest import RECIPE\nBAD = '../secret.png'\nopen('../../other')\n",
        "a/walk.ipynb": json.dumps({"cells": [cell]}),
        "a/train.sh": "python train.py --data ../other/data\necho {1..3} wait...\n",
        "lessons/inner/requirements.txt": "torch==2.13.0\n",
        "lessons/inner/lesson.py": "import model\nfrom pathlib import Path\nprint(Path(__file__).parents[1])\n",
        "a/train_zero2.sh": f"{CD}\n# see ../other\npython train.py\n",
    }
    root = make_tree(files)
    assert [finding.partition(": ")[0] for finding in find_foreign_imports(root)] == [
        "a/data.py:3",
        "a/data.py:4",
        "a/data.py:5",
        "a/walk.ipynb cell 1:2",
        "lessons/inner/lesson.py:1",
    ]
    assert [finding.partition(": ")[0] for finding in find_ways_out(root)] == [
        "a/model.py:5",
        "a/model.py:6",
        "a/model.py:7",
        "a/tests/test_a.py:3",
        "a/train.sh",
        "a/train.sh:1",
        "lessons/inner/lesson.py:3",
    ]
