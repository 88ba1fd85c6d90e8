"""The embedded default: its n-grams say what scikit-learn's tf-idf and logistic regression say."""

import unicodedata

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import ngram_modernbert  # noqa: F401  (makes the class known)
from baseline import cross_predict, number_folds
from conftest import TELLING, make_reviews
from ngram_modernbert import hash_ngrams
from rows import UserError
from tiny import build_tiny_model, embed_tokens, train_tokenizer


@pytest.fixture(scope="module", params=[2, 3])
def tiny(request, tmp_path_factory):
    """A classifier of two or three classes that was built from 300 reviews but not trained, and its reviews."""
    rows = make_reviews(300, labels=tuple(TELLING)[: request.param])
    texts, names = zip(*rows, strict=True)
    labels = [list(TELLING).index(name) for name in names]
    folder = str(tmp_path_factory.mktemp("tiny"))
    build_tiny_model(list(texts), list(names), dict(enumerate(list(TELLING)[: request.param])), folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder), list(texts), labels, folder


def test_ngrams_equal_scikit_learn(tiny):
    model, tokenizer, texts, labels, _ = tiny
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True, min_df=2, lowercase=False)
    features = vectorizer.fit_transform(texts)
    lost = features.shape[1] - (model.ngram_hashes > 0).sum()  # where two n-grams met in a slot
    assert 0 <= lost <= 5
    unseen = [text for text, _ in make_reviews(50, seed=1)] + ["天", "ＡＢＣ"]
    unseen_features = vectorizer.transform([unicodedata.normalize("NFKC", text).lower() for text in unseen])
    logits = model.ngram_logits(tokenizer(unseen, padding=True, return_tensors="pt")["input_ids"]).numpy()
    for label in range(model.config.num_labels):
        is_label = np.array(labels) == label
        counts = [np.asarray(features[rows].sum(0)).ravel() + 0.5 for rows in (is_label, ~is_label)]
        ratio = np.log(counts[0] / counts[0].sum()) - np.log(counts[1] / counts[1].sum())
        reference = LogisticRegression(C=10, max_iter=1000).fit(features.multiply(ratio), is_label)
        expected = reference.decision_function(unseen_features.multiply(ratio))
        own = logits[:, label] - logits[:, 1 - label] if model.config.num_labels == 2 else logits[:, label]
        np.testing.assert_allclose(own, expected, atol=0.05)
        assert np.abs(expected).max() > 2


def test_hashes_do_not_depend_on_padding_or_gaps():
    together = torch.tensor([[10, 20, 30, 20, 30]])
    apart = torch.tensor([[0, 10, 0, 20, 30, 0, 0, 20, 30, 0]])
    ngrams = [set(hash_ngrams(row, 3).flatten().tolist()) - {0} for row in (together, apart)]
    assert ngrams[0] == ngrams[1]
    assert len(ngrams[0]) == 3 + 3 + 3  # 10, 20, 30; three pairs; three triples


def test_the_ngrams_take_no_part_in_training(tiny):
    model, tokenizer, texts, _, _ = tiny
    inputs = tokenizer(texts[:8], padding=True, return_tensors="pt")
    share, dropout = model.config.ngram_share, model.config.token_dropout
    encoder = super(type(model), model).forward(**inputs).logits
    torch.testing.assert_close(
        model(**inputs).logits, (1 - share) * encoder + share * model.ngram_logits(inputs["input_ids"])
    )
    model.config.token_dropout = 0
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0
    try:
        torch.testing.assert_close(model(**inputs).logits, encoder)
        model.config.token_dropout = 0.5
        assert not torch.allclose(model(**inputs).logits, encoder)
    finally:
        model.config.token_dropout = dropout
        model.eval()


def test_it_runs_in_half_precision(tiny):
    """As on a GPU that has bf16: by autocast, and with the weights themselves cast."""
    model, tokenizer, texts, labels, folder = tiny
    inputs = tokenizer(texts[:32], padding=True, return_tensors="pt")
    expected = model(**inputs).logits
    half = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.autocast("cpu", torch.bfloat16):
        by_autocast = model(**inputs).logits
    for logits in (by_autocast, half(**inputs).logits):
        assert (logits.argmax(1) == expected.argmax(1)).float().mean() > 0.9
        torch.testing.assert_close(logits.float(), expected, atol=0.3, rtol=0.1)


def test_texts_without_anything_in_common_are_refused(tmp_path):
    with pytest.raises(UserError, match="not a character in common"):
        build_tiny_model(["天地", "玄黄"], ["好", "坏"], {0: "好", 1: "坏"}, str(tmp_path))


def test_a_saved_model_is_served_by_pipeline_from_anywhere(tiny, tmp_path):
    model, tokenizer, texts, labels, _ = tiny
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "ngram_modernbert.py").exists()
    served = pipeline("text-classification", str(tmp_path), trust_remote_code=True)
    right = [list(TELLING).index(answer["label"]) for answer in served(texts)] == np.array(labels)
    assert right.mean() > 0.95


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


def test_cross_predictions_find_a_wrong_label():
    texts, names = zip(*make_reviews(200), strict=True)
    labels = np.array([name == "差评" for name in names]).astype(int)
    flipped = labels.copy()
    flipped[[7, 100]] ^= 1
    probability = cross_predict(list(texts), flipped.tolist(), 2)
    assert probability.shape == (200, 2)
    np.testing.assert_allclose(probability.sum(1), 1, rtol=1e-5)
    assert set(np.argsort(probability[np.arange(200), flipped])[:10]) >= {7, 100}


def test_neighbours_share_a_fold_and_each_class_is_in_several():
    labels = np.array([0] * 500 + [1] * 12 + [2])
    folds = number_folds(labels, 5)
    assert (folds[:50] == folds[0]).all() and set(folds[:500]) == set(range(5))
    assert set(folds[500:512]) == set(range(5))
