"""How many rows have each label, and the spread of numbers."""

from __future__ import annotations

import numpy as np


def count_labels(labels: np.ndarray, names: int) -> np.ndarray:
    """(names,) rows of each of `names` labels; `labels` is (rows,) or (rows, names) of 0 and 1."""
    return np.bincount(labels, minlength=names) if labels.ndim == 1 else labels.sum(axis=0, dtype=np.int64)


def spread(targets: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation, minimum, quartiles and maximum of numbers (rows,)."""
    low, first, median, third, high = np.quantile(targets, (0, 0.25, 0.5, 0.75, 1)).tolist()
    return {
        "mean": float(targets.mean()), "standard_deviation": float(targets.std()), "least": low,
        "quartile_1": first, "median": median, "quartile_3": third, "greatest": high,
    }  # fmt: skip
