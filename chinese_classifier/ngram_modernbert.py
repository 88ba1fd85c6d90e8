"""A small ModernBERT with a linear classifier on n-grams of characters beside it: wide and deep.

The n-grams know what was said before, word for word; the encoder knows what is like it. Neither reaches alone what both
reach together (Cheng et al., "Wide & Deep Learning", 2016; the table: Weinberger et al., "Feature Hashing", 2009).
The n-grams are weighed by tf-idf with 1 + log tf and fitted beforehand on the training rows, see tiny.py. Knowing those
by heart, they take no part while the encoder is trained.

This file stands alone: Transformers copies it into the folder of each saved model, which so can be served from anywhere
by `pipeline("text-classification", folder, trust_remote_code=True)`.
"""

import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

HASH_BASE, HASH_MODULUS = 1_000_003, 2**31 - 1  # products stay below 2**63


def hash_ngrams(characters: torch.Tensor, max_ngram: int) -> torch.Tensor:
    """A number from 1 to 2**31 - 2 for each n-gram of characters, by the character that it begins with.

    Args:
        characters: code points, 0 for none, shape (sequences, places); the characters of a sequence stand together,
            whatever zeros lie between them.

    Returns:
        Shape (sequences, places, max_ngram), int64; 0 where no n-gram is.
    """
    places = characters.shape[1]
    is_one = characters > 0
    place = torch.where(is_one, is_one.cumsum(1) - 1, places)
    together = F.pad(torch.zeros_like(characters), (0, 1)).scatter(1, place, characters)[:, :places]
    value = torch.zeros_like(together)
    hashes = []
    for n in range(max_ngram):
        last = F.pad(together[:, n:], (0, n))
        value = (value * HASH_BASE + last) % HASH_MODULUS
        hashes.append(torch.where(last > 0, value, 0))
    return torch.stack(hashes, dim=-1)


class NgramModernBertConfig(ModernBertConfig):
    """ModernBERT's, and what the n-grams need.

    ngram_table_size: slots of the table, one n-gram each; max_ngram: its characters at most.
    max_token_characters: in a token of the vocabulary; num_special_tokens: the first ids of the vocabulary.
    ngram_share: of the n-grams' logits in the mean of both; the rest is the encoder's.
    token_dropout: share of the tokens that are masked while training, from 0 to twice that much in one sequence.
    """

    model_type = "ngram_modernbert"
    ngram_table_size: int = 1 << 20
    max_ngram: int = 4
    max_token_characters: int = 4
    num_special_tokens: int = 5
    mask_token_id: int = 4
    ngram_share: float = 0.4
    token_dropout: float = 0.2


class NgramModernBertForSequenceClassification(ModernBertForSequenceClassification):
    """Logits of the encoder while training, else a mean of the encoder's and the n-grams'.

    Buffers:
        token_characters: the code points that each token stands for, then zeros; shape (vocab_size, characters), int64.
        ngram_hashes: the n-gram in each slot, 0 for none; shape (slots,), int64.
        ngram_idf: its inverse document frequency; shape (slots,).
        ngram_weight: its weight in the linear classifier; shape (slots, num_labels).
    """

    config_class = NgramModernBertConfig

    def __init__(self, config):
        super().__init__(config)
        size = config.ngram_table_size
        shape = config.vocab_size, config.max_token_characters
        self.register_buffer("token_characters", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("ngram_hashes", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("ngram_idf", torch.zeros(size))
        self.register_buffer("ngram_weight", torch.zeros(size, config.num_labels))
        self.register_buffer("ngram_bias", torch.zeros(config.num_labels))

    def ngram_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits of the n-grams alone: shape (sequences, tokens) to (sequences, num_labels)."""
        hashes = hash_ngrams(self.token_characters[input_ids].flatten(1), self.config.max_ngram).flatten(1)
        hashes = hashes.sort(1).values  # alike ones stand together; the first of them counts for all
        slots = hashes % self.config.ngram_table_size
        is_first = hashes != F.pad(hashes[:, :-1], (1, 0))
        group = is_first.cumsum(1)
        sizes = torch.zeros_like(F.pad(group, (0, 1))).scatter_add(1, group, torch.ones_like(group))
        term_frequency = 1 + sizes.gather(1, group).clamp_min(1).log()
        known = is_first & (hashes == self.ngram_hashes[slots])
        weights = torch.where(known, term_frequency * self.ngram_idf[slots], 0)
        norm = weights.square().sum(1, keepdim=True).sqrt().clamp_min(1e-6)
        return ((weights / norm).unsqueeze(-1) * self.ngram_weight[slots]).sum(1) + self.ngram_bias

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        if self.training and self.config.token_dropout:
            share = 2 * self.config.token_dropout * torch.rand(len(input_ids), 1, device=input_ids.device)
            dropped = torch.rand(input_ids.shape, device=input_ids.device) < share
            dropped &= input_ids >= self.config.num_special_tokens
            input_ids = input_ids.masked_fill(dropped, self.config.mask_token_id)
        output = super().forward(input_ids, attention_mask, **kwargs)
        if not self.training:
            # in fp32: the encoder may run in half precision, the n-grams' sum never does
            ngram_logits = self.ngram_logits(input_ids).float()
            output.logits = torch.lerp(output.logits.float(), ngram_logits, self.config.ngram_share)
        if labels is not None:
            output.loss = F.cross_entropy(output.logits, labels)
        return output


AutoConfig.register(NgramModernBertConfig.model_type, NgramModernBertConfig)
AutoModelForSequenceClassification.register(NgramModernBertConfig, NgramModernBertForSequenceClassification)
NgramModernBertConfig.register_for_auto_class()
NgramModernBertForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
