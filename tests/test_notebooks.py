"""Committed notebooks show what they do: executed from top to bottom, without errors, small, on nobody's machine."""

import json
import re
from pathlib import Path

from repository import ROOT, code_cells, list_files, report

MAX_KB = 300
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|Users|tmp|work|workspace|mnt|opt|usr|var|content)/[^\s'\"<>)]*")


def shown_text(output: dict) -> str:
    """The text of an output; pictures are none."""
    texts = [output.get("text", "")]
    texts += [data for mime, data in output.get("data", {}).items() if not mime.startswith("image/")]
    return "\n".join("".join(text) if isinstance(text, list) else str(text) for text in texts)


def find_flaws(root: Path) -> list[str]:
    """What keeps a notebook from being read as it is."""
    findings = []
    for notebook in (name for name in list_files(root) if name.endswith(".ipynb")):
        size = (root / notebook).stat().st_size / 1000
        if size > MAX_KB:
            findings.append(f"{notebook}: {size:.0f} KB, at most {MAX_KB}; draw smaller pictures, print less")
        cells = [(number, cell) for number, cell in code_cells(root, notebook) if "".join(cell["source"]).strip()]
        if [cell["execution_count"] for _, cell in cells] != list(range(1, len(cells) + 1)):
            findings.append(f"{notebook}: not executed from top to bottom in a fresh kernel; run make notebooks")
        for number, cell in cells:
            for output in cell["outputs"]:
                if output["output_type"] == "error":
                    findings.append(f"{notebook} cell {number}: ends in {output['ename']}: {output['evalue']}")
                for path in sorted(set(MACHINE_PATH.findall(shown_text(output)))):
                    findings.append(f"{notebook} cell {number}: shows {path}, a path of one machine")
    return findings


def test_notebooks_are_executed_clean_and_small():
    findings = find_flaws(ROOT)
    assert not findings, report(findings)


def test_check_finds_what_is_wrong(make_tree):
    def notebook(*cells):
        keys = ("source", "execution_count", "outputs")
        return json.dumps({"cells": [{"cell_type": "code", **dict(zip(keys, cell, strict=True))} for cell in cells]})

    picture = {"output_type": "display_data", "data": {"image/png": "ab /tmp/x", "text/plain": ["<Figure>"]}}
    path = {"output_type": "stream", "text": ["saved to\n", "/home/me/output and https://example.com/home/you\n"]}
    error = {"output_type": "error", "ename": "KeyError", "evalue": "'x'", "traceback": []}
    root = make_tree(
        {
            "a/good.ipynb": notebook(["1", 1, [picture]], [[], None, []], ["2", 2, []]),
            "a/error.ipynb": notebook(["1", 1, [error]]),
            "a/large.ipynb": notebook(["1" * 400_000, 1, []]),
            "a/order.ipynb": notebook(["1", 2, []], ["2", 1, []]),
            "a/path.ipynb": notebook(["1", 1, [path]]),
            "a/raw.ipynb": notebook(["1", None, []]),
        }
    )
    findings = find_flaws(root)
    assert [finding.split(".")[0] for finding in findings] == ["a/error", "a/large", "a/order", "a/path", "a/raw"]
    assert "shows /home/me/output," in findings[3]
