"""Suspected label errors, found by cleanlab from what a model predicts on rows that it was not trained on."""

from __future__ import annotations

from typing import Any

import numpy as np

from ft.errors import UserError

REGRESSION_SHARE = 0.05  # of the rows that are listed, where nothing says how many are wrong


def check_cleanlab() -> None:
    """Raise `UserError` where cleanlab is not installed."""
    import importlib.util

    if not importlib.util.find_spec("cleanlab"):
        raise UserError(
            "suspected_label_errors: cleanlab is not installed; pip install '.[cleanlab]', or leave it out."
        )


def suspects(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the rows whose label is likely wrong, the worst first, and the quality of the label of
    every row (from 0 to 1).

    A single label: probabilities (rows, classes), labels (rows,). Several: probabilities and labels (rows,
    labels). Confident learning (Northcutt, Jiang and Chuang, 2021) says how many and which are suspected; the
    order is by the probability of the given label."""
    check_cleanlab()
    found: Any
    if labels.ndim == 1:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores

        found = find_label_issues(labels, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1)
        return np.asarray(found), get_label_quality_scores(labels, probabilities)
    from cleanlab.multilabel_classification import get_label_quality_scores as quality_of
    from cleanlab.multilabel_classification.filter import find_label_issues as find_in

    lists = [np.flatnonzero(row).tolist() for row in labels]
    found = find_in(lists, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1)
    return np.asarray(found), quality_of(lists, probabilities)


def suspected_numbers(predicted: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same for a regression (rows,): the 5 percent of the rows with the lowest quality, as nothing says
    how many are wrong."""
    check_cleanlab()
    from cleanlab.regression.rank import get_label_quality_scores

    quality = get_label_quality_scores(truth, predicted)
    most = int(np.ceil(REGRESSION_SHARE * len(truth)))
    return np.argsort(quality, kind="stable")[:most], quality
