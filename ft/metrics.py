"""Exact metrics over all rows of a split, computed by scikit-learn in one place and without a network."""

import json
from typing import Any

import numpy as np

from ft.analysis.statistics import ratio
from ft.errors import UserError, first_line
from ft.values import scalars

# The numbers; greater is better for each of them.
CLASSIFICATION_METRICS = (
    "accuracy", "f1_macro", "f1_weighted", "precision_macro", "recall_macro", "matthews_correlation", "auroc",
)  # fmt: skip


MULTILABEL_METRICS = (
    "f1_micro", "f1_macro", "f1_samples", "precision_micro", "recall_micro", "precision_macro",
    "recall_macro", "subset_accuracy", "auroc",
)  # fmt: skip
MATRIX_CLASSES = 1_000  # more get no confusion matrix: for 10,000 it would be a list of 100 million numbers
AT_HALF = "_at_0.5"  # ends the names of the multi-label metrics at 0.5, where thresholds were chosen
REGRESSION_METRICS = ("mse", "mae", "r2", "pearsonr", "spearmanr")


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities (rows, classes) of logits, in float64."""
    shifted = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """Probabilities of logits of any shape, element by element, in float64."""
    from scipy.special import expit

    return expit(scores.astype(np.float64))


def classification_metrics(probabilities: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Metrics of `probabilities` (rows, classes), each row summing to one, against `labels` (rows,).

    Numbers: accuracy; macro F1, precision and recall and weighted F1, over the classes that occur in labels
    or predictions (0 where a class is never predicted); Matthews correlation; auroc (macro, one class against
    the rest; of the second class for two), None where a class does not occur. Tables: per_class (precision,
    recall, f1, support) and, of up to `MATRIX_CLASSES`, confusion_matrix (rows are true, columns predicted
    classes)."""
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
    found: dict[str, Any] = {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "f1_macro": float(f1[seen].mean()),
        "f1_weighted": float(np.average(f1, weights=support)),
        "precision_macro": float(precision[seen].mean()),
        "recall_macro": float(recall[seen].mean()),
        "matthews_correlation": _matthews(labels, predicted),
        "auroc": auroc,
        "per_class": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
            for name, p, r, f, s in zip(names, precision, recall, f1, support, strict=True)
        },
    }
    if len(names) <= MATRIX_CLASSES:
        found["confusion_matrix"] = metrics.confusion_matrix(labels, predicted, labels=classes).tolist()
    return found


def _matthews(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Matthews correlation of classes (rows,); 0 where either side is of one class alone.

    Of counts: scikit-learn makes a matrix of all classes times all classes for it."""
    classes, count = 1 + max(labels.max(), predicted.max()), float(len(labels))
    true, said = (np.bincount(side, minlength=classes).astype(np.float64) for side in (labels, predicted))
    above = count * np.count_nonzero(labels == predicted) - true @ said
    below = (count**2 - said @ said) * (count**2 - true @ true)
    return float(above / np.sqrt(below)) if below else 0.0


def multilabel_metrics(
    probabilities: np.ndarray, labels: np.ndarray, names: list[str], thresholds: np.ndarray | None = None
) -> dict[str, Any]:
    """Metrics of `probabilities` (rows, labels) against `labels` (rows, labels) of 0 and 1.

    Numbers, at `thresholds` (labels,) or at 0.5: F1, precision and recall over all decisions (micro) and as a
    mean over the labels that occur in rows or predictions (macro); F1 as a mean over rows, where a row
    without labels for which none is predicted is correct (f1_samples); the share of rows with every label
    correct (subset_accuracy). With thresholds, also the same at 0.5, under names that end in _at_0.5. auroc:
    the mean over the labels that some rows have and others do not, None without any. Table: per_label
    (threshold, precision, recall, f1, support)."""
    from sklearn.metrics import roc_auc_score

    used = np.full(len(names), 0.5) if thresholds is None else thresholds
    numbers, each = _at(probabilities >= used, labels.astype(bool))
    found: dict[str, Any] = dict(numbers)
    if thresholds is not None:
        at_half, _ = _at(probabilities >= 0.5, labels.astype(bool))
        found |= {name + AT_HALF: value for name, value in at_half.items()}
    both = np.flatnonzero(labels.any(axis=0) & ~labels.all(axis=0))
    areas = [roc_auc_score(labels[:, label], probabilities[:, label]) for label in both]
    found["auroc"] = float(np.mean(areas)) if areas else None
    columns = ("threshold", "precision", "recall", "f1", "support")
    found["per_label"] = {
        name: dict(zip(columns, (value.item() for value in values), strict=True))
        for name, *values in zip(names, used, *each, strict=True)
    }
    return found


def _at(predicted: np.ndarray, labels: np.ndarray) -> tuple[dict[str, float], list[np.ndarray]]:
    """The numbers of `multilabel_metrics`, and precision, recall, F1 and support of each label (labels,).

    Counted here, because scikit-learn takes a matrix of one label for one of two classes."""
    hits = predicted & labels

    def scores(axis: int | None) -> list[np.ndarray]:
        right, said, true = (part.sum(axis=axis) for part in (hits, predicted, labels))
        return [ratio(right, said), ratio(right, true), ratio(2 * right, said + true)]

    micro, each = scores(None), scores(0)
    seen = labels.any(axis=0) | predicted.any(axis=0)
    macro = [float(values[seen].mean()) if seen.any() else 0.0 for values in each]
    nothing = ~(labels.any(axis=1) | predicted.any(axis=1))
    return {
        "f1_micro": float(micro[2]), "f1_macro": macro[2],
        "f1_samples": float(np.where(nothing, 1.0, scores(1)[2]).mean()),
        "precision_micro": float(micro[0]), "recall_micro": float(micro[1]),
        "precision_macro": macro[0], "recall_macro": macro[1],
        "subset_accuracy": float((labels == predicted).all(axis=1).mean()),
    }, [*each, labels.sum(axis=0)]  # fmt: skip


def regression_metrics(predicted: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Metrics of `predicted` (rows,) against `targets` (rows,), in their original unit: mse, mae, r2, and
    Pearson's and Spearman's correlation; None if the targets (for a correlation: or the predictions) are
    constant."""
    from scipy import stats
    from sklearn import metrics

    spread = bool(np.ptp(targets))
    both = spread and bool(np.ptp(predicted))
    return {
        "mse": float(metrics.mean_squared_error(targets, predicted)),
        "mae": float(metrics.mean_absolute_error(targets, predicted)),
        "r2": float(metrics.r2_score(targets, predicted)) if spread else None,
        "pearsonr": float(stats.pearsonr(targets, predicted).statistic) if both else None,
        "spearmanr": float(stats.spearmanr(targets, predicted).statistic) if both else None,
    }


# Names of the `evaluate` library and ours, by the style of predictions: a class number per row (rows,), 0 or
# 1 for each label (rows, labels), a number per row (rows,).
STYLES = {
    "classes": {
        "accuracy": "accuracy", "f1": "f1_macro", "precision": "precision_macro", "recall": "recall_macro",
        "roc_auc": "auroc", "matthews_correlation": "matthews_correlation",
    },
    "labels": {
        "accuracy": "subset_accuracy", "f1": "f1_micro", "precision": "precision_micro",
        "recall": "recall_micro", "roc_auc": "auroc",
    },
    "numbers": {
        "mse": "mse", "mae": "mae", "r_squared": "r2", "pearsonr": "pearsonr", "spearmanr": "spearmanr",
    },
}  # fmt: skip
# Ours are computed instead: of those of `evaluate`, the first needs scores, not classes, the second rounds to
# three digits, and the others take numbers in float32, in which seconds since 1970 are two minutes apart.
LEFT_OUT = ("roc_auc", "r_squared", "mse", "mae", "pearsonr", "spearmanr")
# The metrics of `evaluate` that must be told how to average, even over two classes.
AVERAGED = ("f1", "precision", "recall")
AVERAGES = {"classes": "macro", "labels": "micro"}


class NamedMetrics:
    """Metrics that the user named: from the `evaluate` library if it has them, else ours of the same name; a
    name gives the same number either way.

    F1, precision and recall are macro for classes and micro for labels. Raises `UserError`, before any
    training, for a name that neither knows, for one that is for another style of predictions (a key of
    `STYLES`), and for one that fails on a few made-up rows of this style with `count` classes or labels.
    `notes` says what is computed here."""

    def __init__(self, names: list[str], ours: list[str], style: str = "classes", count: int = 2) -> None:
        self.style = style
        self.metrics: dict[str, Any] = {}  # a metric of `evaluate`, or the name of ours
        self.notes: list[str] = []
        self._numbers: list[str] = []
        same = STYLES[style]
        elsewhere = {name for each in STYLES.values() for name in (*each, *each.values())}
        for name in names:
            key, own = name.rstrip("/").split("/")[-1], same.get(name, name)
            if name in elsewhere and name not in same and name not in ours:
                raise UserError(
                    f"metrics: {name!r} is not for this kind of label; expected one of "
                    f"{', '.join([*same, *ours])}."
                )
            is_ours = name in LEFT_OUT or (name in ours and name not in same)
            metric, reason = (None, "") if is_ours else _load(name, style)
            if metric is None and own in ours:
                self.metrics[key] = own
                self._numbers.append(key)
                why = f" (`evaluate` cannot load it: {reason})" if reason else ""
                if why or own != name:
                    self.notes.append(f"metric {name}: {own}, computed here{why}")
                continue
            if metric is None:
                raise UserError(
                    f"metrics: {name!r} is not known here and `evaluate` cannot load it ({reason}); "
                    f"expected one of {', '.join(ours)}, a metric of `evaluate`, or a folder with one."
                )
            self.metrics[key] = metric
            numbers = scalars(self._of_evaluate(key, metric, *_trial(style, count)))
            self._numbers += numbers
            taken = [number for number in numbers if number in (*ours, "loss", "rows")]
            if taken and name not in same:  # those of `evaluate` are the same numbers
                self.notes.append(f"metric {name}: gives {', '.join(taken)}, replacing what is computed here")

    def keys(self) -> list[str]:
        """The names of the numbers that `compute` gives; a metric of `evaluate` names its own."""
        return self._numbers

    def compute(self, predictions: np.ndarray, labels: np.ndarray, ours: dict[str, Any]) -> dict[str, Any]:
        """The named metrics of predictions and labels in the given style; `ours` are those computed here."""
        found: dict[str, Any] = {}
        for key, metric in self.metrics.items():
            if isinstance(metric, str):
                found[key] = ours[metric]
            else:
                found |= self._of_evaluate(key, metric, predictions, labels)
        return found

    def _of_evaluate(
        self, key: str, metric: Any, predictions: np.ndarray, labels: np.ndarray
    ) -> dict[str, Any]:
        options = {"average": AVERAGES[self.style]} if key in AVERAGED and self.style in AVERAGES else {}
        if options and labels.ndim == 2 and labels.shape[1] == 1:
            # To scikit-learn, a single label is two classes, whose micro F1 is accuracy.
            options = {"average": "binary"}
        try:
            value = metric.compute(predictions=predictions, references=labels, **options)
            found = _plain(value if isinstance(value, dict) else {key: value})
            json.dumps(found)
        except Exception as error:  # whatever the metric's own code raises
            raise UserError(
                f"metrics: {key!r} fails on the predictions of this kind of label, or does not give JSON: "
                f"{type(error).__name__}: {' '.join(str(error).split())[:200]}; fix it, or leave it out."
            ) from None
        return found


def _trial(style: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels of a few rows, to see before any training whether a metric takes what will
    come."""
    if style == "classes":
        labels = np.arange(max(count, 2))
        return np.append(np.roll(labels, 1), 0), np.append(labels, 0)
    if style == "labels":
        row, label = np.indices((3, count))
        return (row + label) % 2, (row + label) // 2 % 2
    return np.array([0.5, 2.0, 1.5]), np.array([1.0, 2.5, 0.0])


def _plain(value: Any) -> Any:
    """The value with numbers and arrays of numpy and torch as Python's own, which JSON knows."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _load(name: str, style: str) -> tuple[Any, str]:
    import logging
    import os

    try:
        import evaluate
    except ImportError:
        return None, "the library is not installed"
    logging.getLogger("evaluate").setLevel(logging.ERROR)
    try:
        # Only one process computes, so a file of its own keeps concurrent runs out of each other's locks.
        config = "multilabel" if style == "labels" else None
        return evaluate.load(name, config, experiment_id=f"ft-{os.getpid()}"), ""
    except Exception as error:  # the hub client raises many unrelated types
        return None, f"{type(error).__name__}: {first_line(error)[:120]}"
