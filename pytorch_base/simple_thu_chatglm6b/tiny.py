"""The tiny default: a GLM-4 of the real class with random weights, built on the spot from the data."""

import hashlib
import json
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

from data import CACHE_DIR
from files import identify_file, list_files
from rows import read_rows

SAMPLE_DATA = "data/alpaca_chinese"

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


def build_tiny_model(texts: list[str], folder: str, vocab_size: int = 1024) -> None:
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


# >>> tiny-folder
def tiny_model_folder(data_path: str) -> str:
    """Folder of the tiny model for this data, built by the first process that asks for it."""
    paths = list_files(data_path)
    encodings, digests = zip(*map(identify_file, paths), strict=True)
    identity = json.dumps([digests, Path(__file__).read_text("utf-8")])
    folder = CACHE_DIR / f"tiny-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    CACHE_DIR.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "tokenizer_config.json").exists():
            conversations = [json.loads(row["messages"]) for row in read_rows(paths, encodings) if not row["error"]]
            build_tiny_model([message["content"] for turns in conversations for message in turns], str(folder))
    return str(folder)


# <<< tiny-folder
