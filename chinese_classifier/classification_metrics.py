"""Accuracy, macro-F1 and what they are made of, as a metric of the library evaluate.

evaluate.load("accuracy") would ask a hub; this file is loaded in its place, from where it stands.
"""

import datasets
import evaluate
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support


class ClassificationMetrics(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references: the number of a class each; num_labels: classes there are",
            features=datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")}),
        )

    def _compute(self, predictions, references, num_labels):
        """Every class counts, also one that no row has: its precision, recall and F1 are 0 then.

        Returns:
            accuracy, macro_f1; per_class: precision, recall, f1 and support, one value a class;
            confusion_matrix: rows of class i that were taken for class j, shape (num_labels, num_labels).
        """
        labels = list(range(num_labels))
        given = {"y_true": references, "y_pred": predictions, "labels": labels}
        scores = precision_recall_fscore_support(**given, zero_division=0)
        return {
            "accuracy": accuracy_score(references, predictions),
            "macro_f1": f1_score(**given, average="macro", zero_division=0),
            "per_class": dict(
                zip(("precision", "recall", "f1", "support"), (list(map(float, s)) for s in scores), strict=True)
            ),
            "confusion_matrix": confusion_matrix(**given).tolist(),
        }
