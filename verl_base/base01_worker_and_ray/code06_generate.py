"""Batched inference: each worker holds the model and answers its share of the prompts.

python -m base01_worker_and_ray.code06_generate
"""

from pathlib import Path

from cluster import local_cluster  # before Ray and verl: they read the environment that it sets

# isort: split
import ray
import torch
from transformers import AutoModelForCausalLM
from verl import DataProto
from verl.protocol import pad_dataproto_to_divisor, unpad_dataproto
from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup

from base01_worker_and_ray.code06_workers import Generator
from base01_worker_and_ray.tiny_model import generate_greedily, make_prompts, save_tiny_model

path = str(Path("output_base01/model").resolve())
save_tiny_model(path)
prompts = make_prompts(5)
alone = generate_greedily(AutoModelForCausalLM.from_pretrained(path), **prompts)  # [prompts, 12], by this process

with local_cluster(2, "output_base01") as pool:
    group = RayWorkerGroup(pool, RayClassWithInitArgs(ray.remote(Generator), path=path))
    batch, pad_size = pad_dataproto_to_divisor(DataProto.from_dict(prompts), group.world_size)
    completions = unpad_dataproto(group.generate_sequences(batch), pad_size)
for row, (rank, completion) in enumerate(zip(completions.batch["rank"], completions.batch["responses"], strict=True)):
    print(f"prompt {row}: rank {rank}: {completion.tolist()}")
assert torch.equal(completions.batch["responses"], alone)
print(f"proof: {alone.numel()} tokens in {len(alone)} completions by 2 workers, all equal to those of one process")
