"""One run's predictions on some rows, as intervals, comparisons and tables of errors need them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ft.analysis import ranks, statistics
from ft.analysis.statistics import Statistic, Sums


@dataclass(frozen=True)
class Predictions:
    """`statistics` have the metrics; `swapped` those of them that a permutation test can exchange with
    another run's, row by row.

    right (rows,) bool: whether a row is predicted rightly, in all its labels; confidence (rows,): the
    probability that the model gives to that. Of a regression there is neither, but error (rows,), the
    absolute one. `one_label`: whether a row has one label out of several."""

    statistics: Sequence[Statistic]
    swapped: Sequence[Sums]
    right: np.ndarray | None = None
    confidence: np.ndarray | None = None
    error: np.ndarray | None = None
    one_label: bool = False


def single_label(probabilities: np.ndarray, labels: np.ndarray) -> Predictions:
    """Of probabilities (rows, classes) and true classes (rows,)."""
    predicted = probabilities.argmax(axis=1)
    counts = statistics.single_label(predicted, labels, probabilities.shape[1])
    area = ranks.auroc(probabilities, labels)
    return Predictions(
        [counts, *([area] if area else [])],
        [counts],
        predicted == labels,
        probabilities.max(axis=1),
        one_label=True,
    )


def multi_label(
    probabilities: np.ndarray, truth: np.ndarray, thresholds: np.ndarray | None = None, ending: str = "_tuned"
) -> Predictions:
    """Of probabilities and true labels (rows, labels). With `thresholds` (labels,) the metrics at them are
    there, too, under names with an `ending`, and decide what is right; else 0.5 does."""
    counts = statistics.multi_label(probabilities >= 0.5, truth)
    found = [counts]
    predicted = probabilities >= (0.5 if thresholds is None else thresholds)
    if thresholds is not None:
        tuned = statistics.multi_label(predicted, truth)
        metrics = tuned.metrics
        found.append(replace(tuned, metrics=lambda s: {k + ending: v for k, v in metrics(s).items()}))
    area = ranks.auroc(probabilities, truth)
    each = np.where(predicted, probabilities, 1 - probabilities)
    return Predictions(
        [*found, *([area] if area else [])], found, (predicted == truth).all(axis=1), each.prod(axis=1)
    )


def regression(predicted: np.ndarray, truth: np.ndarray) -> Predictions:
    """Of predicted and true numbers (rows,)."""
    moments = statistics.regression(predicted, truth)
    return Predictions(
        [moments, ranks.spearman(predicted, truth)],
        [moments, ranks.rank_correlation(predicted, truth)],
        error=np.abs(predicted.astype(np.float64) - truth),
    )
