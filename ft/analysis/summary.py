"""What results.json has about a scored split besides its metrics: numbers under flat keys, and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ft.analysis.calibration import coverage, decisions, proper_scores, reliability, surest_share
from ft.analysis.errors import length_slices, slices
from ft.analysis.intervals import Interval, intervals, proportion
from ft.analysis.predictions import Predictions
from ft.analysis.resampling import RESAMPLES
from ft.metrics import AT_HALF

SHARES = ("accuracy", "subset_accuracy")  # of rows
ASKED = (0.9, 0.95, 0.99)  # accuracies on the most confident rows


def interval_numbers(judged: Predictions, resamples: int = RESAMPLES) -> dict[str, float]:
    """NAME_low and NAME_high of each of `metric_intervals`."""
    found = metric_intervals(judged, resamples)
    return {
        f"{name}_{end}": value[n] for name, value in found.items() for n, end in enumerate(("low", "high"))
    }


def metric_intervals(judged: Predictions, resamples: int = RESAMPLES) -> dict[str, Interval]:
    """The 95 percent interval of each metric for which there is one.

    If all rows are right, or none is, so are all resamples of them, however few the rows: then, that of the
    accuracy is Wilson's."""
    bounds = intervals(judged.statistics, resamples)
    found = {name: value for name, value in bounds.items() if value is not None}
    rows = len(judged.truth)
    for name, (low, high) in found.items():
        if name.removesuffix(AT_HALF) in SHARES and low == high:
            found[name] = proportion(round(low * rows), rows)
    return found


def calibration_summary(
    judged: Predictions, logits: np.ndarray, targets: np.ndarray, temperature: float | None
) -> dict[str, Any]:
    """ece, max_calibration_error, brier and log_loss; with a temperature, not fitted on these rows, the same
    under names that end in _scaled; area_under_risk; tables reliability, coverage and surest.

    Nothing for a regression. The arrays are those of `calibration.decisions`."""
    if judged.right is None or judged.confidence is None:
        return {}
    reliable = reliability(*decisions(logits, targets))
    table = reliable.pop("table")
    found: dict[str, Any] = {**reliable, **proper_scores(logits, targets)}
    if temperature is not None:
        scaled = reliability(*decisions(logits, targets, temperature))
        found["temperature"] = temperature
        found |= {f"{name}_scaled": scaled[name] for name in reliable}
        found |= {f"{k}_scaled": v for k, v in proper_scores(logits / temperature, targets).items()}
    covered = coverage(judged.confidence, judged.right)
    surest = {str(asked): surest_share(judged.confidence, judged.right, asked) for asked in ASKED}
    return found | {
        "area_under_risk": covered["area_under_risk"],
        "reliability": table,
        "coverage": covered["curve"],
        "surest": surest,
    }


def slice_tables(
    judged: Predictions, headline: Sequence[str], lengths: np.ndarray, columns: Mapping[str, Sequence[Any]],
    resamples: int = RESAMPLES,
) -> dict[str, Any]:  # fmt: skip
    """length_slices, by the lengths (rows,) in tokens, and slices, a table for each column: value, rows, and
    the headline metrics with their intervals (for a proportion of rows: Wilson's, which is also good for few
    rows)."""

    def measure(rows: np.ndarray) -> dict[str, Any]:
        assert judged.part is not None
        part = judged.part(rows)
        values, bounds = part.values(), intervals(part.statistics, resamples)
        found: dict[str, Any] = {}
        for name in headline:
            bound = bounds[name]
            if name in SHARES:
                bound = proportion(round(values[name] * len(rows)), len(rows))
            found[name] = None if np.isnan(values[name]) else values[name]
            found[f"{name}_low"], found[f"{name}_high"] = bound or (None, None)
        return found

    found: dict[str, Any] = {"length_slices": length_slices(lengths, measure)}
    if columns:
        found["slices"] = {name: slices(values, measure) for name, values in columns.items()}
    return found
