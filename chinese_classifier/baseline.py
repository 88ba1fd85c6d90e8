"""The linear model to beat: character n-grams, weighted by naive Bayes, with logistic regression; seconds on a CPU.

python baseline.py reviews                 accuracy and macro-F1 on train.py's validation and test rows
"""

import argparse
import sys

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline, make_pipeline

from classification_metrics import score_classes
from prepare import load_tables
from rows import UserError, sort_labels


class ClassRatio(TransformerMixin, BaseEstimator):
    """Scales each n-gram by how much more often the class has it than the others: the log of the ratio.

    Source: Wang and Manning, "Baselines and Bigrams" (2012).
    """

    def fit(self, features, is_class):
        counts = [np.asarray(features[is_class == side].sum(0)).ravel() + 0.5 for side in (1, 0)]
        self.log_ratio = np.log(counts[0] / counts[0].sum()) - np.log(counts[1] / counts[1].sum())
        return self

    def transform(self, features):
        return features @ sparse.diags_array(self.log_ratio)


def fit_baseline(table: pd.DataFrame) -> Pipeline:
    """A model of each class against the others on TF-IDF of 1 to 4 characters; its `predict` takes texts."""
    rare = 2 if len(table) > 1000 else 1  # rows that an n-gram has to be in
    features = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), min_df=rare, sublinear_tf=True, dtype=np.float32)
    one_class = make_pipeline(ClassRatio(), LogisticRegression(C=10, max_iter=1000))
    return make_pipeline(features, OneVsRestClassifier(one_class)).fit(table.text, table.label)


def score_baseline(tables: dict[str, pd.DataFrame]) -> dict[str, dict]:
    """Part -> the scores of a model of the training rows on its validation and test rows."""
    model, ids = fit_baseline(tables["train"]), {label: i for i, label in enumerate(sort_labels(tables["train"].label))}
    scores = {}
    for name in [name for name in tables if name != "train"]:
        labels, predicted = tables[name].label, pd.Series(model.predict(tables[name].text))
        scores[name] = score_classes(labels.map(ids).to_numpy(), predicted.map(ids).to_numpy(), len(ids))
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_path", help="as train.py's --data_path")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--seed", type=int, default=42, help="decides which blocks validate and test, as in train.py")
    options = parser.parse_args()
    columns, shares = (options.text_column, options.label_column), {"validation": 0.1, "test": 0.1}
    tables, *_ = load_tables(options.data_path, columns, shares, options.seed)
    labels = np.array(sort_labels(tables["train"].label))
    for name, scores in score_baseline(tables).items():
        unseen = ", ".join(labels[scores["per_class"]["support"] == 0])
        without = f"   (without {unseen}, of which there is no row)" if unseen else ""
        print(f"{name:<11} accuracy {scores['accuracy']:.4f}   macro-F1 {scores['macro_f1']:.4f}{without}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
