"""The tiny default: a BLOOM of the real class with random weights, built on the spot from the data.

python tiny.py my_tiny --hidden_size 64 --num_hidden_layers 1      one of another size, for sizes.py
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

from data import CACHE_DIR
from files import identify_file, list_files
from prompt import ALPACA
from rows import read_rows

SAMPLE_DATA = "data"
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]  # in BLOOM's order


def byte_level_bpe(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of BLOOM's kind: bytes, merged by what the texts hold; nothing is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    unk, bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad,
        chat_template=ALPACA, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_tiny_model(
    texts: list[str], folder: str, hidden_size: int = 192, num_hidden_layers: int = 2, vocab_size: int = 600
) -> None:
    """Saves a small BLOOM with random weights (the real class) and a byte-level BPE trained on `texts`."""
    tokenizer = byte_level_bpe(texts, vocab_size)
    config = BloomConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        n_layer=num_hidden_layers,
        n_head=hidden_size // 16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BloomForCausalLM(config)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the model is written")
    parser.add_argument("--hidden_size", type=int, default=64, help="a multiple of 16")
    parser.add_argument("--num_hidden_layers", type=int, default=1)
    parser.add_argument("--data_path", default=SAMPLE_DATA, help="what its tokenizer is trained on")
    args = parser.parse_args()
    paths = list_files(args.data_path)
    rows = read_rows(paths, [identify_file(path)[0] for path in paths])
    conversations = [json.loads(row["messages"]) for row in rows if not row["error"]]
    texts = [message["content"] for turns in conversations for message in turns]
    build_tiny_model(texts, args.folder, args.hidden_size, args.num_hidden_layers)


if __name__ == "__main__":
    main()
