"""What runs in the workers of lesson 4."""

import numpy as np
from verl import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register


class Scorer(Worker):
    """Each rank gets its share of the rows."""

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def score(self, data: DataProto) -> DataProto:
        """`input_ids` [rows, length] and meta_info's `scale` -> `scores` [rows] and `by`, the rank they come from."""
        scores = data.batch["input_ids"].sum(1) * data.meta_info["scale"]
        by = np.array([f"rank {self.rank}"] * len(data), dtype=object)
        return DataProto.from_dict(tensors={"scores": scores}, non_tensors={"by": by})
