"""What the checks share: which files the repository has, which folders are recipes, what Python stands in a file.

A check is a function that takes the root and returns its findings as lines, so it runs on made-up trees too.
"""

import ast
import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def list_files(root: Path) -> list[str]:
    """Files that git tracks or would track on `git add .`, by their paths from `root`: no outputs, no caches."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.split("\0")
    return sorted({name for name in names if name and (root / name).is_file()})


def list_recipes(root: Path) -> list[str]:
    """A recipe is a folder that has a requirements.txt: at the top, or in a folder of several (`pytorch_base/`)."""
    return [name.removesuffix("/requirements.txt") for name in list_files(root) if name.endswith("/requirements.txt")]


def recipe_files(root: Path, recipe: str) -> list[str]:
    """Files of one recipe, relative to `root`."""
    return [name for name in list_files(root) if name.startswith(f"{recipe}/")]


def code_cells(root: Path, notebook: str) -> list[tuple[int, dict]]:
    """Code cells of a notebook with their number among all cells, from 1."""
    cells = json.loads((root / notebook).read_text(encoding="utf-8"))["cells"]
    return [(number, cell) for number, cell in enumerate(cells, 1) if cell["cell_type"] == "code"]


def parse_python(root: Path, name: str) -> list[tuple[str, ast.Module]]:
    """Syntax trees of a .py file (one) or of a notebook (one a code cell), each with the place to name in a finding."""
    if name.endswith(".py"):
        return [(name, ast.parse((root / name).read_text(encoding="utf-8"), filename=name))]
    trees = []
    for number, cell in code_cells(root, name):
        place = f"{name} cell {number}"
        source = re.sub(r"(?m)^(\s*)[%!].*", r"\1pass", "".join(cell["source"]))  # magics are no Python
        flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        trees.append((place, compile(source, place, "exec", flags)))
    return trees


def list_python(root: Path, recipe: str) -> list[str]:
    """Python files and notebooks of one recipe."""
    return [name for name in recipe_files(root, recipe) if name.endswith((".py", ".ipynb"))]


def report(findings: list[str]) -> str:
    """Findings as the message of a failed assertion."""
    return f"{len(findings)} found\n" + "\n".join(findings)
