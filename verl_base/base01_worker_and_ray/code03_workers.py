"""What runs in the workers of lesson 3.

Worker classes stand in a module beside the program: Ray passes a class with verl's `register` on by its name, and the
program that is being run (`__main__`) has none that another process could import.
"""

import os

import torch
import torch.distributed as dist
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, Execute, register
from verl.utils.device import get_device_name
from verl.utils.distributed import initialize_global_process_group_ray

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Member(Worker):
    """One rank. `register` says to which ranks a call of the controller goes, and what comes back."""

    def __init__(self, team: str):
        super().__init__()  # reads rank and world size from the environment, where verl has put them
        self.team = team

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def introduce(self, word: str) -> dict[str, str]:
        """The same argument for every rank; the controller gets a list with every rank's result."""
        return {"said": f"{word}, {self.team}", "pid": os.getpid(), **{name: os.environ[name] for name in VARIABLES}}

    @register(dispatch_mode=Dispatch.ALL_TO_ALL, execute_mode=Execute.RANK_ZERO)
    def introduce_first(self, word: str) -> str:
        """Rank 0 alone."""
        return f"{word}, {self.team}, from rank {self.rank} of {self.world_size}"

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def add_up(self, amount: float) -> float:
        """amount * (rank + 1), summed by the ranks among themselves; they meet at MASTER_ADDR:MASTER_PORT."""
        initialize_global_process_group_ray()
        total = torch.tensor(amount * (self.rank + 1), device=get_device_name())
        dist.all_reduce(total)
        return total.item()
