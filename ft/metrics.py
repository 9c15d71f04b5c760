"""Exact metrics over all rows of a split, computed by scikit-learn in one place and without a network."""

from typing import Any, ClassVar

import numpy as np

# The numbers; greater is better for each of them.
CLASSIFICATION_METRICS = (
    "accuracy", "f1_macro", "f1_weighted", "precision_macro", "recall_macro", "matthews_correlation", "auroc",
)  # fmt: skip


def classification_metrics(probabilities: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Metrics of `probabilities` (rows, classes), each row summing to one, against `labels` (rows,).

    Numbers: accuracy; macro F1, precision and recall and weighted F1, over the classes that occur in labels
    or predictions (0 where a class is never predicted); Matthews correlation; auroc (macro, one class against
    the rest; of the second class for two), None where a class does not occur. Tables: per_class (precision,
    recall, f1, support) and confusion_matrix (rows are true, columns predicted classes)."""
    from sklearn import metrics

    predicted = probabilities.argmax(axis=1)
    classes = list(range(len(names)))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=0
    )
    seen = np.union1d(labels, predicted)
    every_class = len(np.unique(labels)) == len(names)
    if every_class and len(names) == 2:
        auroc = float(metrics.roc_auc_score(labels, probabilities[:, 1]))
    elif every_class:
        auroc = float(metrics.roc_auc_score(labels, probabilities, multi_class="ovr", labels=classes))
    else:
        auroc = None
    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "f1_macro": float(f1[seen].mean()),
        "f1_weighted": float(np.average(f1, weights=support)),
        "precision_macro": float(precision[seen].mean()),
        "recall_macro": float(recall[seen].mean()),
        "matthews_correlation": float(metrics.matthews_corrcoef(labels, predicted)),
        "auroc": auroc,
        "per_class": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
            for name, p, r, f, s in zip(names, precision, recall, f1, support, strict=True)
        },
        "confusion_matrix": metrics.confusion_matrix(labels, predicted, labels=classes).tolist(),
    }


class NamedMetrics:
    """Metrics that the user named: from the `evaluate` library where it has them, else ours of the same name.

    `load` raises `UserError` for a name that neither knows, before any training.
    """

    OURS: ClassVar = {
        "f1": "f1_macro",
        "precision": "precision_macro",
        "recall": "recall_macro",
        "roc_auc": "auroc",
    }
    AVERAGED = ("f1", "precision", "recall")

    def __init__(self, names: list[str], ours: list[str]) -> None:
        from ft.errors import UserError

        self.names = names
        self.loaded: dict[str, Any] = {}
        self.notes: list[str] = []
        for name in names:
            metric, reason = _load(name)
            key = name.rstrip("/").split("/")[-1]
            if metric is not None:
                self.loaded[key] = metric
            elif self.OURS.get(name, name) in ours:
                self.notes.append(
                    f"metric {name!r}: computed here, because `evaluate` cannot load it ({reason})"
                )
                self.loaded[key] = self.OURS.get(name, name)
            else:
                raise UserError(
                    f"metrics: {name!r} is not known here and `evaluate` cannot load it ({reason}); "
                    "expected one of "
                    f"{', '.join(ours)}, a metric of `evaluate`, or a folder with one."
                )

    def keys(self) -> list[str]:
        """The names under which the values will stand, as far as they are known before."""
        return list(self.loaded)

    def compute(
        self, predictions: np.ndarray, labels: np.ndarray, ours: dict[str, Any], classes: int
    ) -> dict[str, Any]:
        """The named metrics of predicted and true class numbers (rows,); `ours` are those computed here."""
        found: dict[str, Any] = {}
        for key, metric in self.loaded.items():
            if isinstance(metric, str):
                found[key] = ours[metric]
                continue
            options = {"average": "macro"} if key in self.AVERAGED and classes > 2 else {}
            found |= metric.compute(predictions=predictions, references=labels, **options)
        return found


def _load(name: str) -> tuple[Any, str]:
    import logging
    import os

    try:
        import evaluate
    except ImportError:
        return None, "the library is not installed"
    logging.getLogger("evaluate").setLevel(logging.ERROR)
    try:
        # One process alone computes, so a file of its own keeps concurrent runs out of each other's locks.
        return evaluate.load(name, experiment_id=f"ft-{os.getpid()}"), ""
    except Exception as error:  # the hub client raises many unrelated types
        return (
            None,
            f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error) else ''}",
        )
