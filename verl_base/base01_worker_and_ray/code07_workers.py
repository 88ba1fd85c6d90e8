"""What runs in the workers of lesson 7."""

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import AutoModelForCausalLM
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.device import get_device_name

from base01_worker_and_ray.tiny_model import generate_greedily


class Generator(Worker):
    """The whole model on every rank; Accelerate assigns the prompts."""

    def __init__(self, path: str):
        super().__init__()
        self.state = PartialState(cpu=get_device_name() == "cpu")  # joins the ranks by what verl put in the environment
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(self.state.device)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def generate_sequences(self, prompts: dict[str, torch.Tensor]) -> dict:
        """All prompts [prompts, length] on every rank; each answers its share, and has all completions in the end."""
        with self.state.split_between_processes(prompts) as share:
            responses = generate_greedily(self.model, **share).tolist()
        return {"rank": self.state.process_index, "own": len(responses), "all": gather_object(responses)}
