"""Prints what each script answers to --help, as JSON: {script: text}.

    python tests/help_texts.py train_qwen/train.py train_qwen/infer.py

Most of such an answer's time goes into importing the heavy libraries; here they are imported once, and every script
runs in a fork of that process, in its own folder.
"""

import json
import os
import runpy
import sys
import traceback
from pathlib import Path


def ask(script: Path) -> str:
    """The output of `python script --help`.

    Raises:
        RuntimeError: the script ended with an error; the message is what it printed.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            os.chdir(script.parent)
            sys.path[0] = str(script.parent)
            sys.argv = [script.name, "--help"]
            runpy.run_path(script.name, run_name="__main__")
        except SystemExit as end:
            status = 0 if end.code in (0, None) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8", errors="replace") as stream:
        text = stream.read()
    if os.waitpid(child, 0)[1] != 0:
        raise RuntimeError(f"{script} --help fails:\n{text[-2000:]}")
    return text


if __name__ == "__main__":
    if any("transformers" in Path(name).read_text(encoding="utf-8") for name in sys.argv[1:]):
        import datasets  # noqa: F401
        import fastapi  # noqa: F401
        from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer  # noqa: F401
    try:
        print(json.dumps({name: ask(Path(name).resolve()) for name in sys.argv[1:]}))
    except RuntimeError as error:
        sys.exit(str(error))
