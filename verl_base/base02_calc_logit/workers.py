"""What runs in the workers: verl's TrainingWorker, and two questions that it can't answer by itself."""

import torch
from verl import DataProto
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.padding import no_padding_2_padding


class LogitsWorker(TrainingWorker):
    """One rank of a model that FSDP2 has cut up: of every parameter it holds the rows of its own."""

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def get_logits(self, batch: DataProto) -> DataProto:
        """`input_ids`, `attention_mask`, `position_ids` [rows, length] -> `logits` [rows, length, vocabulary]."""
        inputs = batch.select(batch_keys=["input_ids", "attention_mask", "position_ids"])
        with torch.no_grad(), self.engine.eval_mode():
            inputs = inputs.to(self.engine.module.device)
            logits = self.engine.module(**inputs.batch, use_cache=False).logits  # layer by layer gathered, then let go
        return DataProto.from_dict({"logits": logits.float().cpu()})

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def count_bytes(self) -> dict[str, int]:
        """What this rank holds of the parameters, and what all of them take."""
        parameters = list(self.engine.module.parameters())
        return {"held": sum(p.to_local().nbytes for p in parameters), "all": sum(p.nbytes for p in parameters)}


def negative_log_likelihood(model_output, data, dp_group=None) -> tuple[torch.Tensor, dict]:
    """A loss as verl's engine wants it: the mean over the response tokens of the whole batch, and metrics.

    The gradients are averaged over the `dp_size` ranks afterwards, hence the factor.
    """
    log_probs = no_padding_2_padding(model_output["log_probs"], data)  # [rows, response length]
    return -(log_probs * data["response_mask"]).sum() / data["batch_num_tokens"] * data["dp_size"], {}
