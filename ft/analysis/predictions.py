"""One run's predictions on some rows, in the form that intervals, comparisons and tables of errors need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ft.analysis import ranks, statistics
from ft.analysis.statistics import Statistic, Sums
from ft.metrics import AT_HALF

# Rows of a slice up to which Spearman's correlation is recomputed for every resample: 30 slices of this size
# take seconds. Above it, an end of the interval is off by less than a tenth of its width.
MOST_EXACT_PART = 500


@dataclass(frozen=True)
class Predictions:
    """truth and predicted: (rows,) classes or numbers, or (rows, labels) of 0 and 1. probabilities: (rows,
    targets), None for a regression.

    `statistics` have the metrics; `swapped` those of them that a permutation test can exchange with
    another run's, row by row.

    right (rows,) bool: whether a row is predicted correctly, in all its labels; confidence (rows,): the
    probability that the model gives to that. A regression has neither, but error (rows,), the absolute error.
    `one_label`: whether a row has one label out of several. `part` returns the predictions of some rows."""

    truth: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray | None
    statistics: Sequence[Statistic]
    swapped: Sequence[Sums]
    right: np.ndarray | None = None
    confidence: np.ndarray | None = None
    error: np.ndarray | None = None
    one_label: bool = False
    part: Callable[[np.ndarray], Predictions] | None = None

    def values(self) -> dict[str, float]:
        """The metrics on the rows as they are; NaN if undefined."""
        return {name: value for statistic in self.statistics for name, value in statistic.values().items()}


def single_label(
    probabilities: np.ndarray, labels: np.ndarray, predicted: np.ndarray | None = None, ranked: bool = True
) -> Predictions:
    """From probabilities (rows, classes) and true classes (rows,); `predicted` (rows,) is the most probable
    class, unless given. `ranked`: include the metrics that compare rows with one another."""
    if predicted is None:
        predicted = probabilities.argmax(axis=1)
    counts = statistics.single_label(predicted, labels, probabilities.shape[1])
    area = ranks.auroc(probabilities, labels) if ranked else None
    return Predictions(
        labels,
        predicted,
        probabilities,
        [counts, *([area] if area else [])],
        [counts],
        predicted == labels,
        probabilities[np.arange(len(labels)), predicted],
        one_label=True,
        part=lambda rows: single_label(probabilities[rows], labels[rows], predicted[rows], False),
    )


def multi_label(
    probabilities: np.ndarray, truth: np.ndarray, predicted: np.ndarray | None = None, ranked: bool = True
) -> Predictions:
    """From probabilities and true labels (rows, labels). `predicted` (rows, labels) are those from 0.5 on,
    unless given, as chosen by other thresholds: then the metrics at 0.5 are included, too, under names that
    end in _at_0.5."""
    half = probabilities >= 0.5
    given = half if predicted is None else predicted.astype(bool)
    counts = [statistics.multi_label(given, truth)]
    if predicted is not None:
        at_half = statistics.multi_label(half, truth)
        metrics = at_half.metrics
        counts.append(replace(at_half, metrics=lambda s: {k + AT_HALF: v for k, v in metrics(s).items()}))
    area = ranks.auroc(probabilities, truth) if ranked else None
    each = np.where(given, probabilities, 1 - probabilities)
    return Predictions(
        truth,
        given,
        probabilities,
        [*counts, *([area] if area else [])],
        counts,
        (given == truth).all(axis=1),
        each.prod(axis=1),
        part=lambda rows: multi_label(
            probabilities[rows], truth[rows], None if predicted is None else predicted[rows], False
        ),
    )


def regression(predicted: np.ndarray, truth: np.ndarray, exact: bool = True) -> Predictions:
    """From predicted and true numbers (rows,); `exact` as in `ranks.spearman`."""
    moments, ranked = statistics.regression(predicted, truth), ranks.spearman(predicted, truth, exact)
    return Predictions(
        truth,
        predicted,
        None,
        [statistics.together(moments, ranked)] if isinstance(ranked, Sums) else [moments, ranked],
        [moments, ranks.rank_correlation(predicted, truth)],
        error=np.abs(predicted.astype(np.float64) - truth),
        part=lambda rows: regression(predicted[rows], truth[rows], len(rows) <= MOST_EXACT_PART),
    )
