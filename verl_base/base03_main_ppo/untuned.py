"""The tiny model before it has learned anything: the tokenizer of a task's sft.jsonl, and random weights.

python -m base03_main_ppo.untuned cache_data/arithmetic/sft.jsonl output_main_ppo/untuned
"""

import json
import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tiny import train_chat_tokenizer


def save_untuned(sft_path: Path, folder: str, seed: int = 42) -> None:
    conversations = [json.loads(line)["messages"] for line in sft_path.read_text("utf-8").splitlines()]
    tokenizer = train_chat_tokenizer(
        [message["content"] for turns in conversations for message in turns], vocab_size=1024
    )
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    save_untuned(Path(sys.argv[1]), sys.argv[2])
