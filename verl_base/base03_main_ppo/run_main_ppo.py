"""`python -m verl.trainer.main_ppo` in a Ray of its own, which listens on 127.0.0.1 only and ends with it.

What learns is verl's. Ours is the environment (`cluster.py`), the place where Ray writes, and without a GPU the
plug-ins: `cpu_platform.py`, `hf_rollout.py`, `cpu_critic.py`.
"""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from cluster import ON_GPU, ray  # before verl: it says where verl and Ray are

# isort: split
from verl.trainer import main_ppo

from checkpoint import lock_output_dir
from rows import UserError

os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:verl.workers.engine")  # of engines that nobody asked for
if not ON_GPU:
    os.environ["VERL_USE_EXTERNAL_MODULES"] += ",base03_main_ppo.hf_rollout,base03_main_ppo.cpu_critic"
    os.environ.setdefault(
        "TQ_NUM_THREADS", "1"
    )  # TransferQueue's; with more than there are cores, each completion warns


def main() -> None:
    output = next(word.split("=", 1)[1] for word in reversed(sys.argv) if word.startswith("trainer.default_local_dir="))
    lock = lock_output_dir(output)
    logs = Path(output).resolve() / "ray"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    with tempfile.TemporaryDirectory(prefix="ray-") as short:  # a socket's path has at most 107 characters
        Path(short, "ray").symlink_to(logs)
        os.environ["RAY_TMPDIR"] = short
        try:
            main_ppo.main()
        finally:
            ray.shutdown()
    shutil.rmtree(logs)
    lock.close()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that Ray is taken down on the way out
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
