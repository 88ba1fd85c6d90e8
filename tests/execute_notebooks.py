"""Executes a recipe's notebooks in place, in the order of their names, and leaves out what changes with each run.

python tests/execute_notebooks.py train_qwen
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

for path in sorted(path for path in Path(sys.argv[1]).rglob("[!.]*.ipynb") if not path.is_symlink()):
    print(path, flush=True)
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": path.parent}}
    client = NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True, resources=resources)
    client.execute()
    notebook.metadata["language_info"] = {"name": "python"}  # without this machine's Python version
    nbformat.write(notebook, path)
