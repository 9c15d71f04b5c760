"""Suspected label errors, found by cleanlab from a model's predictions on rows that it was not trained on."""

from __future__ import annotations

from typing import Any

import numpy as np

from ft.analysis.predictions import Predictions
from ft.errors import UserError
from ft.values import is_installed

REGRESSION_SHARE = 0.05  # of the rows are listed if nothing says how many are wrong
# For a regression: up to here by how far a row is from others ("outre"), which takes 8 bytes for each pair of
# rows; above, only by its error in standard deviations.
OUTRE_ROWS = 10_000


def check_cleanlab() -> None:
    """Raise `UserError` if cleanlab is not installed."""
    if not is_installed("cleanlab"):
        raise UserError(
            "suspected_label_errors: cleanlab is not installed; pip install '.[cleanlab]', or leave it out."
        )


def suspects(judged: Predictions) -> tuple[np.ndarray, np.ndarray] | None:
    """The numbers of the rows whose label is likely wrong, the worst first, and the quality of the label of
    every row (from 0 to 1).

    For labels, confident learning (Northcutt, Jiang and Chuang, 2021) decides how many and which are
    suspected; the order is by the probability of the given label. For numbers, nothing says how many are
    wrong: it is the 5 percent of the rows with the lowest quality. If all rows have the same label, nothing
    can be said: None. With several labels per row, one that all rows have is left out."""
    check_cleanlab()
    truth, probabilities = judged.truth, judged.probabilities
    if probabilities is not None and truth.ndim == 2:
        asked = ~truth.all(axis=0)
        truth, probabilities = truth[:, asked], probabilities[:, asked]
    if len(truth) < 2 or (probabilities is not None and not (truth != truth[0]).any()):
        return None
    found: Any
    if probabilities is None:
        from cleanlab.regression.rank import get_label_quality_scores as quality_of_numbers

        if len(truth) <= OUTRE_ROWS:
            quality = quality_of_numbers(truth, judged.predicted)
        else:
            scale = truth.std() or 1.0
            quality = quality_of_numbers(truth / scale, judged.predicted / scale, method="residual")
        return np.argsort(quality, kind="stable")[: int(np.ceil(REGRESSION_SHARE * len(truth)))], quality
    options: dict[str, Any] = {"return_indices_ranked_by": "self_confidence", "n_jobs": 1}
    if truth.ndim == 1:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores

        found = find_label_issues(truth, probabilities, **options)
        return np.asarray(found), get_label_quality_scores(truth, probabilities)
    from cleanlab.multilabel_classification import get_label_quality_scores as quality_of_lists
    from cleanlab.multilabel_classification.filter import find_label_issues as find_in_lists

    lists = [np.flatnonzero(row).tolist() for row in truth]
    found = find_in_lists(lists, probabilities, **options)
    return np.asarray(found), quality_of_lists(lists, probabilities)
