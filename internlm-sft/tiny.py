"""The tiny default: an InternLM3 of the real class with random weights, built on the spot from the data."""

import hashlib
import json
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_model
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, InternLM3Config, PreTrainedTokenizerFast

from data import CACHE_DIR
from files import identify_file, list_files
from rows import read_rows

SAMPLE_DATA = "data"

# The layout of ChatML as InternLM2 and InternLM3 have it: BOS first, a turn ends with <|im_end|>.
CHATML = """{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def character_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """One token a character; what no text has is spelt in bytes.

    Merges learned on a few hundred rows glue the phrases of their templates together, and meet other pieces in other
    wordings: without them a tiny model understands more of what it has not seen. All characters of the recipe's own
    data are tokens, so that a base that was trained on a part of it can read the rest.
    """
    own = "".join(path.read_text("utf-8") for path in Path(__file__).with_name(SAMPLE_DATA).rglob("*.jsonl"))
    control = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    characters = sorted({*"".join(texts), *own, *CHATML, *"systemuserassistant\n"})
    pieces = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="</s>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def build_tiny_model(texts: list[str], folder: str) -> None:
    """Saves a small InternLM3 with random weights (the real class) and a tokenizer of the characters of `texts`."""
    tokenizer = character_tokenizer(texts)
    config = InternLM3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
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
