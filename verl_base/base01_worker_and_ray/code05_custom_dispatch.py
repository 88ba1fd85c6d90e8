"""A dispatch of one's own: rows are dispatched by length, so that no rank waits for another, and come back in order.

python -m base01_worker_and_ray.code05_custom_dispatch
"""

from cluster import local_cluster  # before Ray and verl: they read the environment that it sets

# isort: split
import ray
import torch
from verl import DataProto
from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup

from base01_worker_and_ray.code05_workers import Counter

lengths = torch.tensor([3, 5, 6, 8, 13, 20, 31, 64])
mask = (torch.arange(64) < lengths[:, None]).long()
batch = DataProto.from_dict({"attention_mask": mask})  # [rows, length]: row i has lengths[i] tokens

with local_cluster(2, "output_base01") as pool:
    group = RayWorkerGroup(pool, RayClassWithInitArgs(ray.remote(Counter)))
    halves, balanced = group.count(batch), group.count_balanced(batch)
    print("tokens of a row         ", *[f"{length:>3}" for length in lengths.tolist()], "  tokens of rank 0, 1")
    for name, counted in (("dispatched in halves", halves), ("dispatched by length", balanced)):
        ranks, tokens = counted.batch["rank"], counted.batch["tokens"]
        totals = [int(tokens[ranks == rank].sum()) for rank in range(2)]
        print(f"{name}: rank", *[f"{rank:>3}" for rank in ranks.tolist()], f" {totals}")
        assert torch.equal(tokens, lengths)  # in order again
print(f"proof: tokens per rank {totals}, rows in order")
