"""The embedded default: a small ModernBERT whose words and embeddings come from the training texts.

texts -> train_tokenizer (words of up to 4 characters) -> embed_tokens (what stands beside what) -> ModernBERT
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import save_model
from scipy import sparse
from sklearn.utils.extmath import randomized_svd
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ModernBertConfig, ModernBertForSequenceClassification, PreTrainedTokenizerFast

from data import CACHE_DIR

SPECIAL_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
SPECIAL_TOKENS |= {"mask_token": "[MASK]"}


def train_tokenizer(texts: list[str], vocab_size: int = 10_000) -> PreTrainedTokenizerFast:
    """A BPE of Chinese words of at most 4 characters, Latin words and single marks; no case, no width."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    one_by_one = pre_tokenizers.Split(Regex(r"[a-z]+|\d|[^\p{Han}a-z\d]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), one_by_one])
    special = list(SPECIAL_TOKENS.values())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, max_token_length=4, min_frequency=3, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **SPECIAL_TOKENS)


def embed_tokens(rows: list[list[int]], vocab_size: int, size: int, window: int = 4, std: float = 0.3) -> torch.Tensor:
    """Embeddings of tokens by what stands near them: the largest singular vectors of positive pointwise information.

    Source: Levy and Goldberg, "Neural Word Embedding as Implicit Matrix Factorization" (2014), with word2vec's weights.

    Returns:
        Shape (vocab_size, size), of mean 0 and standard deviation `std`.
    """
    apart = np.full(window, -1)
    ids = np.concatenate([np.concatenate([row[1:-1], apart]) for row in rows]).astype(np.int64)
    counts = sparse.csr_matrix((vocab_size, vocab_size))
    for distance in range(1, window + 1):
        left, right = ids[:-distance], ids[distance:]
        beside = (left >= 0) & (right >= 0)
        pairs = left[beside], right[beside]
        counts += sparse.csr_matrix((np.full(beside.sum(), 1 / distance), pairs), shape=counts.shape)
    counts = (counts + counts.T).tocoo()
    frequency = np.asarray(counts.sum(1)).ravel()
    context = frequency**0.75 / (frequency**0.75).sum()
    information = np.log(counts.data / (frequency[counts.row] * context[counts.col]))
    positive = information > 0
    matrix = sparse.csr_matrix(
        (information[positive], (counts.row[positive], counts.col[positive])), shape=counts.shape
    )
    size = min(size, vocab_size - 1)
    left, values, _ = randomized_svd(matrix, size, n_iter=3, random_state=0)
    embeddings = left * np.sqrt(values)
    embeddings -= embeddings.mean(0)
    return torch.tensor(embeddings / embeddings.std() * std, dtype=torch.float32)


def build_tiny_model(texts: list[str], id2label: dict[int, str], folder: str) -> None:
    """Saves a tokenizer of these texts, and a ModernBERT of one layer that knows which words are alike."""
    tokenizer = train_tokenizer(texts)
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=512,
        embedding_dropout=0.5,
        mlp_dropout=0.1,
        classifier_dropout=0.3,
        classifier_pooling="mean",
        id2label=id2label,
        label2id={label: index for index, label in id2label.items()},
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ModernBertForSequenceClassification(config)
    embeddings = embed_tokens(tokenizer(texts)["input_ids"], config.vocab_size, config.hidden_size)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, : embeddings.shape[1]] = embeddings
    # model.save_pretrained would write nothing in a process that is not the first of its run.
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    save_model(model, f"{folder}/model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def tiny_model_folder(texts: list[str], id2label: dict[int, str]) -> str:
    """Folder of the small classifier for these rows, built by the first process that asks for it."""
    identity = json.dumps([texts, id2label, Path(__file__).read_text("utf-8")])
    folder = CACHE_DIR / f"tiny-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    CACHE_DIR.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"), tempfile.TemporaryDirectory(dir=CACHE_DIR) as scratch:
        if not folder.exists():
            build_tiny_model(texts, id2label, f"{scratch}/complete")
            os.rename(f"{scratch}/complete", folder)
    return str(folder)
