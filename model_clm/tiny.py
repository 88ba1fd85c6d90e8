"""A model from scratch: one of seven classes in any size, with random weights or as a bigram model of the corpus."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GlmConfig,
    GPT2Config,
    LlamaConfig,
    NanoChatConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from bigram import start_as_bigram_model
from data import CACHE_DIR, hash_file, read_manifest

SAMPLE_DATA = "cache_data/corpus_prepared"  # what train_zero2.sh makes of the default corpus
SCRATCH = "scratch"
CONFIGS = {
    "qwen3": Qwen3Config,
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "gpt2": GPT2Config,
    "bloom": BloomConfig,
    "glm": GlmConfig,
    "nanochat": NanoChatConfig,
}
GATED = ("qwen3", "llama", "qwen2", "glm")
START = "start.json"


def build_config(model_args, tokenizer, model_max_length: int) -> PreTrainedConfig:
    """The config of a class by its sizes; vocabulary and EOS are the tokenizer's, positions as many as a row needs.

    No padding token stands in it: the classes would freeze that token's embedding, and an EOS is learned.
    """
    name, width, heads = model_args.config_name, model_args.hidden_size, model_args.num_attention_heads
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "num_hidden_layers": model_args.num_hidden_layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": model_args.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    inner = model_args.intermediate_size or (-(-width * 8 // 3 // 32) * 32 if name in GATED else 4 * width)
    if name == "gpt2":
        without_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        settings |= {"n_inner": inner, "max_position_embeddings": model_max_length, **without_dropout}
    elif name != "bloom":  # whose MLPs have a width of their own, and which has no positions
        settings |= {"intermediate_size": inner, "max_position_embeddings": model_max_length}
        settings |= {"num_key_value_heads": model_args.num_key_value_heads or heads, "head_dim": width // heads}
    return CONFIGS[name](**settings)


def build_model(model_args, data_args, tokenizer, seed: int, folder: Path, device="cpu") -> None:
    """Saves a model from scratch, and beside it what its bigram start took (`start.json`)."""
    config = build_config(model_args, tokenizer, data_args.model_max_length)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    start = {"bigram_seconds": 0.0}
    if model_args.bigram_start:
        model.to(device)
        start["bigram_seconds"] = start_as_bigram_model(model, f"{data_args.data_path}/train", data_args.mixture, seed)
        model.to("cpu")
    # model.save_pretrained would write nothing in a process that is not the first of its run.
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_model(model, f"{folder}/model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    (folder / START).write_text(json.dumps(start))


def scratch_model_folder(model_args, data_args, tokenizer, seed: int, device) -> str:
    """Folder of the model from scratch for this data, built by the first process of a machine that asks for it.

    Args:
        device: where its bigram start is computed.
    """
    shards = [source["shards"] for source in read_manifest(f"{data_args.data_path}/train")["sources"].values()]
    code = [hash_file(Path(__file__).with_name(name)) for name in ("tiny.py", "bigram.py")]
    tokens = tokenizer.backend_tokenizer.to_str()
    identity = [vars(model_args), data_args.model_max_length, data_args.mixture, shards, tokens, seed, code]
    folder = CACHE_DIR / f"scratch-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}"
    CACHE_DIR.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            build_model(model_args, data_args, tokenizer, seed, unfinished, device)
            unfinished.rename(folder)
    return str(folder)
