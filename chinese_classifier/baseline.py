"""Character TF-IDF with logistic regression: the figure to beat, and a second opinion on each training label.

python baseline.py reviews                 accuracy and macro-F1 on train.py's validation and test rows
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from filelock import FileLock
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import Pipeline, make_pipeline

from data import CACHE_DIR
from prepare import load_tables
from rows import UserError


def build_baseline() -> Pipeline:
    """Logistic regression on TF-IDF of single characters and pairs."""
    return make_pipeline(TfidfVectorizer(analyzer="char", ngram_range=(1, 2)), LogisticRegression(C=10, max_iter=1000))


def number_folds(labels: np.ndarray, num_folds: int) -> np.ndarray:
    """The fold of each row: blocks of neighbours in its class, which may be about the same thing, stay together."""
    folds = np.zeros(len(labels), dtype=int)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        folds[rows] = np.arange(len(rows)) // max(1, min(50, len(rows) // (2 * num_folds))) % num_folds
    return folds


def cross_predict(texts: list[str], labels: list[int], num_labels: int, num_folds: int = 5) -> np.ndarray:
    """What 1 to 4 characters say about each row by a classifier that has not seen the row.

    Source: Stone, "Cross-Validatory Choice and Assessment of Statistical Predictions" (1974).

    Returns:
        Probabilities, shape (rows, num_labels), fp32.
    """
    labels = np.array(labels)
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), min_df=2, sublinear_tf=True, dtype=np.float32)
    features = vectorizer.fit_transform(texts)
    folds = number_folds(labels, num_folds)
    probability = np.zeros((len(texts), num_labels), dtype=np.float32)
    for fold in np.unique(folds):
        seen = folds != fold
        if len(np.unique(labels[seen])) < 2:
            raise UserError("--distillation_alpha needs two rows or more of two classes or more.")
        model = LogisticRegression(C=3, max_iter=1000).fit(features[seen], labels[seen])
        # a class of a single row has no row left to learn from: its column stays 0
        probability[np.ix_(~seen, model.classes_)] = model.predict_proba(features[~seen])
    return probability


def load_cross_predictions(texts: list[str], labels: list[int], num_labels: int) -> np.ndarray:
    """`cross_predict`, computed by the first process that asks for it and cached by content."""
    identity = json.dumps([texts, labels, num_labels, Path(__file__).read_text("utf-8")])
    file = CACHE_DIR / f"cross-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npy"
    CACHE_DIR.mkdir(exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.exists():
            unfinished = file.with_suffix(".unfinished.npy")
            np.save(unfinished, cross_predict(texts, labels, num_labels))
            unfinished.rename(file)
    return np.load(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_path", help="as train.py's --data_path")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--seed", type=int, default=42, help="decides which blocks validate and test, as in train.py")
    options = parser.parse_args()
    columns = (options.text_column, options.label_column)
    shares = {"validation": 0.1, "test": 0.1}
    tables, *_ = load_tables(options.data_path, columns, shares, options.seed)
    model = build_baseline().fit(tables["train"].text, tables["train"].label)
    for name, table in list(tables.items())[1:]:
        predicted = model.predict(table.text)
        accuracy, macro_f1 = accuracy_score(table.label, predicted), f1_score(table.label, predicted, average="macro")
        print(f"{name:<11} {len(table):,} rows   accuracy {accuracy:.4f}   macro-F1 {macro_f1:.4f}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
