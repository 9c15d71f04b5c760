"""Metrics that compare rows with one another: AUROC and Spearman's correlation.

For a moderate number of rows, they are recomputed from the weights of the rows in every resample. Above that,
they are replaced by their first-order expansion in the weights (the Hajek projection of a U-statistic: van
der Vaart, Asymptotic Statistics, 1998, chapters 12 and 20), which is a function of sums. What that leaves out
is of order 1/rows, compared with an interval of 1/sqrt(rows). For an AUROC, the rarer side of a class, which
may be a handful of rows, is a mean over the rows that are drawn, as in the plain bootstrap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ft.analysis.resampling import BLOCKS, joined, row_weights
from ft.analysis.statistics import Statistic, Sums, Values, correlation, defined, regression

MOST_EXACT = 30_000  # rows times targets up to which AUROC is recomputed for every resample


@dataclass(frozen=True)
class Weighted:
    """Metrics that are recomputed from the weights of the rows: `metrics` takes (rows, resamples)."""

    rows: int
    metrics: Callable[[np.ndarray], Values]

    def values(self) -> dict[str, float]:
        """See `Statistic`."""
        return {name: float(value[0]) for name, value in self.metrics(np.ones((self.rows, 1))).items()}

    def resampled(self, resamples: int, seed: int, row_by_row: bool = False) -> Values:
        """See `Statistic`; it is always row by row."""
        return joined(map(self.metrics, row_weights(self.rows, resamples, seed)))


def auroc(probabilities: np.ndarray, labels: np.ndarray) -> Statistic | None:
    """The mean area under the ROC curve of `probabilities` (rows, targets); None if it is undefined.

    labels (rows,) are classes: the area is that of the second class for two, else the mean over one class
    against the rest, each of which must have a row. labels (rows, targets) of 0 and 1: the mean over the
    labels that some rows have and others do not."""
    if labels.ndim == 1:
        classes = probabilities.shape[1]
        if len(np.unique(labels)) < classes:
            return None
        sides = {c: labels == c for c in ([1] if classes == 2 else range(classes))}
    else:
        sides = {c: labels[:, c] != 0 for c in range(labels.shape[1])}
        sides = {c: positive for c, positive in sides.items() if positive.any() and not positive.all()}
        if not sides:
            return None
    rows = len(labels)
    if rows <= BLOCKS and rows * len(sides) <= MOST_EXACT:
        areas = [_weighted_area(probabilities[:, c], positive) for c, positive in sides.items()]

        def exact(weights: np.ndarray) -> Values:
            found = np.array([area(weights) for area in areas])
            known = (~np.isnan(found)).sum(axis=0)
            needed = len(areas) if labels.ndim == 1 else 1
            mean = defined(np.nan_to_num(found).sum(axis=0), known)
            return {"auroc": np.where(known >= needed, mean, np.nan)}

        return Weighted(rows, exact)
    from scipy.sparse import csr_array, hstack

    part, columns = np.zeros(rows), []
    for c, positive in sides.items():
        # The share of the other side that a row ranks correctly against; the area is its mean on each side.
        ours, others = positive.sum(), rows - positive.sum()
        placed = np.where(
            positive,
            _below(probabilities[:, c], ~positive) / others,
            1 - _below(probabilities[:, c], positive) / ours,
        )
        rare = positive if ours <= others else ~positive
        columns.append(csr_array(np.stack([rare, rare * placed], axis=1)))
        part += np.where(rare, 0, placed - placed[rare].mean()) / max(ours, others)
    features = hstack([*columns, np.stack([np.ones(rows), rows * part], axis=1)]).tocsr()
    needed = len(sides) if labels.ndim == 1 else 1

    def expanded(sums: np.ndarray) -> Values:
        areas = defined(sums[:, 1:-2:2], sums[:, :-2:2])
        known = (~np.isnan(areas)).sum(axis=1)
        mean = defined(np.nan_to_num(areas).sum(axis=1), known)
        moved = sums[:, -1] / sums[:, -2] / len(sides)  # by the other side
        return {"auroc": np.where(known >= needed, np.clip(mean + moved, 0, 1), np.nan)}

    return Sums(features, np.arange(rows), expanded)


def _weighted_area(score: np.ndarray, positive: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function from row weights (rows, resamples) to the area under the ROC curve (resamples,)."""
    order, starts, _ = _ties(score)
    sign = positive[order].astype(np.float64)

    def area(weights: np.ndarray) -> np.ndarray:
        sorted_weights = weights[order]
        ours = _group_sums(sorted_weights * sign[:, None], starts)
        others = _group_sums(sorted_weights * (1 - sign)[:, None], starts)
        pairs = (ours * (np.cumsum(others, axis=0) - others / 2)).sum(axis=0)
        return defined(pairs, ours.sum(axis=0) * others.sum(axis=0))

    return area


def spearman(predicted: np.ndarray, truth: np.ndarray, exact: bool = True) -> Weighted | Sums:
    """Spearman's rank correlation of predicted and true numbers (rows,), ties at their mean rank. Without
    `exact`, its expansion is resampled, however few the rows."""
    rows = len(truth)
    if exact and rows <= BLOCKS:
        rank_x, rank_y = _weighted_ranks(predicted), _weighted_ranks(truth)

        def anew(weights: np.ndarray) -> Values:
            x, y = rank_x(weights) - 0.5, rank_y(weights) - 0.5  # the mean rank is one half
            moments = [np.einsum("ij,ij,ij->j", weights, *pair) for pair in ((x, x), (y, y), (x, y))]
            return {"spearmanr": correlation(0.0, 0.0, *moments)}

        return Weighted(rows, anew)
    x, y = (_below(numbers) / rows for numbers in (predicted, truth))
    products = []
    for (one, numbers), (other, others) in (
        ((x, predicted), (x, predicted)), ((y, truth), (y, truth)), ((x, predicted), (y, truth)),
    ):  # fmt: skip
        # A row's contribution to the mean product of two ranks: its own, and part of those of rows above it.
        product = one * other + _above(numbers, other) / rows + _above(others, one) / rows
        products.append(product - 2 * (one * other).mean())
    features = np.stack([np.ones(rows), *products], axis=1)

    def metrics(sums: np.ndarray) -> Values:
        return {"spearmanr": correlation(0.5, 0.5, *(sums[:, 1:] / sums[:, :1]).T)}

    return Sums(features, np.arange(rows), metrics)


def rank_correlation(predicted: np.ndarray, truth: np.ndarray) -> Sums:
    """Spearman's correlation as the Pearson correlation of fixed ranks: for a permutation test, which
    exchanges the ranks of two runs, never for an interval."""
    from scipy.stats import rankdata

    ranks = regression(rankdata(predicted), rankdata(truth))
    return Sums(ranks.features, ranks.kind, lambda sums: {"spearmanr": ranks.metrics(sums)["pearsonr"]})


def _ties(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sort order of some numbers, where each group of ties begins in it, and the group of each row."""
    order = np.argsort(numbers, kind="stable")
    ascending = numbers[order]
    is_first = np.concatenate([[True], ascending[1:] != ascending[:-1]])
    group = np.empty(len(numbers), np.int64)
    group[order] = np.cumsum(is_first) - 1
    return order, np.flatnonzero(is_first), group


def _weighted_ranks(numbers: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function from row weights (rows, resamples) to ranks from 0 to 1 (rows, resamples)."""
    order, starts, group = _ties(numbers)

    def ranks(weights: np.ndarray) -> np.ndarray:
        grouped = _group_sums(weights[order], starts)
        middle = (np.cumsum(grouped, axis=0) - grouped / 2) / weights.sum(axis=0)
        return middle[group]

    return ranks


def _group_sums(ascending: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums (groups, resamples) of (rows, resamples) over the groups of `_ties`."""
    if len(starts) == len(ascending):  # no ties
        return ascending
    return np.add.reduceat(ascending, starts, axis=0)


def _below(numbers: np.ndarray, mass: np.ndarray | None = None) -> np.ndarray:
    """For each row, the sum of `mass` (default: 1 each) over the rows with a lower number, plus half of that
    over those with the same."""
    _, starts, group = _ties(numbers)
    grouped = np.bincount(group, weights=mass, minlength=len(starts))
    return (np.cumsum(grouped) - grouped / 2)[group]


def _above(numbers: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """The same over the rows with a higher number."""
    return mass.sum() - _below(numbers, mass)
