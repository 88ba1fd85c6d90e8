"""The embedded default: words of its texts, embeddings that know which are alike, and a class of Transformers' own."""

import pytest
import torch
from transformers import ModernBertForSequenceClassification, pipeline

from tiny import embed_tokens, train_tokenizer


def test_it_is_served_by_pipeline_without_code_of_its_own(tiny_folder):
    served = pipeline("text-classification", tiny_folder)
    assert type(served.model) is ModernBertForSequenceClassification
    assert {score["label"] for score in served("天地玄黄", top_k=None)} == {"好评", "差评"}


def test_words_that_stand_beside_the_same_words_are_alike():
    sentences = [f"{who}{what}{where}" for who in "猫狗" for what in "吃喝" for where in "家里"]
    sentences += [f"{who}{what}{where}" for who in "山河" for what in "高长" for where in "东西"]
    texts = [sentence for sentence in sentences for _ in range(20)]
    tokenizer = train_tokenizer(texts, vocab_size=10)  # no more than the characters
    vectors = embed_tokens(tokenizer(texts)["input_ids"], len(tokenizer), 8)
    cat, dog, mountain = (vectors[tokenizer.convert_tokens_to_ids(word)] for word in "猫狗山")
    similarity = torch.nn.functional.cosine_similarity
    assert similarity(cat, dog, dim=0) > 0.9 > 0.5 > similarity(cat, mountain, dim=0)
    assert vectors.std(correction=0) == pytest.approx(0.3, rel=1e-3)
