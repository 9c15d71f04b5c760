"""The probabilities from which on a label counts as predicted, chosen for the highest F1."""

import numpy as np

from ft.metrics import sigmoid

DEFAULT = 0.5
# The thresholds that are tried: even steps of the logit. A grid, not the scores themselves, so that rounding,
# which differs between launches, cannot change which is the best if many scores are nearly the same.
CANDIDATES = sigmoid(np.arange(-15_000, 15_001) / 1000)


def choose_thresholds(probabilities: np.ndarray, labels: np.ndarray, per_label: bool) -> np.ndarray:
    """(labels,) thresholds: one for all, with the highest micro F1 on these rows, or for each label the one
    with its highest F1. A label that no row has takes the common one. The arguments are (rows, labels)."""
    common = best_threshold(probabilities.ravel(), labels.ravel())
    if not per_label:
        return np.full(labels.shape[1], common)
    return np.array(
        [
            best_threshold(scores, truth) if truth.any() else common
            for scores, truth in zip(probabilities.T, labels.T, strict=True)
        ]
    )


def best_threshold(scores: np.ndarray, truth: np.ndarray) -> float:
    """The candidate t with the highest F1 of `scores >= t` (n,) against `truth` (n,) of 0 and 1: the middle
    of those that give the same predictions. The default if `truth` has no 1."""
    if not truth.any():
        return DEFAULT
    below = np.searchsorted(CANDIDATES, scores, side="right")  # the number of candidates up to the score
    said, hits = (
        np.bincount(below, weights, minlength=len(CANDIDATES) + 1)[::-1].cumsum()[::-1][1:]
        for weights in (None, truth.astype(np.float64))
    )
    f1 = 2 * hits / (said + truth.sum())
    best = int(f1.argmax())
    same = CANDIDATES[said == said[best]]
    return float(same[np.searchsorted(same, (same[0] + same[-1]) / 2)])
