"""What runs in the workers of lesson 5, and the two functions that the controller runs before and after the call."""

import torch
from verl import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions


def dispatch_by_length(worker_group, data: DataProto) -> tuple[tuple, dict]:
    """On the way out: rows for each rank, so that their tokens add up to nearly the same everywhere.

    By Karmarkar and Karp's differencing method, with which verl's trainers balance their batches, too.

    Returns:
        Positional and keyword arguments of the call, each a list with one entry a rank.
    """
    lengths = data.batch["attention_mask"].sum(1).tolist()
    shares = get_seqlen_balanced_partitions(lengths, worker_group.world_size, equal_size=False)
    return ([data[rows].union(DataProto.from_dict({"row": torch.tensor(rows)})) for rows in shares],), {}


def collect_in_order(worker_group, outputs: list[DataProto]) -> DataProto:
    """On the way back: one output a rank -> one output, its rows in the order of the input."""
    output = DataProto.concat(outputs)
    output.reorder(output.batch["row"].argsort())
    return output


class Counter(Worker):
    """The same work under two ways of dispatching rows."""

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def count(self, data: DataProto) -> DataProto:
        """`attention_mask` [rows, length] -> `tokens` [rows] and the `rank` [rows] that counted them."""
        tokens = data.batch["attention_mask"].sum(1)
        return DataProto.from_dict({"tokens": tokens, "rank": torch.full_like(tokens, self.rank)})

    @register(dispatch_mode={"dispatch_fn": dispatch_by_length, "collect_fn": collect_in_order})
    def count_balanced(self, data: DataProto) -> DataProto:
        return self.count(data).union(data.select(batch_keys=["row"]))
