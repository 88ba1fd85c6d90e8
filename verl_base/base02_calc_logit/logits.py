"""Logits and log-probabilities of one model in two ways: whole, by Transformers, and cut up over verl's workers."""

import logging

import ray
import torch
from transformers import AutoModelForCausalLM
from verl import DataProto
from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

from base01_worker_and_ray.tiny_model import make_prompts
from base02_calc_logit.workers import LogitsWorker, negative_log_likelihood

logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # torch warns of what torch.nested does itself


def make_batch(rows: int = 8, response_length: int = 16) -> DataProto:
    """Prompts padded on the left, responses of 4 to 16 random tokens padded on the right, as a trainer has them."""
    prompts, prompt_mask = make_prompts(rows).values()
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(4, response_length + 1, (rows, 1), generator=generator)
    response_mask = (torch.arange(response_length) < lengths).long()
    responses = torch.randint(1, 512, (rows, response_length), generator=generator) * response_mask
    attention_mask = torch.cat([prompt_mask, response_mask], dim=1)
    return DataProto.from_dict(
        tensors={
            "prompts": prompts,
            "responses": responses,
            "response_mask": response_mask,
            "input_ids": torch.cat([prompts, responses], dim=1),
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        },
        meta_info={"temperature": 1.0},
    )


def plain_logits(path: str, batch: DataProto) -> torch.Tensor:
    """Transformers by itself: [rows, length, vocabulary]. In fp32, whatever the folder's config.json says."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    inputs = batch.select(batch_keys=["input_ids", "attention_mask", "position_ids"]).to(get_device_name())
    with torch.no_grad():
        return model.to(get_device_name())(**inputs.batch).logits.cpu()


def plain_log_probs(logits: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    """[rows, length, vocabulary] -> [rows, response length]: the logits at a place are about the token after it.

    In float64, so that a comparison shows the rounding of the other side only.
    """
    log_probs = torch.log_softmax(logits[:, -responses.shape[1] - 1 : -1].double(), dim=-1)
    return log_probs.gather(-1, responses[..., None]).squeeze(-1)


def start_workers(pool, path: str) -> RayWorkerGroup:
    """The model at `path` in fp32, one part on each rank of the pool."""
    config = TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            path=path,
            load_tokenizer=False,
            use_remove_padding=False,
            enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "sdpa"},
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
            use_torch_compile=False,
            max_token_len_per_gpu=1024,
            infer_max_token_len_per_gpu=1024,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        checkpoint_config=CheckpointConfig(save_contents=["model", "optimizer", "extra", "hf_model"]),
    )
    workers = RayWorkerGroup(pool, RayClassWithInitArgs(ray.remote(LogitsWorker), config=config))
    workers.reset()  # loads the model
    workers.set_loss_fn(negative_log_likelihood)
    return workers


def without_padding(batch: DataProto):
    """The form of verl's engines: every sequence as long as it is, in one nested tensor."""
    return left_right_2_no_padding(batch.to_tensordict())


def sharded_logits(workers: RayWorkerGroup, batch: DataProto) -> torch.Tensor:
    """[rows, length, vocabulary]; the rows are dispatched to the ranks and come back in order."""
    return workers.get_logits(batch).batch["logits"]


def sharded_log_probs(workers: RayWorkerGroup, batch: DataProto) -> torch.Tensor:
    """[rows, response length], by verl's own way: a call to `infer_batch` gives a future, hence `get`."""
    data = without_padding(batch)
    tu.assign_non_tensor(data, calculate_entropy=False, compute_loss=False)
    return no_padding_2_padding(tu.get(workers.infer_batch(data).get(), "log_probs"), data)


def train_one_step(workers: RayWorkerGroup, batch: DataProto) -> float:
    """AdamW on all rows; returns the loss before it."""
    data = without_padding(batch)
    tu.assign_non_tensor(data, calculate_entropy=False, global_batch_size=len(batch), compute_loss=True)
    return tu.get(workers.train_batch(data).get(), "metrics")["loss"]


def largest_difference(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> float:
    """Over the places [rows, length] that aren't padding."""
    return (a - b)[mask.bool()].abs().max().item()
