"""The embedded default: a small classifier that knows, before it is trained, what its training texts alone can tell.

texts -> train_tokenizer (words of up to 4 characters) -> embed_tokens (what stands beside what)
texts, labels -> fit_ngrams (tf-idf, naive Bayes and logistic regression, the wide part of ngram_modernbert.py)
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
from sklearn.linear_model import LogisticRegression
from sklearn.utils.extmath import randomized_svd
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from data import CACHE_DIR
from ngram_modernbert import NgramModernBertConfig, NgramModernBertForSequenceClassification, hash_ngrams
from rows import UserError

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


def spell_out(tokenizer, max_token_characters: int) -> torch.Tensor:
    """Code points of the characters of each token, then zeros: shape (vocab_size, max_token_characters)."""
    characters = torch.zeros(len(tokenizer), max_token_characters, dtype=torch.int64)
    for token, index in tokenizer.get_vocab().items():
        if token not in SPECIAL_TOKENS.values():
            characters[index, : len(token)] = torch.tensor([ord(character) for character in token])
    return characters


def count_ngrams(model, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The n-grams of rows of token ids, as (hash, row, how often): three arrays of one length, sorted by hash."""
    hashes, row_of = [], []
    for start in range(0, len(rows), 256):
        ids = pad_sequence([torch.tensor(row) for row in rows[start : start + 256]], batch_first=True)
        found = hash_ngrams(model.token_characters[ids].flatten(1), model.config.max_ngram).flatten(1).numpy()
        place = np.nonzero(found)
        row_of.append(place[0] + start)
        hashes.append(found[place])
    pairs = np.stack([np.concatenate(hashes), np.concatenate(row_of)])
    (hashes, row_of), frequency = np.unique(pairs, axis=1, return_counts=True)
    return hashes, row_of, frequency


def build_table(hashes: np.ndarray, size: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The n-gram in each slot (0 for none), and its inverse document frequency: two arrays of shape (size,).

    N-grams of two rows or more are kept; where two meet in a slot, the one of more rows.

    Args:
        hashes: one for each row that an n-gram is in.
    """
    known, document_frequency = np.unique(hashes, return_counts=True)
    known, document_frequency = known[document_frequency > 1], document_frequency[document_frequency > 1]
    rare_first = np.argsort(document_frequency, kind="stable")
    table, idf = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.float32)
    table[known[rare_first] % size] = known[rare_first]
    idf[known[rare_first] % size] = np.log((1 + num_rows) / (1 + document_frequency[rare_first])) + 1
    return table, idf


def weigh_ngrams(features, labels: list[int], num_labels: int, inverse_regularisation: float):
    """Weights and biases that tell each class from the others: shapes (n-grams, num_labels) and (num_labels,).

    Logistic regression on tf-idf, scaled by how much more often the class has the n-gram than the others.
    Source: Wang and Manning, "Baselines and Bigrams" (2012), with a logistic loss.

    Args:
        features: tf-idf, a sparse matrix of shape (rows, n-grams); labels: of each row, from 0.
    """
    weight, bias = np.zeros((features.shape[1], num_labels)), np.zeros(num_labels)
    for label in range(num_labels) if num_labels > 2 else [1]:
        is_label = np.asarray(labels) == label
        counts = [np.asarray(features[some].sum(0)).ravel() + 0.5 for some in (is_label, ~is_label)]
        ratio = np.log(counts[0] / counts[0].sum()) - np.log(counts[1] / counts[1].sum())
        fitted = LogisticRegression(C=inverse_regularisation, max_iter=1000)
        fitted.fit(features @ sparse.diags_array(ratio), is_label)
        weight[:, label], bias[label] = fitted.coef_[0] * ratio, fitted.intercept_[0]
    if num_labels == 2:  # one row of weights, of which each class gets half
        weight, bias = weight[:, 1:] * [-0.5, 0.5], bias[1:] * [-0.5, 0.5]
    return weight, bias


def fit_ngrams(model, rows: list[list[int]], labels: list[int], inverse_regularisation: float) -> None:
    """Fills the model's n-gram buffers from rows of token ids and their labels."""
    hashes, row_of, frequency = count_ngrams(model, rows)
    table, idf = build_table(hashes, model.config.ngram_table_size, len(rows))
    slots = hashes % len(table)
    in_table = table[slots] == hashes
    if not in_table.any():
        raise UserError("the training texts have not a character in common: the small default needs more of them.")
    slots, row_of = slots[in_table], row_of[in_table]
    tf_idf = (1 + np.log(frequency[in_table])) * idf[slots]
    norm = np.sqrt(np.bincount(row_of, tf_idf**2, len(rows))).clip(1e-6)
    used, column_of = np.unique(slots, return_inverse=True)
    features = sparse.csr_matrix((tf_idf / norm[row_of], (row_of, column_of)), shape=(len(rows), len(used)))
    weight, bias = weigh_ngrams(features, labels, model.config.num_labels, inverse_regularisation)
    model.ngram_hashes.copy_(torch.from_numpy(table))
    model.ngram_idf.copy_(torch.from_numpy(idf))
    model.ngram_weight[used] = torch.tensor(weight, dtype=torch.float32)
    model.ngram_bias.copy_(torch.tensor(bias))


@torch.no_grad()
def build_tiny_model(texts: list[str], labels: list[str], id2label: dict[int, str], folder: str) -> None:
    """Saves a tokenizer of these texts, and a ModernBERT of one layer beside a classifier of n-grams.

    Raises:
        UserError: the texts have no n-gram in common.
    """
    label2id = {label: index for index, label in id2label.items()}
    tokenizer = train_tokenizer(texts)
    rows = tokenizer(texts)["input_ids"]
    config = NgramModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=512,
        embedding_dropout=0.3,
        mlp_dropout=0.1,
        classifier_dropout=0.3,
        classifier_pooling="mean",
        id2label=id2label,
        label2id=label2id,
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        mask_token_id=tokenizer.mask_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NgramModernBertForSequenceClassification(config)
    embeddings = embed_tokens(rows, config.vocab_size, config.hidden_size)
    model.get_input_embeddings().weight[:, : embeddings.shape[1]] = embeddings
    model.token_characters.copy_(spell_out(tokenizer, config.max_token_characters))
    fit_ngrams(model, rows, [label2id[label] for label in labels], inverse_regularisation=10)
    # model.save_pretrained would write nothing in a process that is not the first of its run.
    model.config.save_pretrained(folder)
    save_model(model, f"{folder}/model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def tiny_model_folder(texts: list[str], labels: list[str], id2label: dict[int, str]) -> str:
    """Folder of the small classifier for these rows, built by the first process that asks for it."""
    code = [Path(__file__).with_name(name).read_text("utf-8") for name in ("tiny.py", "ngram_modernbert.py")]
    identity = json.dumps([texts, labels, id2label, code])
    folder = CACHE_DIR / f"tiny-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    CACHE_DIR.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"), tempfile.TemporaryDirectory(dir=CACHE_DIR) as scratch:
        if not folder.exists():
            build_tiny_model(texts, labels, id2label, f"{scratch}/complete")
            os.rename(f"{scratch}/complete", folder)
    return str(folder)
