"""Ray on this machine only, and verl without a GPU. Import this before Ray and verl: they read the environment then."""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ON_GPU = torch.cuda.is_available()
os.environ |= {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's own way to listen on 127.0.0.1 and nowhere else
    "RAY_AUTH_MODE": "token",  # other users of this machine can't send it work
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # known to this run only; else it is written to the home folder
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_prestart_worker_first_driver": "0",  # verl's workers have an environment each and can't use idle ones
    "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),  # for the workers
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.setdefault("VERL_LOGGING_LEVEL", "ERROR")
if not ON_GPU:
    os.environ |= {
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "cpu_platform",
        "VERL_ENGINE_DEVICE": "cuda",  # the FSDP engine is registered under this name only, but works on any device
        "GLOO_SOCKET_IFNAME": "lo",
    }
    os.environ.setdefault("OMP_NUM_THREADS", "1")

warnings.filterwarnings("ignore", module="verl.workers.engine")  # tells of engines that nobody asked for
# torch.nested asks torch.fx whether it is tracing, which torch 2.13 comments on, once a process.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)

import ray  # noqa: E402
from verl.single_controller.ray import RayResourcePool  # noqa: E402

from rows import UserError  # noqa: E402


@contextlib.contextmanager
def local_cluster(processes: int, output_dir: str | Path):
    """A Ray of this process's own, for so many workers; it ends with the block, however that is left.

    Listens on 127.0.0.1, has no dashboard, and writes its logs to `output_dir`/ray, which go when all went well.

    Yields:
        The pool of `processes` places, one GPU each where there are GPUs.

    Raises:
        UserError: more processes than GPUs, or than cores.
    """
    places = torch.cuda.device_count() if ON_GPU else len(os.sched_getaffinity(0))
    if not 1 <= processes <= places:
        kind = "GPUs" if ON_GPU else "CPU cores"
        raise UserError(f"{processes} processes asked for, but there are {places} {kind}; give --nproc / NPROC.")
    logs = Path(output_dir).resolve() / "ray"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="ray-") as short:  # a socket's path has at most 107 characters
        link = Path(short, "r")
        link.symlink_to(logs)
        try:
            ray.init(
                num_cpus=processes,
                num_gpus=processes if ON_GPU else 0,
                include_dashboard=False,
                object_store_memory=512 << 20,
                log_to_driver=False,
                logging_level="error",
                _temp_dir=str(link),
            )
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # after init, which takes the signal for itself
            yield RayResourcePool([processes], use_gpu=ON_GPU, max_colocate_count=1)
        finally:
            ray.shutdown()
    shutil.rmtree(logs)
