"""Floors, the baselines that a model must beat: predictions without looking at the text, and TF-IDF with a
linear model. Fitted on the training rows, scored on the validation rows; the test rows are never seen."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from ft.data.split import sample
from ft.metrics import classification_metrics, multilabel_metrics, regression_metrics
from ft.tasks.text_classification.labels import MULTI, REGRESSION, SINGLE
from ft.tasks.text_classification.thresholds import choose_thresholds
from ft.values import scalars

MOST_ROWS = 50_000  # to fit on, and to score; larger splits are sampled
MOST_TERMS = 50_000
# At most this many classes times rows, and times terms: a larger fit would take hours, and gigabytes.
MOST_WEIGHTS, LEAST_ROWS = 5_000_000, 2_000


def floors(
    problem_type: str,
    names: list[str],
    train: tuple[list[str], np.ndarray],
    scored: tuple[list[str], np.ndarray],
) -> dict[str, Any]:
    """Metrics of the two floors on the `scored` rows, under "prior" and "tf_idf"; `train` and `scored` are
    texts and labels, `names` those of the classes, if any.

    prior: the majority class with the shares of the classes as probabilities; the share of each label; the
    mean. tf_idf: logistic regression, one per label for several labels; ridge regression. A threshold for
    several labels is chosen on the scored rows, as in a run."""
    texts, labels = train
    most = max(LEAST_ROWS, MOST_WEIGHTS // max(1, len(names)))
    if len(texts) > most:
        chosen = np.sort(sample(len(texts), most))
        texts, labels = [texts[row] for row in chosen], labels[chosen]
    fit = {SINGLE: _single_label, MULTI: _multi_label, REGRESSION: _regression}[problem_type]
    seen, unseen = _tf_idf(texts, scored[0], min(MOST_TERMS, most))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged, or a label that no row has: it is only a floor
        prior, linear = fit(seen, labels, unseen, len(names))
    return {
        "fitted_on_rows": len(texts),
        "scored_rows": len(scored[1]),
        "prior": _numbers(problem_type, prior, scored[1], names),
        "tf_idf": _numbers(problem_type, linear, scored[1], names),
    }


def _tf_idf(texts: list[str], others: list[str], terms: int) -> tuple[Any, Any]:
    """Words and pairs of words; characters if none of these occurs twice in the texts."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    for options in (
        {"token_pattern": r"(?u)\b\w+\b", "ngram_range": (1, 2), "min_df": 2},
        {"analyzer": "char", "ngram_range": (1, 3)},
    ):
        vectorizer = TfidfVectorizer(sublinear_tf=True, max_features=terms, **options)
        try:
            return vectorizer.fit_transform(texts), vectorizer.transform(others)
        except ValueError:  # no term is left
            continue
    raise AssertionError("a text that is not blank has characters")


def _single_label(seen: Any, labels: np.ndarray, unseen: Any, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (rows, classes) of both floors."""
    from sklearn.linear_model import LogisticRegression

    prior = np.bincount(labels, minlength=classes) / len(labels)
    priors, linear = np.tile(prior, (unseen.shape[0], 1)), np.zeros((unseen.shape[0], classes))
    if len(np.unique(labels)) == 1:  # of a sample
        return priors, priors
    model = LogisticRegression(C=3.0, max_iter=200).fit(seen, labels)
    linear[:, model.classes_] = model.predict_proba(unseen)  # 0 for a class without training rows
    return priors, linear


def _multi_label(seen: Any, labels: np.ndarray, unseen: Any, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (rows, labels) of both floors."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    model = OneVsRestClassifier(LogisticRegression(C=3.0, solver="liblinear")).fit(seen, labels)
    linear = model.predict_proba(unseen)[:, -classes:]  # for one label: without it, and with it
    return np.tile(labels.mean(axis=0), (unseen.shape[0], 1)), linear


def _regression(seen: Any, labels: np.ndarray, unseen: Any, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictions (rows,) of both floors, in the target's original unit."""
    from sklearn.linear_model import Ridge

    return np.full(unseen.shape[0], labels.mean()), Ridge().fit(seen, labels).predict(unseen)


def _numbers(
    problem_type: str, predicted: np.ndarray, labels: np.ndarray, names: list[str]
) -> dict[str, Any]:
    """The metrics that training reports, without tables."""
    if problem_type == REGRESSION:
        found = regression_metrics(predicted, labels)
    elif problem_type == MULTI:
        found = multilabel_metrics(predicted, labels, names, choose_thresholds(predicted, labels, False))
    else:
        found = classification_metrics(predicted, labels, names)
    return scalars(found)
