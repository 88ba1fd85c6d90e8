"""Loads the tokenizer and the model, adds LoRA, and gives the model rows without padding and a head without waste."""

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)
from transformers.utils import is_flash_attn_2_available

from data import CACHE_DIR, IGNORE_INDEX, UserError, detect_encoding, encode_conversation, list_files, read_rows

# The layout of ChatML, which Qwen was trained on (https://github.com/openai/openai-python/blob/v0.28.1/chatml.md).
CHATML = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# For tokenizers that bring no template: plain role names, and the end of a turn is the tokenizer's own EOS.
PLAIN_TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


def build_tiny_model(texts: list[str], folder: str, vocab_size: int = 4096) -> None:
    """Saves a small Qwen2 with random weights (the real class) and a byte-level BPE trained on `texts`."""
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, vocab_size, new_special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False
    )
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = CHATML
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_model_folder(data_path: str) -> str:
    """Folder of the tiny model for this data, built by the first process that asks for it."""
    paths = list_files(data_path)
    encodings, digests = zip(*map(detect_encoding, paths), strict=True)
    identity = json.dumps([digests, Path(__file__).read_text("utf-8")])
    folder = CACHE_DIR / f"tiny-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    CACHE_DIR.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "tokenizer_config.json").exists():
            conversations = [json.loads(row["messages"]) for row in read_rows(paths, encodings) if not row["error"]]
            build_tiny_model([message["content"] for turns in conversations for message in turns], str(folder))
    return str(folder)


def load_tokenizer(model_args):
    """The model's tokenizer, with a chat template, and with the token that ends a turn as its EOS.

    The EOS matters when the tuned model is served: base models often come with another one and would never stop.

    Raises:
        UserError: there is no such model, or its tokenizer can't tell where in a text a token stands.
    """
    path = model_args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model_args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: no model could be read there ({str(error).splitlines()[0]}). Give a folder that holds "
            "config.json, tokenizer and weights, or a hub id; the readme says how to download one through a mirror."
        ) from None
    if not tokenizer.is_fast:
        raise UserError(f"{path}: its tokenizer has no fast version (tokenizer.json), which finding the labels needs.")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好"}]
    labels = encode_conversation(turns, tokenizer, model_max_length=10**6)["labels"]
    end_of_turn = [label for label in labels if label != IGNORE_INDEX][-1]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_of_turn)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(model_args, args) -> nn.Module:
    """The causal LM in the precision that suits how it is trained, with adapters where they are asked for.

    Frozen weights and DeepSpeed's working copy are kept in half precision; weights that the optimizer updates itself
    stay in fp32, and so do the adapters (PEFT), since fp16 gradients could not be unscaled otherwise.

    Raises:
        UserError: the weights can't be read, or `target_modules` match nothing.
    """
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    attention = model_args.attn_implementation
    if attention is None and half != torch.float32 and is_flash_attn_2_available():
        attention = "flash_attention_2"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path,
            dtype=half if model_args.use_lora or args.deepspeed else torch.float32,
            attn_implementation=attention,
            trust_remote_code=model_args.trust_remote_code,
        )
    except OSError as error:
        raise UserError(f"{model_args.model_name_or_path}: {str(error).splitlines()[0]}") from None
    if model_args.use_lora:
        model = add_lora(model, model_args)
    return model


def add_lora(model: nn.Module, model_args) -> nn.Module:
    """The model with low-rank adapters; its own weights are frozen (Hu et al., "LoRA", 2021; library: PEFT)."""
    from peft import LoraConfig, get_peft_model

    names = [name for name, _ in model.named_modules()]
    targets = model_args.target_modules
    missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if targets != ["all-linear"] and missing:
        linear = sorted(
            {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        )
        raise UserError(
            f"--target_modules {' '.join(missing)}: no such module; the linear ones are {', '.join(linear)}"
        )
    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=model_args.lora_r,
            lora_alpha=model_args.lora_alpha,
            lora_dropout=model_args.lora_dropout,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
        ),
    )


def packed_sdpa(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Causal attention over rows of several sequences: one SDPA call a sequence, so none sees its neighbour.

    Args:
        query, key, value: shape (1, heads, tokens, head_dim); key and value may have fewer heads (GQA).
        kwargs: `sequence_lengths` (list of the tokens of each sequence), `sliding_window` (tokens, or None).

    Returns:
        Attention output of shape (1, tokens, heads, head_dim), and None for the weights.

    Raises:
        NotImplementedError: the model wants capped scores or attention sinks, which SDPA does not have.
    """
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise NotImplementedError("SDPA has neither capped scores nor attention sinks")
    lengths, window = kwargs["sequence_lengths"], kwargs.get("sliding_window")
    outputs = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        length, mask = q.shape[2], None
        if window is not None and length > window:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2), None


AttentionInterface.register("packed_sdpa", packed_sdpa)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of a linear head, some tokens at a time: the logits of all tokens never exist at once.

    The gradients are taken in the same pass, while a chunk's probabilities are still in the cache, so the backward
    pass only scales them. Source of the method: Hsu et al., "Liger Kernel" (2024).
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, targets, needs_gradient):
        """hidden_states: (tokens, hidden); weight: (vocabulary, hidden); targets: (tokens,). Returns a scalar, fp32."""
        if torch.is_autocast_enabled(hidden_states.device.type):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(hidden_states.device.type))
        head = weight.to(hidden_states.dtype)
        logits_at_once = 1 << (21 if hidden_states.device.type == "cpu" else 27)
        chunk = max(64, logits_at_once // len(head))
        loss = hidden_states.new_zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden_states) if needs_gradient else None
        weight_gradient = torch.zeros_like(head) if needs_gradient and ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), chunk):
            hidden, target = hidden_states[start : start + chunk], targets[start : start + chunk, None]
            logits = (hidden @ head.T).float()
            log_normalizer = logits.logsumexp(1, keepdim=True)
            loss += (log_normalizer - logits.gather(1, target)).sum()
            if needs_gradient:
                gradient = logits.sub_(log_normalizer).exp_()
                gradient.scatter_add_(1, target, -torch.ones_like(log_normalizer))
                gradient = gradient.to(head.dtype)
                torch.mm(gradient, head, out=hidden_gradient[start : start + chunk])
                if weight_gradient is not None:
                    weight_gradient.addmm_(gradient.T, hidden)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, gradient):
        hidden_gradient, weight_gradient = ctx.saved_tensors
        if weight_gradient is not None:
            weight_gradient = weight_gradient.mul_(gradient).to(ctx.weight_dtype)
        return hidden_gradient.mul_(gradient), weight_gradient, None, None


class SupervisedHead(nn.Linear):
    """An LM head that, while it has `targets`, returns their summed cross-entropy in place of logits.

    It works inside its own forward because only there ZeRO-3 has gathered its weight.
    """

    targets: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: (batch, tokens, hidden); targets: (batch, tokens), -100 where nothing is supervised."""
        if self.targets is None:
            return super().forward(hidden_states)
        supervised = self.targets != IGNORE_INDEX
        return ChunkedCrossEntropy.apply(
            hidden_states[supervised], self.weight, self.targets[supervised], torch.is_grad_enabled()
        )


def install_supervised_head(model: nn.Module) -> SupervisedHead | None:
    """Turns the model's LM head into a SupervisedHead, in place; None where the head is not a plain linear layer."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return None
    head.__class__ = SupervisedHead
    return head
