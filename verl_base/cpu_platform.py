"""verl's platform "cpu": what verl 0.9 lacks to run without a GPU. `cluster.py` has every process load it first.

verl knows NVIDIA, AMD and Ascend. Its plug-in interface (`verl.plugin.platform`) takes further ones by name; beside
that, three places expect an accelerator and are replaced at the end of this file.
"""

import contextlib
import os
import socket
import types
from datetime import timedelta

import psutil
import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry
from verl.utils import distributed, fsdp_utils


class CpuModule(types.ModuleType):
    """torch.cpu, and beside it what verl calls on torch.cuda without asking."""

    def __getattr__(self, name):
        return getattr(torch.cpu, name)

    def is_available(self) -> bool:
        return False  # "there is an accelerator": DataProto and the RNG's helpers ask this

    def get_device_name(self, *_) -> str:
        return "CPU"

    def get_rng_state(self, *_) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state, *_) -> None:
        torch.set_rng_state(state)

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def memory_allocated(self, *_) -> int:
        """Bytes of this process; the peak is the same figure, as the system keeps no other."""
        return psutil.Process().memory_info().rss

    memory_reserved = max_memory_allocated = max_memory_reserved = memory_allocated

    def mem_get_info(self, *_) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def set_device(self, *_) -> None: ...

    empty_cache = synchronize = reset_peak_memory_stats = set_device


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """Every method that `PlatformBase` asks for; collectives go over gloo."""

    device_name = vendor_name = "cpu"
    device_module = CpuModule("cpu_module")

    def is_available(self):
        return True

    def current_device(self):
        return torch.device("cpu")

    def device_count(self):
        return 1

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self):
        return "CPU"

    def ray_resource_options(self, num_gpus):
        return {"num_cpus": num_gpus}

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    @contextlib.contextmanager
    def nvtx_range(self, msg):
        yield

    def nothing(self, *_): ...

    set_device = synchronize = set_allocator_settings = empty_cache = nothing
    profiler_start = profiler_stop = cudart = nothing


def init_gloo(timeout_second: float | None = None) -> tuple[int, int, int]:
    """torch.distributed over gloo, once a process; verl would ask for "cpu:gloo,cpu:gloo", which torch refuses.

    Returns:
        Local rank, rank and world size, from the environment.
    """
    local_rank, rank, world_size = (int(os.environ.get(key, 0)) for key in ("LOCAL_RANK", "RANK", "WORLD_SIZE"))
    if not torch.distributed.is_initialized():
        timeout = timedelta(seconds=timeout_second or 1800)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        listener = None
        if rank == 0:  # torch's own store would listen on every interface
            listener = socket.create_server((address, port)).detach()
        store = torch.distributed.TCPStore(
            address, port, world_size, is_master=rank == 0, timeout=timeout, master_listen_fd=listener
        )
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    return local_rank, rank, world_size


if os.environ.get("VERL_PLATFORM") == "cpu":
    distributed.initialize_global_process_group = init_gloo
    distributed.initialize_global_process_group_ray = init_gloo
    # A frozen model is put to pinned memory on the CPU, which needs an accelerator; here it is there already.
    fsdp_utils.CPUOffloadPolicy = lambda *args, **kwargs: None
