"""The tokenizer and the model: loaded, given a chat template or adapters, or built small on the spot."""

import hashlib
import json
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GlmConfig,
    GlmForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import is_flash_attn_2_available

from data import CACHE_DIR, IGNORE_INDEX, encode_conversation
from rows import UserError, detect_encoding, list_files, read_rows

# The layout that GLM-4 was trained on (https://huggingface.co/THUDM/glm-4-9b-chat-hf, tokenizer_config.json). A turn
# has no end of its own: the mark of the next one ends it.
GLM4_TEMPLATE = """[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
GLM4_CONTROL_TOKENS = [
    "<|endoftext|>",
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
]

# For tokenizers that bring no template: plain role names, and the end of a turn is the tokenizer's own EOS.
PLAIN_TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


def train_glm_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as GLM-4's is, with its control tokens and its chat template.

    A token is one character (3 bytes) at most: sample sentences made from a few patterns would else become few tokens.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=GLM4_CONTROL_TOKENS,
        initial_alphabet=alphabet,
        max_token_length=3,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=GLM4_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_tiny_glm(texts: list[str], folder: str, vocab_size: int = 1024) -> None:
    """Saves a small GLM-4 with random weights (the real class) and a tokenizer trained on `texts`."""
    tokenizer = train_glm_tokenizer(texts, vocab_size)
    config = GlmConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"]),
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GlmForCausalLM(config)
    # model.save_pretrained would write nothing in a process that is not the first of its run.
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_model(model, f"{folder}/model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def tiny_glm_folder(data_path: str) -> str:
    """Folder of the tiny model for this data, built by the first process that asks for it."""
    paths = list_files(data_path)
    encodings, digests = zip(*map(detect_encoding, paths), strict=True)
    identity = json.dumps([digests, Path(__file__).read_text("utf-8")])
    folder = CACHE_DIR / f"tiny-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    CACHE_DIR.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "tokenizer_config.json").exists():
            conversations = [json.loads(row["messages"]) for row in read_rows(paths, encodings) if not row["error"]]
            build_tiny_glm([message["content"] for turns in conversations for message in turns], str(folder))
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
    _, labels = encode_conversation(turns, tokenizer)
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
