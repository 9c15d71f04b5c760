"""Whether one run is better than another on the same rows: differences with paired intervals, and tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ft.analysis.intervals import LEVEL, SEED, percentiles
from ft.analysis.predictions import Predictions
from ft.analysis.resampling import RESAMPLES, joined, swapped_sums

# How far apart two values of a metric can be, if not 1.
SPANS = {"matthews_correlation": 2, "pearsonr": 2, "spearmanr": 2, "mse": np.inf, "mae": np.inf, "r2": np.inf}


def differences(
    one: Sequence[Predictions], other: Sequence[Predictions], resamples: int = RESAMPLES
) -> dict[str, dict[str, Any]]:
    """Each metric of two sides, whose runs (one, or one per seed) are all scored on the same rows: a and b
    (means over the runs), difference (b - a), low and high of its 95 percent interval, p_value and test; None
    if undefined. A difference that is undefined on most resamples has no interval and no p-value.

    One run per side: the interval is that of the paired bootstrap, which draws the same rows for both; it
    does not include what another seed would change. `tests` has its p-values.

    Several: rows and seeds are drawn, crossed, as every run scores the same rows (Owen, 2007; for seeds and
    examples: Sellam et al., The MultiBERTs, 2022). Resampling few seeds gives intervals that are too narrow
    (in simulations in which seeds mattered, 75 of 100 held the truth with two seeds per side, 86 with three),
    so the variance over rows of the difference of means, from the paired bootstrap, is added to the variances
    of the means over seeds, and the interval is Student's t with Welch's and Satterthwaite's degrees of
    freedom (94 to 99 of 100). A side with one run is given the other side's spread over seeds."""
    drawn = [[_resampled(run, resamples) for run in side] for side in (one, other)]
    values = [[run.values() for run in side] for side in (one, other)]
    p_values = tests(one[0], other[0], resamples) if len(one) == len(other) == 1 else {}
    found: dict[str, dict[str, Any]] = {}
    for name in values[0][0]:
        if name not in values[1][0]:
            continue
        a, b = (np.array([run[name] for run in side]) for side in values)
        change = np.mean([run[name] for run in drawn[1]], axis=0) - np.mean(
            [run[name] for run in drawn[0]], axis=0
        )
        difference = float(b.mean() - a.mean())
        numbers = {"a": a.mean(), "b": b.mean(), "difference": difference}
        entry: dict[str, Any] = {key: _known(number) for key, number in numbers.items()}
        span = SPANS.get(name, 1)
        low, high = percentiles(change, difference, -span) or (None, None)
        p_value, test = p_values.get(name, (None, None)) if low is not None else (None, None)
        if max(len(one), len(other)) > 1:
            entry |= {"a_runs": list(map(_known, a)), "b_runs": list(map(_known, b))}
            if low is not None:
                low, high, p_value = _with_seeds(difference, float(np.nanvar(change)), a, b)
                low, high = max(low, -span), min(high, span)  # as t has no bounds
                test = "Welch's t over seeds and rows"
        found[name] = entry | {"low": low, "high": high, "p_value": p_value, "test": test}
    return found


def _known(number: float) -> float | None:
    return None if np.isnan(number) else float(number)


def _resampled(run: Predictions, resamples: int) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for statistic in run.statistics:
        found |= statistic.resampled(resamples, SEED, row_by_row=True)
    return found


def _with_seeds(
    difference: float, over_rows: float, a: np.ndarray, b: np.ndarray
) -> tuple[float, float, float | None]:
    """Interval and two-sided p-value of a difference of means over runs; `over_rows` is its variance over
    rows, a and b are the metrics of the runs."""
    from scipy.stats import t

    spread = [side.var(ddof=1) if len(side) > 1 else None for side in (a, b)]
    known = [s for s in spread if s is not None]
    parts = [(known[0] if s is None else s) / len(side) for s, side in zip(spread, (a, b), strict=True)]
    total = over_rows + sum(parts)
    if not total > 0:
        return difference, difference, None
    # There are many rows: their variance is taken as known.
    if len(known) == 2:
        loose = sum(part**2 / (len(side) - 1) for part, side in zip(parts, (a, b), strict=True))
    else:  # both parts come from one estimate
        loose = sum(parts) ** 2 / (max(len(a), len(b)) - 1)
    freedom = total**2 / loose if loose > 0 else np.inf
    half = float(t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(total))
    p_value = float(2 * t.sf(abs(difference) / np.sqrt(total), freedom))
    return difference - half, difference + half, p_value


def tests(one: Predictions, other: Predictions, resamples: int = RESAMPLES) -> dict[str, tuple[float, str]]:
    """Two-sided p-values of the differences between two runs, and the name of the test, for each metric.

    Accuracy of a single label: McNemar's exact test. Else a permutation test: the results of each row are
    swapped by a fair coin, and the p-value is the share of differences at least as large, including the
    observed one (Phipson and Smyth, 2010). Neither says anything about other seeds."""
    found: dict[str, tuple[float, str]] = {}
    for mine, theirs in zip(one.swapped, other.swapped, strict=True):
        observed = {name: value - theirs.values()[name] for name, value in mine.values().items()}
        swaps = swapped_sums((mine.features, mine.kind), (theirs.features, theirs.kind), resamples, SEED)
        parts = [(mine.metrics(my_sums), theirs.metrics(their_sums)) for my_sums, their_sums in swaps]
        first, second = map(joined, zip(*parts, strict=True))
        for name, gap in observed.items():
            if not np.isnan(gap):
                # Sums of floats differ in their last digits from one order to another.
                as_large = np.abs(first[name] - second[name]) >= abs(gap) * (1 - 1e-9)
                found[name] = (float((1 + as_large.sum()) / (1 + resamples)), "permutation")
    if one.one_label and one.right is not None and other.right is not None:
        found["accuracy"] = (mcnemar(one.right, other.right), "McNemar, exact")
    return found


def mcnemar(one_right: np.ndarray, other_right: np.ndarray) -> float:
    """McNemar's exact test (1947): the two-sided binomial p-value of the rows that only one of two runs gets
    right, which are as likely either way if the runs are equally accurate."""
    from scipy.stats import binomtest

    only_one, only_other = ((one_right & ~other_right).sum(), (~one_right & other_right).sum())
    if not only_one + only_other:
        return 1.0
    return float(binomtest(int(only_one), int(only_one + only_other)).pvalue)


def right_in_one(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The rows that only the one side gets right, and those that only the other does; by majority of several
    runs per side. Each of `one` and `other` is (rows,) bool."""
    a, b = (np.mean(side, axis=0) > 0.5 for side in (one, other))
    return np.flatnonzero(a & ~b), np.flatnonzero(~a & b)
