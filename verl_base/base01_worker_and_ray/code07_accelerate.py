"""The same inference with Accelerate in the workers: the ranks split the prompts and gather the completions themselves.

python -m base01_worker_and_ray.code07_accelerate
"""

from pathlib import Path

from cluster import local_cluster  # before Ray and verl: they read the environment that it sets

# isort: split
import ray
from transformers import AutoModelForCausalLM
from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup

from base01_worker_and_ray.code07_workers import Generator
from base01_worker_and_ray.tiny_model import generate_greedily, make_prompts, save_tiny_model

path = str(Path("output_base01/model").resolve())
save_tiny_model(path)
prompts = make_prompts(5)
alone = generate_greedily(AutoModelForCausalLM.from_pretrained(path), **prompts)  # [prompts, 12], by this process

with local_cluster(2, "output_base01") as pool:
    group = RayWorkerGroup(pool, RayClassWithInitArgs(ray.remote(Generator), path=path))
    results = group.generate_sequences(prompts)  # ONE_TO_ALL: every rank gets all prompts; no padding is needed
for result in results:
    print(f"rank {result['rank']}: answered {result['own']} prompts itself and has {len(result['all'])} completions")
    assert result["all"] == alone.tolist()
own = [result["own"] for result in results]
print(f"proof: {own} prompts per rank; both ranks have all {len(alone)} completions, equal to those of one process")
