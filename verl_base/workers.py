"""What runs in the Ray workers: verl's TrainingWorker over FSDP2, which here also samples completions."""

from pathlib import Path

import torch
from transformers import GenerationConfig, PretrainedConfig
from verl import DataProto
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils import tensordict_utils as tu
from verl.utils.fsdp_utils import get_fsdp_full_state_dict
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

from rollout import sample_completions, unsharded


def switch_off_dropout(model) -> list[tuple[PretrainedConfig, str, float]]:
    """In every pass: completions are sampled without it, and a policy that hasn't changed must have a ratio of 1.

    The training mode itself stays, since gradient checkpointing asks for it. Modules of Transformers keep the
    probability of a functional dropout in an attribute (attention_dropout, dropout, layerdrop ...), or read it from
    their config in each pass, as Persimmon's attention does.

    Returns:
        Config, name and value of what the configs said, which a saved model should go on saying.
    """
    modules = list(model.modules())
    for module in modules:
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    configs = [getattr(module, "config", None) for module in modules]
    configs = list({id(config): config for config in configs if isinstance(config, PretrainedConfig)}.values())
    said = [(config, *pair) for config in configs for pair in vars(config).items()]
    said = [(config, name, value) for config, name, value in said if "drop" in name and isinstance(value, float)]
    for owner in modules + configs:
        for name, value in vars(owner).items():
            if "drop" in name and isinstance(value, float):
                setattr(owner, name, 0.0)
    return said


def make_savable(config: GenerationConfig) -> None:
    """Values for sampling without a word on do_sample mean to sample; saving refuses them else (transformers#29988)."""
    if config.do_sample is None and config.temperature:
        config.do_sample = True
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None


class PolicyWorker(TrainingWorker):
    """TrainingWorker, and what it lacks for reinforcement learning: rollouts, a model to take away, no dropout.

    Args:
        tokenizer: the driver's own, whose EOS may not be the one that the model's folder names.
        stop_tokens: a list of those that end a completion.
        completion_length: every completion has so many places; what comes after its end is padding and masked out.
        fast: whether this process takes `fast_path.py`, for its other roles too.
    """

    def __init__(
        self, config: TrainingWorkerConfig, tokenizer, stop_tokens: list[int], completion_length: int, fast: bool
    ):
        self.sample, self.sampled_at_once = sample_completions, config.engine_config.infer_max_token_len_per_gpu
        if fast:
            import fast_path

            fast_path.install()
            self.sample = fast_path.sample_completions
            self.sampled_at_once *= fast_path.SAMPLED_AT_ONCE
        super().__init__(config)
        self.tokenizer, self.stop_tokens, self.completion_length = tokenizer, stop_tokens, completion_length

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def reset(self) -> None:
        super().reset()
        self.dropout = switch_off_dropout(self.engine.module)
        make_savable(self.engine.module.generation_config)

    def train_batch(self, data):
        """One optimizer step, unless no token of the mini-batch, of all ranks together, is there to learn from.

        Its loss would be 0 / 0, or AdamW would move on by its momentum. The learning rate's schedule goes on.
        """
        tokens = data["response_mask"].sum().to(self.engine.module.device)
        torch.distributed.all_reduce(tokens, group=self.engine.get_data_parallel_group())
        if tokens > 0:
            return super().train_batch(data)
        metrics = {"skipped": 1}
        if tu.get(data, key="update_lr_scheduler", default=False):
            metrics["lr"] = self.engine.lr_scheduler_step()
        return tu.get_tensordict(tensor_dict={}, non_tensor_dict={"metrics": metrics})

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def generate_sequences(self, prompts: DataProto) -> DataProto:
        """Samples `meta_info["n"]` completions to each of this rank's prompts.

        Args:
            prompts: `input_ids`, `attention_mask` [prompts, prompt length]; `n`, `temperature` and `seed` in meta_info.

        Returns:
            `prompts`, `responses`, `response_mask`, `old_log_probs` [completions, length], and `input_ids`,
            `attention_mask`, `position_ids` of both together; `finished` [completions], whether a stop token was said.
        """
        n, temperature, seed = (prompts.meta_info[key] for key in ("n", "temperature", "seed"))
        torch.manual_seed(seed * self.world_size + self.rank)  # so a resumed run samples what this one does
        prompts = prompts.to(self.engine.module.device)
        ids, mask = prompts.batch["input_ids"], prompts.batch["attention_mask"]
        tokens = n * (ids.shape[1] + self.completion_length)
        at_once = max(1, self.sampled_at_once // tokens)
        with self.engine.eval_mode(), unsharded(self.engine.module):
            parts = [
                self.sample(
                    self.engine.module,
                    *part,
                    n,
                    self.completion_length,
                    self.stop_tokens,
                    self.tokenizer.pad_token_id,
                    temperature,
                )
                for part in zip(ids.split(at_once), mask.split(at_once), strict=True)
            ]
        responses, log_probs = (torch.cat(part) for part in zip(*parts, strict=True))
        is_stop = torch.isin(responses, torch.tensor(self.stop_tokens, device=responses.device))
        response_mask = (is_stop.cumsum(1) - is_stop.long() == 0).long()  # the first of them is said, too
        ids, mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
        attention_mask = torch.cat([mask, response_mask], dim=1)
        return DataProto.from_dict(
            tensors={
                "prompts": ids,
                "responses": responses,
                "response_mask": response_mask,
                "old_log_probs": log_probs * response_mask,
                "finished": is_stop.any(1),
                "input_ids": torch.cat([ids, responses], dim=1),
                "attention_mask": attention_mask,
                "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
            }
        ).to("cpu")

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_model(self, path: str) -> None:
        """Writes the whole model, or with LoRA its adapter, and the tokenizer, for any Transformers program."""
        state = get_fsdp_full_state_dict(self.engine.module, offload_to_cpu=True, rank0_only=True)
        if self.rank == 0:
            self.engine.module.generation_config.eos_token_id = self.stop_tokens  # for who serves or asks it later
            for config, name, value in self.dropout:  # for who trains it further
                setattr(config, name, value)
            for name in ("adapter_*", "model*.safetensors*"):  # of a run before this one: an adapter would be preferred
                for old in Path(path).glob(name):
                    old.unlink()
            GenerationConfig(eos_token_id=self.stop_tokens).save_pretrained(path)  # a whole model writes its own
            self.engine.module.save_pretrained(path, state_dict=state)
            switch_off_dropout(self.engine.module)
            self.tokenizer.save_pretrained(path)
        torch.distributed.barrier()
