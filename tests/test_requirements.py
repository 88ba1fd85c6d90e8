"""One version of each package: what two recipes need is pinned alike, and the root's list is what the recipes need."""

import re
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from repository import ROOT, list_files, list_recipes, report

OWN_ENVIRONMENT = {"verl_base"}  # its library pins an older transformers; `make verl` installs it apart


def read_requirements(path: Path) -> dict[str, str]:
    """Distribution -> what is asked of it (extras, versions, marker), as normalised text.

    Raises:
        ValueError: a line that is no requirement, or a distribution that stands there twice.
    """
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if not line or line.startswith("-"):
            continue
        try:
            requirement = Requirement(line)
        except InvalidRequirement as error:
            raise ValueError(f"{path}:{number}: {line!r} is no requirement: {error}") from None
        name = canonicalize_name(requirement.name)
        if name in found:
            raise ValueError(f"{path}:{number}: {name} stands here twice")
        found[name] = str(requirement).removeprefix(requirement.name)
    return found


def find_loose_requirements(root: Path) -> list[str]:
    """Requirements that tomorrow's release can break, and lines that lead out of the file."""
    findings = []
    for file in list_files(root):
        if not re.fullmatch(r"([^/]+/)?requirements[\w-]*\.txt", file):
            continue
        for name, asked in read_requirements(root / file).items():
            bounds = {specifier.operator for specifier in Requirement(name + asked).specifier}
            is_range = bounds & {">", ">=", "!="} and bounds & {"<", "<="}
            if not (is_range or bounds & {"==", "===", "~="}):
                findings.append(f"{file}: {name}{asked}: give both bounds, such as >=1.2,<2, or one version with ==")
        if "/" in file:
            for line in re.findall(
                r"(?m)^\s*(?:-r|-c|-e|--requirement|--constraint|--editable)\b.*", (root / file).read_text()
            ):
                findings.append(f"{file}: {line.strip()}: a recipe's list is complete by itself; write the lines out")
    return findings


def find_disagreements(root: Path) -> list[str]:
    """Packages that are asked for differently in two recipes, and where the root's list differs from theirs."""
    findings, union = [], {}
    for recipe in list_recipes(root):
        if recipe in OWN_ENVIRONMENT:
            continue
        for name, asked in read_requirements(root / recipe / "requirements.txt").items():
            first, first_asked = union.setdefault(name, (recipe, asked))
            if asked != first_asked:
                findings.append(f"{recipe}/requirements.txt: {name}{asked}, but {first} has {name}{first_asked}")
    listed = read_requirements(root / "requirements.txt")
    for name, (recipe, asked) in union.items():
        if listed.get(name) != asked:
            here = f"has {name}{listed[name]}" if name in listed else f"lacks {name}"
            findings.append(f"requirements.txt {here}; {recipe}/requirements.txt has {name}{asked}")
    findings += [f"requirements.txt: {name}: no recipe needs it" for name in listed.keys() - union.keys()]
    return findings


def test_requirements_are_pinned():
    findings = find_loose_requirements(ROOT)
    assert not findings, report(findings)


def test_root_is_the_union_of_the_recipes():
    findings = find_disagreements(ROOT)
    assert not findings, report(findings)


def test_checks_find_what_is_wrong(make_tree):
    root = make_tree(
        {
            "requirements.txt": "torch==2.13.0\nnumpy>=2,<3\nleft_over==1\n",
            "a/requirements.txt": "torch==2.13.0  # CPU build\nPEFT>=0.21\nnumpy>=2,<3\n-r ../requirements.txt\n",
            "b/requirements.txt": "torch==2.12.0\nnumpy<3,>=2\n",
            "verl_base/requirements.txt": "torch==2.8.0\n",
        }
    )
    assert len(find_loose_requirements(root)) == 2  # peft has no upper bound; -r leads out
    disagreements = " ".join(find_disagreements(root))
    assert len(find_disagreements(root)) == 3
    assert "b/requirements.txt: torch==2.12.0, but a has torch==2.13.0" in disagreements
    assert "lacks peft" in disagreements and "left-over: no recipe needs it" in disagreements
