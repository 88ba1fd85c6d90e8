"""What runs in the Ray workers: verl's TrainingWorker over FSDP2, which here also samples replies."""

from pathlib import Path

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.cache_utils import DynamicLayer
from verl import DataProto
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.fsdp_utils import get_fsdp_full_state_dict
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

from layers import PreallocatedLayer, SampledTokens
from shared_prompt import read_prompts, unsharded  # and with it, the engine is registered

STRETCH = 16  # tokens between two looks at which replies are finished
SAMPLED_AT_ONCE = 8  # times the tokens of a training pass that are sampled at once, since sampling keeps no activations


@torch.no_grad()
def sample_replies(model, input_ids, attention_mask, n: int, reply_length: int, tokenizer, temperature):
    """n replies to each prompt, sampled from all tokens by Transformers' generate, but for three things.

    A prompt's keys and values are computed once and then shared by its replies. generate would go on with a finished
    reply until the last one is finished: it is called for STRETCH tokens at a time, and goes on with the unfinished
    ones. And it would take what isn't said here from what the model's folder recommends for chatting (top_p,
    repetition_penalty), so that is put aside.

    Args:
        input_ids, attention_mask: [prompts, prompt length], padded on the left.
        temperature: a number, or one for each reply [prompts * n, 1].

    Returns:
        Tokens [prompts * n, reply_length], padded after their EOS, and their log-probabilities at that temperature; a
        prompt's replies follow one another.
    """
    cache = read_prompts(model, input_ids, attention_mask)
    cache.batch_repeat_interleave(n)
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = PreallocatedLayer(layer, STRETCH)
    sequences, mask = input_ids.repeat_interleave(n, 0), attention_mask.repeat_interleave(n, 0)
    temperature = torch.as_tensor(temperature, device=sequences.device).expand(len(sequences), 1)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    responses = sequences.new_full((len(sequences), reply_length), pad)
    log_probs = torch.zeros(responses.shape, device=responses.device)
    unfinished = torch.arange(len(sequences), device=responses.device)
    recommended, model.generation_config = model.generation_config, GenerationConfig()
    for start in range(0, reply_length, STRETCH):
        sampled = SampledTokens(temperature)
        length = min(STRETCH, reply_length - start)
        sequences = model.generate(
            input_ids=sequences,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=GenerationConfig(max_new_tokens=length, eos_token_id=eos, pad_token_id=pad),
            logits_processor=LogitsProcessorList([sampled]),
            synced_gpus=False,  # the model is whole in every process, which goes on by itself
        )
        said = sequences[:, input_ids.shape[1] + start :]
        responses[unfinished, start : start + said.shape[1]] = said
        log_probs[unfinished, start : start + said.shape[1]] = torch.cat(sampled.log_probs, dim=1)
        goes_on = (said != eos).all(1)
        if not goes_on.any():
            break
        unfinished, sequences, temperature = unfinished[goes_on], sequences[goes_on], temperature[goes_on]
        mask = torch.nn.functional.pad(mask[goes_on], (0, said.shape[1]), value=1)
        cache.batch_select_indices(goes_on)
    model.generation_config = recommended
    return responses, log_probs


class PolicyWorker(TrainingWorker):
    """TrainingWorker and the two things that it lacks for reinforcement learning: rollouts and a model to take away.

    Args:
        tokenizer: its EOS ends a reply, so it is the driver's own and not what the model's folder says.
        reply_length: every reply has so many places; what comes after its EOS is padding and masked out.
    """

    def __init__(self, config: TrainingWorkerConfig, tokenizer, reply_length: int):
        super().__init__(config)
        self.tokenizer, self.reply_length = tokenizer, reply_length

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def generate_sequences(self, prompts: DataProto) -> DataProto:
        """Samples `meta_info["n"]` replies to each of this rank's prompts.

        Args:
            prompts: `input_ids`, `attention_mask` [prompts, prompt length]; `n`, `temperature` and `seed` in meta_info.

        Returns:
            `prompts`, `responses`, `response_mask`, `old_log_probs` [replies, length], and `input_ids`,
            `attention_mask`, `position_ids` of both together.
        """
        n, temperature, seed = (prompts.meta_info[key] for key in ("n", "temperature", "seed"))
        torch.manual_seed(seed * self.world_size + self.rank)  # so a resumed run samples what this one does
        prompts = prompts.to(self.engine.module.device)
        ids, mask = prompts.batch["input_ids"], prompts.batch["attention_mask"]
        tokens = n * (ids.shape[1] + self.reply_length)
        at_once = max(1, SAMPLED_AT_ONCE * self.engine_config.infer_max_token_len_per_gpu // tokens)
        with self.engine.eval_mode(), unsharded(self.engine.module):
            parts = [
                sample_replies(self.engine.module, *part, n, self.reply_length, self.tokenizer, temperature)
                for part in zip(ids.split(at_once), mask.split(at_once), strict=True)
            ]
        responses, log_probs = (torch.cat(part) for part in zip(*parts, strict=True))
        is_eos = responses == self.tokenizer.eos_token_id
        response_mask = (is_eos.cumsum(1) - is_eos.long() == 0).long()  # the first EOS is said, too
        ids, mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
        attention_mask = torch.cat([mask, response_mask], dim=1)
        return DataProto.from_dict(
            tensors={
                "prompts": ids,
                "responses": responses,
                "response_mask": response_mask,
                "old_log_probs": log_probs * response_mask,
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
            for name in ("adapter_*", "model*.safetensors*"):  # of a run before this one: an adapter would be preferred
                for old in Path(path).glob(name):
                    old.unlink()
            self.engine.module.save_pretrained(path, state_dict=state)
            self.tokenizer.save_pretrained(path)
        torch.distributed.barrier()
