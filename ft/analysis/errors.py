"""Where a model fails: slices of the rows, lengths, confused classes, and the most confident errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

BUCKETS = 5
MOST_SLICES = 30
OTHERS = "(other values)"


def slices(values: Sequence[Any], measure: Callable[[np.ndarray], dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per value of a column, the most frequent first: value, rows, and what `measure` returns for
    the numbers of its rows. Beyond `MOST_SLICES` values, the rest are one slice. None is a value, too."""
    names = [None if value is None else str(value) for value in values]
    rows_of: dict[str | None, list[int]] = {}
    for row, name in enumerate(names):
        rows_of.setdefault(name, []).append(row)
    order = sorted(rows_of, key=lambda name: (-len(rows_of[name]), name is None, name or ""))
    kept = order if len(order) <= MOST_SLICES else order[: MOST_SLICES - 1]
    found = [_slice(name, np.array(rows_of[name]), measure) for name in kept]
    if len(kept) < len(order):
        rest = sorted(row for name in order[len(kept) :] for row in rows_of[name])
        found.append(_slice(OTHERS, np.array(rest), measure))
    return found


def length_slices(
    lengths: np.ndarray, measure: Callable[[np.ndarray], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The same for about equally large groups of rows of similar length (rows,), the shortest first. The
    value is "from-to", both ends included."""
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, BUCKETS + 1), method="lower"))
    # A bucket includes its upper edge; the first one begins with the shortest.
    place = np.searchsorted(edges[1:], lengths) if len(edges) > 1 else np.zeros(len(lengths), np.int64)
    out = []
    for number in np.unique(place):
        rows = np.flatnonzero(place == number)
        out.append(_slice(f"{lengths[rows].min()}-{lengths[rows].max()}", rows, measure))
    return out


def _slice(value: Any, rows: np.ndarray, measure: Callable[[np.ndarray], dict[str, Any]]) -> dict[str, Any]:
    return {"value": value, "rows": len(rows), **measure(rows)}


def confused_pairs(
    labels: np.ndarray, predicted: np.ndarray, names: Sequence[str], most: int = 20
) -> list[dict[str, Any]]:
    """The most frequent confusions, given the true and the predicted class of each row, both (rows,): label,
    prediction, rows, and their share of the label's rows."""
    support = np.bincount(labels, minlength=len(names))
    given = labels.astype(np.int64) * len(names) + predicted
    pairs, counts = np.unique(given[labels != predicted], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return [
        {
            "label": names[true], "prediction": names[guess], "rows": int(rows),
            "share": float(rows / support[true]),
        }
        for true, guess, rows in zip(*np.divmod(pairs[order], len(names)), counts[order], strict=True)
    ]  # fmt: skip


def surest_errors(confidence: np.ndarray, right: np.ndarray, most: int) -> np.ndarray:
    """The numbers of the wrong rows, the most confident first. Both arrays are (rows,)."""
    wrong = np.flatnonzero(~right)
    return wrong[np.argsort(-confidence[wrong], kind="stable")][:most]
