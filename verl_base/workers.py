"""What runs in the Ray workers: verl's TrainingWorker over FSDP2, which here also samples replies."""

import copy

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from verl import DataProto
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.fsdp_utils import get_fsdp_full_state_dict
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

from shared_prompt import read_prompts, unsharded  # and with it, the engine is registered

STRETCH = 8  # tokens between two looks at which replies are finished


class RecordLogProbs(LogitsProcessor):
    """Scales logits by the temperature and keeps the log-probability of each token that is then sampled.

    What generate could return for this is the logits of all steps, vocabulary-wide; this keeps one step's.
    """

    def __init__(self, temperature):
        self.temperature, self.distribution, self.log_probs = temperature, None, []

    def __call__(self, input_ids, scores):
        self.record(input_ids)
        self.distribution = torch.log_softmax(scores.float() / self.temperature, dim=-1)
        return self.distribution

    def record(self, input_ids) -> None:
        if self.distribution is not None:
            self.log_probs.append(self.distribution.gather(-1, input_ids[:, -1:]))


@torch.no_grad()
def sample_replies(model, input_ids, attention_mask, n: int, settings: GenerationConfig, temperature):
    """n replies to each prompt; a prompt's keys and values are computed once and then shared by its n replies.

    generate goes on with a finished reply until the last one is finished. Here it is called for STRETCH tokens at a
    time, and goes on with the unfinished ones.

    Args:
        input_ids, attention_mask: [prompts, prompt length], padded on the left.
        settings: all that counts; what the model's folder recommends (top_p, repetition_penalty) is for chatting.
        temperature: a number, or one for each reply [prompts * n, 1].

    Returns:
        Tokens [prompts * n, max_new_tokens] and their log-probabilities at that temperature; a prompt's replies follow
        one another.
    """
    cache = read_prompts(model, input_ids, attention_mask, n)
    sequences, mask = input_ids.repeat_interleave(n, 0), attention_mask.repeat_interleave(n, 0)
    temperature = torch.as_tensor(temperature, device=sequences.device).expand(len(sequences), 1)
    width, reply_length = input_ids.shape[1], settings.max_new_tokens
    responses = sequences.new_full((len(sequences), reply_length), settings.pad_token_id)
    log_probs = torch.zeros(responses.shape, device=responses.device)
    unfinished = torch.arange(len(sequences), device=responses.device)
    recommended, settings = model.generation_config, copy.copy(settings)
    model.generation_config = settings  # generate would take what isn't set here from there
    for start in range(0, reply_length, STRETCH):
        settings.max_new_tokens = min(STRETCH, reply_length - start)
        recorder = RecordLogProbs(temperature)
        sequences = model.generate(
            input_ids=sequences,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=settings,
            logits_processor=LogitsProcessorList([recorder]),
            synced_gpus=False,  # the model is whole in every process, which goes on by itself
        )
        recorder.record(sequences)
        said = sequences[:, width + start :]
        responses[unfinished, start : start + said.shape[1]] = said
        log_probs[unfinished, start : start + said.shape[1]] = torch.cat(recorder.log_probs, dim=1)
        goes_on = (said != settings.eos_token_id).all(1)
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
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        settings = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=self.reply_length, eos_token_id=eos, pad_token_id=pad
        )
        ids, mask = prompts.batch["input_ids"], prompts.batch["attention_mask"]
        with self.engine.eval_mode(), unsharded(self.engine.module):
            responses, log_probs = sample_replies(self.engine.module, ids, mask, n, settings, temperature)
        is_eos = responses == eos
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
            self.engine.module.save_pretrained(path, state_dict=state)
            self.tokenizer.save_pretrained(path)
        torch.distributed.barrier()
