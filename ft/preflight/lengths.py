"""Token lengths: how long the texts are, how many are cut at max_length, and what length would keep them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ft.preflight.rows import Rows


def token_lengths(splits: dict[str, Rows], max_length: int) -> dict[str, Any]:
    """For each split, mean, median, 99th percentile and longest in tokens, rows and share that are cut at
    `max_length`; and "keeps_99_percent", the shortest max_length at which at least 99 percent of the training
    rows are not cut."""
    found = {}
    for split, rows in splits.items():
        if rows.tokens is None or not len(rows):
            continue
        cut = rows.tokens > max_length if rows.cut is None else rows.cut
        found[split] = {
            "mean": float(rows.tokens.mean()),
            "median": float(np.median(rows.tokens)),
            "percentile_99": int(np.quantile(rows.tokens, 0.99, method="inverted_cdf")),
            "longest": int(rows.tokens.max()),
            "cut_rows": int(cut.sum()),
            "cut_share": float(cut.mean()),
        }
    keeps = found["train"]["percentile_99"] if "train" in found else None
    return {"max_length": max_length, "keeps_99_percent": keeps, "splits": found}
