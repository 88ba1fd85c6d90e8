"""The tiny default: a Qwen2 of the real class with random weights, built on the spot from the data."""

import hashlib
import json
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_model
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from data import CACHE_DIR
from files import identify_file, list_files
from rows import read_rows

SAMPLE_DATA = "data/custom_data001"

# The layout of ChatML, which Qwen was trained on (https://github.com/openai/openai-python/blob/v0.28.1/chatml.md).
CHATML = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build_tiny_model(texts: list[str], folder: str, vocab_size: int = 1024) -> None:
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
        num_hidden_layers=2,
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
        model = Qwen2ForCausalLM(config)
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
