"""DataProto, verl's batch, and DP_COMPUTE_PROTO: rows are dispatched to the ranks, results come back in the same order.

python -m base01_worker_and_ray.code04_data_proto
"""

from cluster import local_cluster  # before Ray and verl: they read the environment that it sets

# isort: split
import numpy as np
import ray
import torch
from verl import DataProto
from verl.protocol import pad_dataproto_to_divisor, unpad_dataproto
from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup

from base01_worker_and_ray.code04_workers import Scorer

batch = DataProto.from_dict(
    tensors={"input_ids": torch.arange(10).view(5, 2)},  # [rows, length]
    non_tensors={"name": np.array(list("abcde"), dtype=object)},  # one Python object a row
    meta_info={"scale": 10},  # one for all rows
)
with local_cluster(2, "output_base01") as pool:
    group = RayWorkerGroup(pool, RayClassWithInitArgs(ray.remote(Scorer)))

    try:
        group.score(batch)
    except AssertionError as error:
        print(f"5 rows on 2 ranks: {error}")

    padded, pad_size = pad_dataproto_to_divisor(batch, group.world_size)  # repeats rows from the start
    print(f"padded by {pad_size} to {len(padded)} rows:", *padded.non_tensor_batch["name"])
    scores = unpad_dataproto(group.score(padded), pad_size)  # without the row that was repeated
    batch = batch.union(scores)  # the columns of both, side by side
    for row in range(len(batch)):
        item = batch[row]
        print(f"  {item.non_tensor_batch['name']} {item.batch['input_ids'].tolist()} -> ", end="")
        print(f"{item.batch['scores']:>3} by {item.non_tensor_batch['by']}")
    assert batch.batch["scores"].tolist() == [10, 50, 90, 130, 170]
    assert batch.non_tensor_batch["by"].tolist() == ["rank 0"] * 3 + ["rank 1"] * 2

    samples = batch.select(batch_keys=["input_ids"], non_tensor_batch_keys=["name"]).repeat(2, interleave=True)
    scores = group.score(samples)
    print("every row twice, as for two samples of one prompt:")
    print("  names", *samples.non_tensor_batch["name"])
    print("  ranks", *[by[-1] for by in scores.non_tensor_batch["by"]])
    assert "".join(samples.non_tensor_batch["name"]) == "aabbccddee"
    assert scores.batch["scores"].tolist() == [score for score in (10, 50, 90, 130, 170) for _ in range(2)]
print("proof: scores 10 50 90 130 170 in the order of the rows, 3 by rank 0 and 2 by rank 1")
