"""Metrics as functions of sums over rows: counts (accuracy, F1, ...) and moments (errors, R2, Pearson)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ft.analysis.resampling import MOST_DENSE, joined, resampled_sums

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Values = dict[str, np.ndarray]


class Statistic(Protocol):
    """Some metrics of one run's predictions."""

    def values(self) -> dict[str, float]:
        """The metrics on the rows as they are; NaN if undefined."""

    def resampled(self, resamples: int, seed: int, row_by_row: bool = False) -> Values:
        """The metrics on bootstrap resamples of the rows, (resamples,) each. With `row_by_row`, resample i
        has the same rows for all statistics on that many rows with that seed."""


@dataclass(frozen=True)
class Sums:
    """Metrics that are functions of sums over rows.

    `features` (kinds, columns) is what a row of each kind adds, `kind` (rows,) which kind each row is;
    `metrics` turns sums (resamples, columns) into metrics (resamples,)."""

    features: np.ndarray | csr_array
    kind: np.ndarray
    metrics: Callable[[np.ndarray], Values]

    def values(self) -> dict[str, float]:
        """See `Statistic`."""
        sums = np.bincount(self.kind, minlength=self.features.shape[0]) @ self.features
        return {name: float(value[0]) for name, value in self.metrics(sums[None]).items()}

    def resampled(self, resamples: int, seed: int, row_by_row: bool = False) -> Values:
        """See `Statistic`."""
        return joined(
            map(self.metrics, resampled_sums(self.features, self.kind, resamples, seed, row_by_row))
        )


def together(one: Sums, other: Sums) -> Sums:
    """The metrics of both, dense and of the same kinds of rows, from one draw of the rows, which is most of
    the cost of resampling."""
    columns = one.features.shape[1]
    return Sums(
        np.hstack([one.features, other.features]),
        one.kind,
        lambda sums: one.metrics(sums[:, :columns]) | other.metrics(sums[:, columns:]),
    )


# --- counts


def single_label(predicted: np.ndarray, labels: np.ndarray, classes: int) -> Sums:
    """The metrics of `ft.metrics.classification_metrics` except auroc, of predicted and true classes
    (rows,)."""
    from scipy.sparse import csr_array

    cells, kind = np.unique(labels.astype(np.int64) * classes + predicted, return_inverse=True)
    true, guess = np.divmod(cells, classes)
    cell, right = np.arange(len(cells)), true == guess
    places = (
        np.concatenate([cell, cell, cell[right]]),
        np.concatenate([true, classes + guess, 2 * classes + true[right]]),
    )
    features = csr_array((np.ones(len(places[0])), places), shape=(len(cells), 3 * classes))
    return _sums(features, kind, lambda sums: _count_metrics(*np.split(sums, 3, axis=1)))


def _sums(features: csr_array, kind: np.ndarray, metrics: Callable[[np.ndarray], Values]) -> Sums:
    """With few columns, they are dense, whose products are faster."""
    return Sums(features if features.shape[1] > MOST_DENSE else features.toarray(), kind, metrics)


def _count_metrics(support: np.ndarray, guessed: np.ndarray, right: np.ndarray) -> Values:
    """Metrics from true, predicted and correctly predicted rows of each class: (resamples, classes) each."""
    rows, hits = support.sum(axis=1), right.sum(axis=1)
    seen = (support + guessed > 0).sum(axis=1)
    precision, recall = ratio(right, guessed), ratio(right, support)
    f1 = ratio(2 * right, support + guessed)
    above = hits * rows - (support * guessed).sum(axis=1)
    below = (rows**2 - (support**2).sum(axis=1)) * (rows**2 - (guessed**2).sum(axis=1))
    return {
        "accuracy": hits / rows,
        "f1_macro": f1.sum(axis=1) / seen,
        "f1_weighted": (f1 * support).sum(axis=1) / rows,
        "precision_macro": precision.sum(axis=1) / seen,
        "recall_macro": recall.sum(axis=1) / seen,
        "matthews_correlation": ratio(above, np.sqrt(below)),
    }


def multi_label(predicted: np.ndarray, truth: np.ndarray) -> Sums:
    """The metrics of `ft.metrics.multilabel_metrics` except auroc, of predicted and true labels (rows,
    labels) of 0 and 1."""
    from scipy.sparse import csr_array, hstack

    both = np.hstack([truth, predicted]).astype(bool)
    packed = np.packbits(both, axis=1)
    as_one = packed.view(np.dtype((np.void, packed.shape[1]))).ravel()
    _, first, kind = np.unique(as_one, return_index=True, return_inverse=True)
    true, guess = (csr_array(part, dtype=np.float64) for part in np.split(both[first], 2, axis=1))
    right = true * guess
    given, wrong = true.sum(axis=1) + guess.sum(axis=1), (true != guess).sum(axis=1)
    sample = np.where(given > 0, ratio(2 * right.sum(axis=1), given), 1.0)
    extra = csr_array(np.stack([np.ones(len(first)), sample, wrong == 0], axis=1))
    return _sums(hstack([true, guess, right, extra]).tocsr(), kind, _label_metrics)


def _label_metrics(sums: np.ndarray) -> Values:
    rows, samples, exact = sums[:, -3:].T
    support, guessed, right = np.split(sums[:, :-3], 3, axis=1)
    supports, guesses, hits = (part.sum(axis=1) for part in (support, guessed, right))
    seen = (support + guessed > 0).sum(axis=1)
    return {
        "f1_micro": ratio(2 * hits, supports + guesses),
        "f1_macro": ratio(ratio(2 * right, support + guessed).sum(axis=1), seen),
        "f1_samples": samples / rows,
        "precision_micro": ratio(hits, guesses),
        "recall_micro": ratio(hits, supports),
        "precision_macro": ratio(ratio(right, guessed).sum(axis=1), seen),
        "recall_macro": ratio(ratio(right, support).sum(axis=1), seen),
        "subset_accuracy": exact / rows,
    }


# --- moments


def regression(predicted: np.ndarray, truth: np.ndarray) -> Sums:
    """The metrics of `ft.metrics.regression_metrics` except spearmanr, of predicted and true numbers
    (rows,)."""
    x, y = predicted.astype(np.float64), truth.astype(np.float64)
    error = x - y
    x, y = x - x.mean(), y - y.mean()  # sums of squares of small numbers lose no digits
    x = x / (x.std() or 1.0)  # a correlation knows no unit: so a test may exchange the rows of two runs
    features = np.stack([np.ones(len(x)), error**2, abs(error), x, y, x * x, y * y, x * y], axis=1)

    def metrics(sums: np.ndarray) -> Values:
        square, absolute, mx, my, xx, yy, xy = (sums[:, 1:] / sums[:, :1]).T
        r2 = 1 - defined(square, _variance(my, yy))
        return {"mse": square, "mae": absolute, "r2": r2, "pearsonr": correlation(mx, my, xx, yy, xy)}

    return Sums(features, np.arange(len(x)), metrics)


# --- arithmetic


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, and 0 where below is 0."""
    return np.divide(above, below, out=np.zeros_like(above, dtype=np.float64), where=below != 0)


def defined(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, and NaN where below is 0."""
    return np.divide(above, below, out=np.full_like(above, np.nan, dtype=np.float64), where=below != 0)


def correlation(
    mx: np.ndarray | float, my: np.ndarray | float, xx: np.ndarray, yy: np.ndarray, xy: np.ndarray
) -> np.ndarray:
    """Correlation from means, mean squares and the mean product; NaN where a side is constant."""
    return defined(xy - mx * my, np.sqrt(_variance(mx, xx) * _variance(my, yy)))


def _variance(mean: np.ndarray | float, square: np.ndarray) -> np.ndarray:
    """Variance from mean and mean square; 0 if only rounding error is left."""
    variance = square - mean * mean
    return np.where(variance > 1e-12 * square, variance, 0.0)
