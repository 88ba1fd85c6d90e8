"""Accuracy, macro-F1 and what they are made of: one definition for train.py and baseline.py."""

import numpy as np
from sklearn.metrics import precision_recall_fscore_support


def score_classes(labels: np.ndarray, predicted: np.ndarray, num_labels: int) -> dict:
    """Scores of the predicted classes by the labels, both numbers of shape (rows,).

    Returns:
        accuracy; macro_f1, the mean over the classes that a row has; per_class: precision, recall, f1 and support, each
        of shape (num_labels,), 0 where there is nothing to divide by.
    """
    scores = precision_recall_fscore_support(labels, predicted, labels=range(num_labels), zero_division=0)
    per_class = dict(zip(("precision", "recall", "f1", "support"), scores, strict=True))
    return {
        "accuracy": float((labels == predicted).mean()),
        "macro_f1": float(per_class["f1"][per_class["support"] > 0].mean()),
        "per_class": per_class,
    }
