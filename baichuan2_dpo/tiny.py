"""The tiny default: the Llama that Baichuan2 is converted to, with random weights, built on the spot from the data."""

import hashlib
import json
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Tokenizer

from convert_to_llama import CHAT_TEMPLATE
from data import CACHE_DIR
from files import identify_file, list_files
from pairs import read_pairs

SAMPLE_DATA = "data/train"
MARKS = ["<reserved_106>", "<reserved_107>"]  # before a question and before an answer


def build_tiny_model(texts: list[str], folder: str, vocab_size: int = 1024, hidden_size: int = 192) -> None:
    """Saves a small Llama in Baichuan2's layout with random weights, and a byte-level BPE trained on `texts`."""
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, vocab_size, new_special_tokens=["<unk>", "</s>", *MARKS], show_progress=False
    )
    tokenizer.eos_token, tokenizer.pad_token = "</s>", "<unk>"
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=2,
        num_attention_heads=hidden_size // 64,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    # model.save_pretrained would write nothing in a process that is not the first of its run.
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_model(model, f"{folder}/model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def tiny_model_folder(data_path: str) -> str:
    """Folder of the tiny model for this data, built by the first process that asks for it."""
    paths = list_files(data_path)
    encodings, digests = zip(*map(identify_file, paths), strict=True)
    identity = json.dumps([digests, Path(__file__).read_text("utf-8")])
    folder = CACHE_DIR / f"tiny-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    CACHE_DIR.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "tokenizer_config.json").exists():
            texts = [
                message["content"]
                for row in read_pairs(paths, encodings)
                if not row["error"]
                for message in [*json.loads(row["prompt"]), json.loads(row["chosen"]), json.loads(row["rejected"])]
            ]
            build_tiny_model(texts, str(folder))
    return str(folder)
