"""What runs in the workers of lesson 6."""

import torch
from transformers import AutoModelForCausalLM
from verl import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.device import get_device_name

from base01_worker_and_ray.tiny_model import generate_greedily


class Generator(Worker):
    """The whole model on every rank; verl dispatches the prompts."""

    def __init__(self, path: str):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(get_device_name())

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def generate_sequences(self, prompts: DataProto) -> DataProto:
        """`input_ids`, `attention_mask` [prompts, length] -> `responses` [prompts, 12], `rank` [prompts]."""
        responses = generate_greedily(self.model, prompts.batch["input_ids"], prompts.batch["attention_mask"])
        return DataProto.from_dict({"responses": responses, "rank": torch.full((len(prompts),), self.rank)})
