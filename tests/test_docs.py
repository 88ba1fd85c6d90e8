"""The readmes tell the truth: what they link to, name, start and set is there, and both languages say the same.

Read are README.md, README_zh.md and CONTRIBUTING.md, every recipe's readme.md and benchmarks/README.md: links, `code`
in the text, and blocks of bash and of plain text. A user's own files are named my_... in them.
"""

import ast
import difflib
import fnmatch
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from readmes import SHELL, list_readmes, read_readme, slugs, split_commands
from repository import ROOT, list_files, list_recipes, report
from test_requirements import OWN_ENVIRONMENT

PATH = re.compile(r"(?:[\w.*-]+/)*[\w*-][\w.*-]*\.(?:py|sh|json|ipynb|md|txt)|(?:[\w.*-]+/)+")
# First parts of paths that a run writes, a user brings, or another project has.
ELSEWHERE = ["output*", "merged*", "my_*", "your_*", "model_result", "cache_data", "checkpoint-*", "runs", ".venv*"]
ELSEWHERE += ["llama.cpp", "questions.txt", "train_results.json", "trainer_state.json", "config.json"]
ELSEWHERE += ["adapter_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
# The table of recipes names these before they are there. A link to one that isn't is still an error.
PLANNED = ["chinese_classifier", "chinese_bloom", "train_qwen", "internlm-sft", "train_llava", "chinese_clip_ddp"]
PLANNED += ["baichuan2_dpo", "model_clm", "verl_base", "pytorch_base"]

STARTERS = {"python", "python3", "bash", "sh", "torchrun", "deepspeed"}
# Read by the libraries, not by a script here.
ENVIRONMENT = ["HF_*", "CUDA_*", "NCCL_*", "DS_ACCELERATOR", "OMP_NUM_THREADS", "OPENAI_*", "PYTHON*"]
# `code` in the text may name flags of pip, torchrun, deepspeed and vLLM.
FOREIGN_FLAGS = {"--no-deps", "--index-url", "--extra-index-url", "--nproc_per_node", "--nnodes", "--node_rank"}
FOREIGN_FLAGS |= {"--master_addr", "--master_port", "--standalone", "--include", "--num_gpus", "--num_accelerators"}
FOREIGN_FLAGS |= {"--max-model-len", "--tensor-parallel-size", "--served-model-name"}


@dataclass
class Use:
    """What a readme says can be typed: a script with flags, or flags alone (script None)."""

    place: str
    script: str | None
    flags: list[str]


class Tree:
    """The files of the repository, and whether a name in a readme is one of them."""

    def __init__(self, root: Path):
        self.root, self.files, self.recipes = root, list_files(root), list_recipes(root)
        self.folders = {str(folder) for name in self.files for folder in PurePosixPath(name).parents}

    def find(self, name: str, bases: list[str]) -> str | None:
        """The path from the root of a file, a folder or a glob pattern, seen from the first base that has it."""
        for base in bases:
            path = os.path.normpath(os.path.join(base, name))
            if path in self.folders or path in self.files:
                return path
            if "*" in path and fnmatch.filter(self.files, path):
                return path
        return None

    def lacks(self, word: str, bases: list[str]) -> bool:
        """Whether a word looks like a file of the repository and is none."""
        word = re.sub(r":\w+$", "", word)  # file.py:name, file.py:12
        if not PATH.fullmatch(word) or self.find(word, bases):
            return False
        first = word.split("/")[0]
        return first not in PLANNED and not any(fnmatch.fnmatch(first, pattern) for pattern in ELSEWHERE)


def started_script(tree: Tree, words: list[str], bases: list[str]) -> tuple[str | None, list[str]]:
    """The script of the repository that a command starts, as a path from the root, and the flags it is given."""
    starts = words if words[0].endswith(".sh") else words[1:] if PurePosixPath(words[0]).name in STARTERS else []
    for position, word in enumerate(starts):
        if word in ("-m", "-c"):
            break
        if word.endswith((".py", ".sh")):
            flags = [flag.split("=")[0] for flag in starts[position:] if re.match("--[a-z]", flag)]
            return tree.find(word, bases), flags
    return None, []


def program_of(root: Path, script: str) -> str | None:
    """The Python file that reads the flags: a launch script hands them on to the last one that it names."""
    if script.endswith(".sh"):
        code = re.sub(r"(?m)(^|\s)#.*", "", (root / script).read_text(encoding="utf-8"))
        named = re.findall(r"[\w./-]+\.py\b", code)
        script = os.path.normpath(PurePosixPath(script).parent / named[-1]) if named else ""
    if not (root / script).is_file() or script.split("/")[0] in OWN_ENVIRONMENT:
        return None
    text = (root / script).read_text(encoding="utf-8")
    return script if re.search("ArgumentParser|parse_(flags|arguments)", text) else None


def read_shell(tree: Tree, name: str, first: int, code: str, bases: list[str]) -> tuple[list[str], list[Use]]:
    """Findings about the commands in a piece of bash, and the flags that remain to be asked for.

    Args:
        first: line of the readme in which `code` begins.
        bases: folders in which a reader can be when typing it.
    """
    findings, uses, cloned = [], [], None
    for line, words in split_commands(code):
        place = f"{name}:{first + line}"
        variables = []
        while words and re.match(r"[A-Z]\w*=", words[0]):
            variables.append(words.pop(0).split("="))
        if not words:
            continue
        for word in [*(value for _, value in variables), *(word.split("=")[-1] for word in words)]:
            if tree.lacks(word, bases):
                findings.append(f"{place}: {word}: no such file (a user's own are named my_...)")
        if words[0] == "git" and "clone" in words:
            cloned = PurePosixPath(words[-1]).name.removesuffix(".git")
        elif words[0] == "cd" and "$" not in words[1]:
            inside = [os.path.normpath(os.path.join(base, words[1])) for base in bases]
            inside = ["."] if words[1] == cloned else [folder for folder in inside if folder in tree.folders]
            if not inside:
                findings.append(f"{place}: cd {words[1]}: no such folder")
            bases = inside or bases
        elif words[0] == "make":
            makefile = tree.root / "Makefile"
            rules = re.findall(r"(?m)^([\w -]+):(?!=)", makefile.read_text() if makefile.is_file() else "")
            targets = {target for rule in rules for target in rule.split()}
            unknown = [word for word in words[1:] if re.fullmatch(r"[\w-]+", word) and word not in targets]
            findings += [f"{place}: make {word}: the Makefile has no such target" for word in unknown]
        script, flags = started_script(tree, words, bases)
        if script is not None:
            text = (tree.root / script).read_text(encoding="utf-8")
            for variable, _ in variables:
                known = any(fnmatch.fnmatch(variable, pattern) for pattern in ENVIRONMENT)
                if not known and not re.search(rf"\b{variable}\b", text):
                    findings.append(f"{place}: {variable}=...: {script} doesn't read it")
            if flags and (program := program_of(tree.root, script)):
                uses.append(Use(place, program, flags))
    return findings, uses


def read_inline(tree: Tree, name: str, line: int, code: str, bases: list[str]) -> tuple[list[str], list[Use]]:
    """The same for `code` in the text: a command, flags, or words among which are files."""
    words = code.split()
    if not words:
        return [], []
    if words[0].startswith("--"):
        return [], [Use(f"{name}:{line}", None, re.findall(r"--[a-z]\w*(?:-\w+)*", code))]
    if len(words) > 1 and (words[0] in STARTERS | {"make"} or re.match(r"[A-Z_]+=|\S+\.sh$", words[0])):
        return read_shell(tree, name, line, code, bases)
    missing = [word for word in (word.strip("\"',;:") for word in words) if tree.lacks(word, bases)]
    return [f"{name}:{line}: {word}: no such file (a user's own are named my_...)" for word in missing], []


def find_untruths(root: Path) -> list[str]:
    """Files, folders, scripts, make targets, variables and flags that a readme names and that aren't there."""
    tree, findings, uses = Tree(root), [], []
    for name in list_readmes(root):
        readme = read_readme(root, name)
        folder = str(PurePosixPath(name).parent)
        anywhere = [folder, "."] if folder in tree.recipes else [folder, ".", *tree.recipes]
        pieces = [read_shell(tree, name, *block[::2], [folder, "."]) for block in readme.blocks if block[1] in SHELL]
        inline = [(line, code) for line, text in readme.text for code in re.findall(r"`([^`]+)`", text)]
        for start, language, code in readme.blocks:  # listings and printed output
            if language in ("", "text"):
                inline += [(start + number, line.split("#")[0]) for number, line in enumerate(code.splitlines())]
        pieces += [read_inline(tree, name, line, code, anywhere) for line, code in inline]
        for found, used in pieces:
            findings += found
            uses += used
    return findings + find_unknown_flags(tree, uses)


@cache
def ask_flags(root: Path, scripts: tuple[str, ...]) -> dict[str, set[str]]:
    """Script -> the flags that argparse says it has."""
    command = [sys.executable, str(Path(__file__).with_name("help_texts.py")), *scripts]
    environment = {**os.environ, "COLUMNS": "200"}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    flags = {}
    for script, text in json.loads(run.stdout).items():
        declared = [line.strip().split("  ")[0] for line in text.splitlines() if re.match(r"  -", line)]
        flags[script] = set(re.findall(r"(?<![\w-])--[\w-]+", " ".join(declared)))
    return flags


def declared_flags(root: Path, recipe: str) -> set[str]:
    """Flags that a recipe's modules declare: what argparse can't be asked for where its packages aren't installed."""
    flags = set()
    for file in (root / recipe).glob("*.py"):
        text = file.read_text(encoding="utf-8")
        flags.update(re.findall(r'add_argument\("(--[\w-]+)"', text))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments"):
                flags.update(f"--{item.target.id}" for item in node.body if isinstance(item, ast.AnnAssign))
    return flags


def find_unknown_flags(tree: Tree, uses: list[Use]) -> list[str]:
    """Flags that no script has, or not the one that is started. Flags alone are looked for in all scripts in sight."""
    in_sight = [name for name in tree.files if str(PurePosixPath(name).parent) in tree.recipes]
    in_sight = [name for name in in_sight if name.endswith(".py") and program_of(tree.root, name)]
    has_main = [name for name in in_sight if "__main__" in (tree.root / name).read_text(encoding="utf-8")]
    named = {use.script for use in uses if use.script}
    if not uses:
        return []
    flags_of = ask_flags(tree.root, tuple(sorted({*has_main, *named})))
    findings = []
    for use in uses:
        if use.script:
            known = flags_of[use.script]
        else:
            folder = str(PurePosixPath(use.place).parent)
            owners = [script for script in flags_of if folder not in tree.recipes or script.startswith(f"{folder}/")]
            known = FOREIGN_FLAGS.union(*(flags_of[script] for script in owners))
            known |= declared_flags(tree.root, folder) if folder in OWN_ENVIRONMENT else set()
        for flag in use.flags:
            if flag not in known:
                close = difflib.get_close_matches(flag, known, 1)
                hint = f"; the nearest is {close[0]}" if close else ""
                what = f"{use.script} has no {flag}" if use.script else f"no script here has {flag}"
                findings.append(f"{use.place}: {what}{hint}")
    return findings


def find_broken_links(root: Path) -> list[str]:
    """Relative links and pictures that lead nowhere, seen from the readme as GitHub sees them."""
    tree, findings = Tree(root), []
    link = re.compile(r"\]\(([^)\s]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"|^\[[^\]]+\]:\s*(\S+)")
    for name in list_readmes(root):
        readme = read_readme(root, name)
        for line, text in readme.text:
            for groups in link.findall(re.sub(r"`[^`]*`", "", text)):
                target = unquote("".join(groups))
                path, _, anchor = target.partition("#")
                if re.match(r"[a-z]+:|//", path):
                    continue
                base = "." if path.startswith("/") else str(PurePosixPath(name).parent)
                found = tree.find(path.lstrip("/"), [base]) if path else name
                if found is None:
                    findings.append(f"{name}:{line}: {target}: the link leads nowhere")
                elif anchor and found.endswith(".md") and anchor not in slugs(read_readme(root, found)):
                    findings.append(f"{name}:{line}: {target}: {found} has no such heading")
    return findings


NUMBER = re.compile(r"(?<![A-Za-z\d_.])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def essence(readme) -> dict[str, list]:
    """What a page and its translation have in common: headings, table rows, code, and flags and figures in the text."""
    found = {"headings": [], "table rows": [], "blocks": [], "code and figures of the text": []}
    prose = []
    for _, text in readme.text:
        found["headings"] += re.findall(r"^#+ ", text)
        found["table rows"] += [len(re.findall(r"(?<!\\)\|", text))] if text.lstrip().startswith("|") else []
        prose.append(text)
    text = re.sub(r"\]\([^)]*\)", "]", "\n".join(prose))
    found["code and figures of the text"] = sorted(FLAG.findall(text) + NUMBER.findall(text))
    for _, language, code in readme.blocks:
        if language in SHELL:
            found["blocks"].append([words for _, words in split_commands(code)])
        else:  # listings and pictures are made of words, which are translated; in code only the comments are
            same = language in ("", "text", "mermaid")
            found["blocks"].append(language if same else re.sub(r"\s*#.*", "", code))
    return found


def find_language_gaps(root: Path) -> list[str]:
    """Where a page and its Chinese twin say different things: README.md and each recipe's readme.md."""
    findings, files = [], list_files(root)
    for english in ["README.md", *(name for name in files if name.endswith("/readme.md"))]:
        chinese = english.replace(".md", "_zh.md")
        if chinese not in files:
            findings.append(f"{chinese}: not there")
            continue
        ours, theirs = essence(read_readme(root, english)), essence(read_readme(root, chinese))
        for what in ours:
            if what == "code and figures of the text":
                counts = Counter(ours[what]), Counter(theirs[what])
                missing, added = counts[0] - counts[1], counts[1] - counts[0]
                if missing or added:
                    findings.append(f"{chinese}: lacks {sorted(missing)}, has besides {sorted(added)}")
            elif ours[what] != theirs[what]:
                pairs = zip(ours[what] + [None], theirs[what] + [None], strict=False)
                first = next(((a, b) for a, b in pairs if a != b), None)
                findings.append(f"{english} and {chinese}: {what} differ, first {first}")
    return findings


def test_readmes_name_what_is_there():
    findings = find_untruths(ROOT)
    assert not findings, report(findings)


def test_links_lead_somewhere():
    findings = find_broken_links(ROOT)
    assert not findings, report(findings)


def test_both_languages_say_the_same():
    findings = find_language_gaps(ROOT)
    assert not findings, report(findings)


def test_every_recipe_has_a_readme():
    missing = [recipe for recipe in list_recipes(ROOT) if f"{recipe}/readme.md" not in list_files(ROOT)]
    assert not missing, report(missing)


TRAIN = """import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--packing", help="see --nothing")
parser.parse_args()
"""
MADE_UP = {
    "a/requirements.txt": "torch==2.13.0\n",
    "a/train.py": TRAIN + "if __name__ == '__main__':\n    pass\n",
    "a/train.sh": '# not other.py\n: ${MODEL:-}\ntorchrun train.py "$@"\n',
    "a/data/x.json": "[]\n",
    "Makefile": "VENV := .venv\n\ntest lint: $(VENV)\n\tpytest\n",
}


def test_true_readmes_pass(make_tree):
    readme = """# Title, of it

[here](#title-of-it) [a](a/readme.md) ![b](https://example.com/x.png) `a/`, `train.py`, `data/*.json`, `--packing true`

```bash
git clone https://example.com/x/zero.git && cd zero   # don't ask
make test
cd a && HF_ENDPOINT=https://example.com MODEL=my_model bash train.sh --packing true > log.txt 2>&1
curl -d '{"a":
  "b.json c/"}' http://127.0.0.1:8000/v1/
```

| a | b |
```text
a/
  train.py   what it does
output/loss.json
```
"""
    in_recipe = "```bash\ncd a\nMODEL=x bash train.sh \\\n  --packing true\n```\n"
    in_recipe += "`torchrun --nproc_per_node=2 train.py --packing true`\n"
    pages = {"a/readme.md": in_recipe, "a/readme_zh.md": in_recipe}
    chinese = readme.replace("Title, of it", "标题").replace("#title-of-it", "#标题").replace("don't ask", "别问")
    root = make_tree({**MADE_UP, "README.md": readme, "README_zh.md": chinese, **pages})
    assert find_untruths(root) + find_broken_links(root) + find_language_gaps(root) == []


def test_untrue_readmes_are_found(make_tree):
    readme = """# Title
[x](a/nothing.md) <img src="x.png"> [y](#nothing) [planned](chinese_bloom/)
`train_all.py` `--nothing` `--packng`
```bash
make nothing
cd a
bash train.sh --nothing 1
SIZE=3 bash train_all.sh && SIZE=3 bash train.sh
bash train.sh my_data.json data/y.json
cd nowhere
```
"""
    root = make_tree({**MADE_UP, "README.md": readme, "README_zh.md": "# 标题\n| x |\n```bash\nmake test\n```\n"})
    assert find_untruths(root) == [
        "README.md:5: make nothing: the Makefile has no such target",
        "README.md:8: train_all.sh: no such file (a user's own are named my_...)",
        "README.md:8: SIZE=...: a/train.sh doesn't read it",
        "README.md:9: data/y.json: no such file (a user's own are named my_...)",
        "README.md:10: cd nowhere: no such folder",
        "README.md:3: train_all.py: no such file (a user's own are named my_...)",
        "README.md:7: a/train.py has no --nothing",
        "README.md:3: no script here has --nothing",
        "README.md:3: no script here has --packng; the nearest is --packing",
    ]
    assert [finding.split(": ")[1] for finding in find_broken_links(root)] == [
        "a/nothing.md",
        "x.png",
        "#nothing",
        "chinese_bloom/",
    ]
    gaps = find_language_gaps(root)
    assert [gap.split(":")[0] for gap in gaps] == ["README.md and README_zh.md"] * 2 + ["README_zh.md"]


def test_a_figure_that_differs_is_found(make_tree):
    pair = {
        "README.md": "# A\nloss 6.97 -> 1.64 by `--lora_r 8`\n",
        "README_zh.md": "# 甲\n损失 6.97 -> 1.63，`--lora_r 8`\n",
    }
    (gap,) = find_language_gaps(make_tree(pair))
    assert gap == "README_zh.md: lacks ['1.64'], has besides ['1.63']"
