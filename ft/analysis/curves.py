"""Precision against recall, and the ROC: a limited number of exact points of the curves over all
thresholds."""

from __future__ import annotations

import numpy as np

POINTS = 200  # of a curve, at most


def precision_recall(probability: np.ndarray, happened: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall, from 0 to 1, and the precision there, each (points,), evenly over recall.

    probability, happened (decisions,), of which some happened."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(happened, probability)
    precision, recall = precision[::-1], recall[::-1]
    kept = _spread(recall)
    return recall[kept], precision[kept]


def roc(probability: np.ndarray, happened: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False positive rate, from 0 to 1, and the true positive rate there, each (points,), evenly along the
    curve.

    probability, happened (decisions,), of which some happened and some did not."""
    from sklearn.metrics import roc_curve

    false, true, _ = roc_curve(happened, probability)
    kept = _spread(false + true)
    return false[kept], true[kept]


def _spread(along: np.ndarray) -> np.ndarray:
    """Which of the ascending numbers to keep, so that they are evenly spread and both ends are there."""
    return np.unique(np.searchsorted(along, np.linspace(along[0], along[-1], POINTS)))
