import subprocess

import pytest


@pytest.fixture
def make_tree(tmp_path):
    """Writes a made-up repository: {path: text} -> its root."""

    def make(files: dict[str, str]):
        root = tmp_path / "tree"
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text, encoding="utf-8")
        subprocess.run(["git", "init", "--quiet", root], check=True)
        return root

    return make
