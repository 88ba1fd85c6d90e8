"""The embedded default: a small Qwen2, tuned for a moment until it gets about one question in three right."""

import hashlib
import json
import os
import random
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rewards import compute_score
from rows import UserError

CACHE_DIR = Path(__file__).parent / "cache_data"
# The layout of ChatML, which Qwen was trained on (https://github.com/openai/openai-python/blob/v0.28.1/chatml.md).
CHATML = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
FIRST_LOOK = 120  # steps of tuning before its samples are scored
ENOUGH = 0.4  # of its own examples; of questions that it has never seen it then gets about a third right


def train_chat_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which a numeral is always a token of its own, as digits are in today's vocabularies."""
    tokenizer = FastTokenizer(models.BPE())
    numerals = pre_tokenizers.Split(Regex("[零一二三四五六七八九十百]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([numerals, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=CHAT_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*texts, "user\nassistant\nsystem\n"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def sample_accuracy(model, tokenizer, rows: list[dict]) -> float:
    """Share of right completions, one sampled for each row at temperature 1."""
    prompts = [row["messages"][:1] for row in rows]
    inputs = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=32, eos_token_id=eos, pad_token_id=pad)
    with torch.no_grad():
        sequences = model.generate(**inputs, generation_config=settings)
    completions = tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    scores = [
        compute_score(row["data_source"], completion, row["ground_truth"])["acc"]
        for completion, row in zip(completions, rows, strict=True)
    ]
    return sum(scores) / len(scores)


def tune_for_a_moment(model, tokenizer, rows: list[dict], seed: int, batch_size: int = 128) -> float:
    """Supervised steps on worked examples until so many sampled completions are right; returns that share.

    Raises:
        UserError: it doesn't get there in 600 steps.
    """
    samples = []
    for row in rows:
        question, answer = row["messages"]
        prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
        completion = tokenizer(answer["content"] + tokenizer.eos_token)["input_ids"]
        samples.append((prompt + completion, [-100] * len(prompt) + completion))
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.05, total_iters=20)
    every = 5  # steps between two looks at how far it is; it learns fast near the end
    bar = tqdm(range(1, 601), desc=f"tuning, up to {ENOUGH:.0%} right", unit="step")
    for step in bar:
        batch = rng.sample(samples, min(batch_size, len(samples)))
        longest = max(len(ids) for ids, _ in batch)
        input_ids = [ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in batch]
        labels = [labels + [-100] * (longest - len(labels)) for _, labels in batch]
        model(input_ids=torch.tensor(input_ids), labels=torch.tensor(labels)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        if step >= FIRST_LOOK and step % every == 0:
            accuracy = sample_accuracy(model, tokenizer, rng.sample(rows, min(512, len(rows))))
            bar.set_postfix_str(f"{accuracy:.0%} right")
            if accuracy >= ENOUGH:
                bar.close()
                return accuracy
            if accuracy >= ENOUGH / 2:
                every = 1
    raise UserError(f"after 600 steps the tiny model still gets only {accuracy:.0%} of its examples right.")


def build_untuned(rows: list[dict], seed: int):
    """A Qwen2 with random weights, and a tokenizer trained on the conversations of sft.jsonl."""
    tokenizer = train_chat_tokenizer([turn["content"] for row in rows for turn in row["messages"]], vocab_size=1024)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
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
    return Qwen2ForCausalLM(config), tokenizer


def build_tiny_model(sft_path: Path, seed: int, folder: Path) -> None:
    """Saves the tokenizer and the tuned model of a task's sft.jsonl."""
    rows = [json.loads(line) for line in sft_path.read_text("utf-8").splitlines()]
    model, tokenizer = build_untuned(rows, seed)
    print("tuning the tiny model on worked examples until it gets about a third of new questions right ...", flush=True)
    # More of them only wait for each other, on a model so small and a machine that others use, too.
    torch.set_num_threads(int((os.environ.get("OMP_NUM_THREADS") or "1").split(",")[0]))  # 4,2: nested teams
    accuracy = tune_for_a_moment(model, tokenizer, rows, seed)
    print(f"... {accuracy:.0%} of the sampled completions are right", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_model_folder(data_path: str, seed: int) -> str:
    """Folder of the tiny model for the sft.jsonl beside `data_path`, built where it isn't there yet.

    Raises:
        UserError: no such file.
    """
    sft_path = Path(data_path).with_name("sft.jsonl")
    if not sft_path.is_file():
        raise UserError(f"{sft_path}: the tiny model learns from it first. Run prepare.py, or give MODEL a real model.")
    identity = sft_path.read_bytes() + Path(__file__).read_bytes() + str(seed).encode()
    folder = CACHE_DIR / f"tiny-{hashlib.sha256(identity).hexdigest()[:16]}"
    CACHE_DIR.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "tokenizer_config.json").exists():
            build_tiny_model(sft_path, seed, folder)
    return str(folder)
