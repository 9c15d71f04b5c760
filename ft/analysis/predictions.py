"""One run's predictions on some rows, as intervals, comparisons and tables of errors need them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ft.analysis import ranks, statistics
from ft.analysis.statistics import Statistic, Sums

TUNED = "_tuned"  # ends the names of multi-label metrics at chosen thresholds


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


def single_label(
    probabilities: np.ndarray, labels: np.ndarray, predicted: np.ndarray | None = None
) -> Predictions:
    """Of probabilities (rows, classes) and true classes (rows,); `predicted` (rows,) is the most probable
    class, unless given."""
    if predicted is None:
        predicted = probabilities.argmax(axis=1)
    counts = statistics.single_label(predicted, labels, probabilities.shape[1])
    area = ranks.auroc(probabilities, labels)
    return Predictions(
        [counts, *([area] if area else [])],
        [counts],
        predicted == labels,
        probabilities[np.arange(len(labels)), predicted],
        one_label=True,
    )


def multi_label(
    probabilities: np.ndarray, truth: np.ndarray, predicted: np.ndarray | None = None
) -> Predictions:
    """Of probabilities and true labels (rows, labels). With `predicted` (rows, labels), which were chosen by
    other thresholds than 0.5, their metrics are there, too, under names that end in _tuned, and they decide
    what is right."""
    at_half = probabilities >= 0.5
    counts = [statistics.multi_label(at_half, truth)]
    if predicted is not None:
        tuned = statistics.multi_label(predicted, truth)
        metrics = tuned.metrics
        counts.append(replace(tuned, metrics=lambda s: {f"{k}{TUNED}": v for k, v in metrics(s).items()}))
    given = at_half if predicted is None else predicted.astype(bool)
    area = ranks.auroc(probabilities, truth)
    each = np.where(given, probabilities, 1 - probabilities)
    return Predictions(
        [*counts, *([area] if area else [])], counts, (given == truth).all(axis=1), each.prod(axis=1)
    )


def regression(predicted: np.ndarray, truth: np.ndarray) -> Predictions:
    """Of predicted and true numbers (rows,)."""
    moments = statistics.regression(predicted, truth)
    return Predictions(
        [moments, ranks.spearman(predicted, truth)],
        [moments, ranks.rank_correlation(predicted, truth)],
        error=np.abs(predicted.astype(np.float64) - truth),
    )
