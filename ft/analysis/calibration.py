"""How well probabilities are calibrated: calibration error, Brier score, log loss, temperature, coverage,
thresholds.

Everything here is about *decisions*: one per row for a single label (the probability of the predicted class,
and whether it is right), one per row and label for several labels (the probability that a row has a label,
and whether it does)."""

from __future__ import annotations

from typing import Any

import numpy as np

BINS = 15
TEMPERATURES = (0.05, 20.0)  # searched between these
POINTS = 100  # of a coverage curve, at most


def decisions(
    logits: np.ndarray, targets: np.ndarray, temperature: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Probability and outcome (decisions,) of logits (rows, targets), divided by a temperature, and of true
    classes (rows,) or labels (rows, labels)."""
    from scipy.special import expit, softmax

    scaled = logits.astype(np.float64) / temperature
    if targets.ndim == 2:
        return expit(scaled).ravel(), targets.ravel() != 0
    return softmax(scaled, axis=1).max(axis=1), scaled.argmax(axis=1) == targets


# --- reliability


def reliability(probability: np.ndarray, happened: np.ndarray, bins: int = BINS) -> dict[str, Any]:
    """Predicted probability against observed frequency: `ece`, `max_calibration_error` and `table`.

    probability, happened (decisions,). The table has one row for each of `bins` equal parts of [0, 1] with a
    decision in it: low, high, count, mean probability, the share that happened. The expected calibration
    error is the mean gap between the two over the decisions (Naeini et al., 2015; Guo et al., 2017, with its
    15 bins); even for a perfect model it is above 0, by the noise of the shares."""
    place = np.clip((probability * bins).astype(np.int64), 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    used = np.flatnonzero(count)
    mean, share = (
        np.bincount(place, weights=of, minlength=bins)[used] / count[used] for of in (probability, happened)
    )
    gap = np.abs(mean - share)
    table = [
        {
            "low": b / bins, "high": (b + 1) / bins, "count": int(count[b]),
            "probability": float(m), "share": float(s),
        }
        for b, m, s in zip(used, mean, share, strict=True)
    ]  # fmt: skip
    return {
        "ece": float((gap * count[used]).sum() / count.sum()),
        "max_calibration_error": float(gap.max()),
        "table": table,
    }


# --- proper scores, from logits


def proper_scores(logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Brier score and log loss of logits (rows, targets) and of true classes (rows,) or labels (rows,
    labels)."""
    return (single_label_scores if targets.ndim == 1 else multi_label_scores)(logits, targets)


def single_label_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Brier score (Brier, 1950: the sum over classes, from 0 to 2) and log loss (nats) of logits (rows,
    classes): means over rows."""
    from scipy.special import log_softmax

    log_probability = log_softmax(logits.astype(np.float64), axis=1)
    probability = np.exp(log_probability)
    rows = np.arange(len(labels))
    # The sum of (p - y)^2 over classes, where y is one only for the true class.
    brier = (probability**2).sum(axis=1) - 2 * probability[rows, labels] + 1
    return {"brier": float(brier.mean()), "log_loss": float(-log_probability[rows, labels].mean())}


def multi_label_scores(logits: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The same for one logit per label (rows, labels): means over rows and labels, Brier from 0 to 1."""
    from scipy.special import expit, log_expit

    logits, has = logits.astype(np.float64), truth.astype(bool)
    return {
        "brier": float(((expit(logits) - has) ** 2).mean()),
        "log_loss": float(-log_expit(np.where(has, logits, -logits)).mean()),
    }


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """The number by which to divide logits so that their log loss is lowest (Guo et al., 2017).

    logits (rows, targets); targets (rows,) for a single label, (rows, labels) for several. To be fitted on
    validation rows, never on those that are reported on. The order of the scores, and so every prediction,
    stays the same. It is searched for between 1/20 and 20, and is 1 if no loss is lower than at 1/20: rows
    without an error do not determine it."""
    from scipy.optimize import minimize_scalar
    from scipy.special import log_expit, logsumexp

    logits, rows = logits.astype(np.float64), np.arange(len(targets))
    # The part of the log loss that a temperature divides: how far each class is above the true one, or each
    # label is on its right side.
    margins = (
        logits - logits[rows, targets, None] if targets.ndim == 1 else np.where(targets, logits, -logits)
    )

    def loss(log_temperature: float) -> float:
        scaled = margins / np.exp(log_temperature)
        return float(logsumexp(scaled, axis=1).mean() if targets.ndim == 1 else -log_expit(scaled).mean())

    bounds = tuple(np.log(TEMPERATURES))
    found = minimize_scalar(loss, bounds=bounds, method="bounded")
    return 1.0 if loss(bounds[0]) <= found.fun else float(np.exp(found.x))


# --- accuracy against coverage


def coverage(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """How accurate the most confident rows are (El-Yaniv and Wiener, 2010): `curve`, and `area_under_risk`.

    confidence, right (rows,). Each point of the curve has coverage (share of the rows, most confident first),
    accuracy on them, and the confidence at which they end; rows of the same confidence are kept together. The
    area is the mean error over all coverages (AURC, Geifman and El-Yaniv, 2017); lower is better."""
    ends, accuracy, threshold = _surest_first(confidence, right)
    rows = len(confidence)
    steps = np.diff(ends, prepend=0) / rows
    shown = np.unique(np.searchsorted(ends, np.linspace(1, rows, min(POINTS, rows))).clip(max=len(ends) - 1))
    curve = [
        {"coverage": float(ends[i] / rows), "accuracy": float(accuracy[i]), "confidence": float(threshold[i])}
        for i in shown
    ]
    return {"area_under_risk": float(((1 - accuracy) * steps).sum()), "curve": curve}


def surest_share(
    confidence: np.ndarray, right: np.ndarray, accuracy: float = 0.99
) -> dict[str, float] | None:
    """The largest share of the rows, most confident first, whose accuracy is at least `accuracy`: coverage,
    accuracy and the confidence at which it ends. None if there is none.

    It is chosen on the rows that it describes, so on new rows it will be right a little less often."""
    ends, found, threshold = _surest_first(confidence, right)
    enough = np.flatnonzero(found >= accuracy)
    if not len(enough):
        return None
    last = enough[-1]
    return {
        "coverage": float(ends[last] / len(confidence)),
        "accuracy": float(found[last]),
        "confidence": float(threshold[last]),
    }


def _surest_first(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each distinct confidence, from the highest: rows that have it or a higher one, the share of them
    that is right, and the confidence itself."""
    order = np.argsort(-confidence, kind="stable")
    sorted_confidence = confidence[order]
    ends = np.flatnonzero(np.append(sorted_confidence[1:] != sorted_confidence[:-1], True)) + 1
    return ends, np.cumsum(right[order].astype(np.float64))[ends - 1] / ends, sorted_confidence[ends - 1]


# --- precision and recall against the threshold


def threshold_curve(probability: np.ndarray, happened: np.ndarray) -> dict[str, Any]:
    """Metrics if every probability from a threshold on counted as predicted: `threshold`, evenly from 0 to 1,
    and `precision`, `recall` and `f1` there, each (points + 1,).

    probability, happened (decisions,). Precision is NaN where nothing is predicted; recall and F1 are if
    nothing happened."""
    thresholds = np.linspace(0, 1, POINTS + 1)
    said = len(probability) - np.searchsorted(np.sort(probability), thresholds)
    true = np.count_nonzero(happened)
    hits = true - np.searchsorted(np.sort(probability[happened]), thresholds)
    with np.errstate(invalid="ignore"):
        precision, f1 = hits / said, 2 * hits / (said + true)
        recall = hits / true if true else np.full(len(thresholds), np.nan)
    return {"threshold": thresholds, "precision": precision, "recall": recall, "f1": f1 if true else recall}
