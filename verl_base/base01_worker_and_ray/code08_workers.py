"""What runs in the workers of lesson 8."""

import os

import torch
from transformers import AutoModelForCausalLM
from verl import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.device import get_device_name

from base01_worker_and_ray.tiny_model import compute_log_probs


class Policy(Worker):
    """The model in one of its roles: the actor, which learns, or the reference, which stays as it was."""

    def __init__(self, path: str):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(get_device_name())

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def get_pid(self) -> int:
        return os.getpid()

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def compute_log_probs(self, data: DataProto) -> DataProto:
        """`input_ids` [rows, length] -> `log_probs` [rows, length - 1]."""
        with torch.no_grad():
            return DataProto.from_dict({"log_probs": compute_log_probs(self.model, data.batch["input_ids"]).cpu()})

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def learn(self, input_ids: torch.Tensor, learning_rate: float) -> float:
        """One step of gradient descent; all ranks take it on the same rows [rows, length], and so stay alike."""
        loss = -compute_log_probs(self.model, input_ids).mean()
        loss.backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter -= learning_rate * parameter.grad
        self.model.zero_grad()
        return loss.item()
