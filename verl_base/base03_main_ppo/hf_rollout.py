"""Completions without vLLM or SGLang: `actor_rollout_ref.rollout.name=hf` samples them with Transformers' generate.

verl looks for a rollout in two registries: a `BaseRollout` in each training process hands new weights over, and a
`RolloutReplica` starts the server that answers with them. VERL_USE_EXTERNAL_MODULES has every process load this file.
"""

import asyncio
import itertools
import os

import ray
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

from tokenizer import find_stop_tokens, read_generation_config


@ray.remote(num_cpus=0)
class HFServer:
    """A copy of the policy; requests that come together are answered as one batch.

    Args:
        completion_length: tokens; a completion is cut off there.
        batch_size: requests that are sampled at once.
    """

    def __init__(self, path: str, completion_length: int, batch_size: int, seed: int):
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        self.completion_length, self.batch_size = completion_length, batch_size
        self.stop_tokens = find_stop_tokens(self.tokenizer, read_generation_config(path, trust_remote_code=False))
        self.requests, self.version = [], None

    def load_weights(self, weights: dict[str, torch.Tensor], version: int) -> None:
        self.model.load_state_dict(weights)
        self.version = version

    async def generate(self, request_id, prompt_ids: list[int], sampling_params: dict, **_) -> TokenOutput:
        completion = asyncio.get_running_loop().create_future()
        self.requests.append((prompt_ids, sampling_params["temperature"], completion))
        if len(self.requests) == 1:
            self.answering = asyncio.create_task(self.answer())
        return await completion

    async def answer(self) -> None:
        """Waits until no more requests come, then answers all of them."""
        seen = 0
        while seen < len(self.requests):
            seen = len(self.requests)
            await asyncio.sleep(0.02)
        requests, self.requests = iter(self.requests), []
        while batch := list(itertools.islice(requests, self.batch_size)):
            prompts, temperatures, completions = zip(*batch, strict=True)
            try:
                outputs = await asyncio.to_thread(self.sample, prompts, temperatures)
            except Exception as error:
                for completion in completions:
                    completion.set_exception(error)
            else:
                for completion, output in zip(completions, outputs, strict=True):
                    completion.set_result(output)

    def sample(self, prompts: list[list[int]], temperatures: list[float]) -> list[TokenOutput]:
        """One completion to each prompt, with the log-probabilities of its tokens at its temperature."""
        from fast_path import sample_completions

        inputs = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        temperature = torch.tensor(temperatures)[:, None].clamp(min=1e-5)  # 0: the likeliest token
        tokens, log_probs = sample_completions(
            self.model,
            inputs["input_ids"],
            inputs["attention_mask"],
            1,
            self.completion_length,
            self.stop_tokens,
            self.tokenizer.pad_token_id,
            temperature,
        )
        outputs = []
        for ids, values in zip(tokens.tolist(), log_probs.tolist(), strict=True):
            length = next((place for place, token in enumerate(ids, 1) if token in self.stop_tokens), len(ids))
            outputs.append(
                TokenOutput(
                    token_ids=ids[:length],
                    log_probs=values[:length],
                    stop_reason="completed",
                    extra_fields={"global_steps": self.version},
                )
            )
        return outputs


class HFRollout(base.BaseRollout):
    """In a training process: gathers the weights and gives them to the server that this process belongs to."""

    async def update_weights(self, weights, global_steps=None, peft_config=None, **_):
        if peft_config is not None:
            raise NotImplementedError(
                "rollout.name=hf takes whole weights; give actor_rollout_ref.model.lora.merge=True"
            )
        weights = {name: tensor.cpu() for name, tensor in weights}  # gathered by all processes together
        replica_rank, rank_in_replica = divmod(int(os.environ["RANK"]), self.config.tensor_model_parallel_size)
        if rank_in_replica == 0:
            await ray.get_actor(f"hf_server_{replica_rank}").load_weights.remote(weights, global_steps)

    async def resume(self, tags): ...

    async def release(self): ...


class HFReplica(RolloutReplica):
    """In verl's driver: starts a server. It has no memory to give back, so it doesn't sleep."""

    async def launch_servers(self):
        for sampling in (self.config, self.config.val_kwargs):
            if sampling.top_p < 1 or sampling.top_k > 0:
                raise NotImplementedError("rollout.name=hf samples from all tokens; leave top_p=1 and top_k=-1")
        name = f"hf_server_{self.replica_rank}"
        self._server_handle = HFServer.options(name=name, max_concurrency=self.max_concurrency).remote(
            self.model_config.path,
            self.config.response_length,
            self.config.max_num_seqs,
            self.config.seed + self.replica_rank,
        )
        self._server_address, self.servers = name, [self._server_handle]

    async def sleep(self): ...

    async def wake_up(self): ...


base._ROLLOUT_REGISTRY["hf", "async"] = f"{__name__}.HFRollout"
RolloutReplicaRegistry.register("hf", lambda: HFReplica)
