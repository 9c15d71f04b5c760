"""The labels of each split: how many rows each has, which of them a split lacks, the spread of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from ft.analysis.targets import count_labels, spread
from ft.preflight.findings import Findings
from ft.preflight.rows import Rows
from ft.values import first_of

FEW_ROWS = 10  # of a label in training
NAMED = 10  # labels in a message


def label_facts(
    problem_type: str, names: list[str], splits: dict[str, Rows], findings: Findings
) -> dict[str, Any]:
    """Labels and their rows by split, those that a split lacks, and warnings about these.

    For a regression, mean, standard deviation and quartiles instead."""
    labelled = {split: rows.labels for split, rows in splits.items() if rows.labels is not None}
    if problem_type == "regression":
        return {"problem_type": problem_type, "targets": {s: spread(v) for s, v in labelled.items()}}
    counts = {split: count_labels(labels, len(names)) for split, labels in labelled.items()}
    lacking = {
        split: [
            name
            for name, own, theirs in zip(names, count, _others(counts, split), strict=True)
            if theirs and not own
        ]
        for split, count in counts.items()
    }
    facts: dict[str, Any] = {
        "problem_type": problem_type,
        "names": names,
        "counts": {split: dict(zip(names, count.tolist(), strict=True)) for split, count in counts.items()},
        "lacking": lacking,
    }
    if problem_type == "multi_label_classification":
        facts["without_labels"] = {s: int((~v.astype(bool).any(axis=1)).sum()) for s, v in labelled.items()}
    _warn(facts, counts, findings)
    return facts


def _warn(facts: dict[str, Any], counts: dict[str, np.ndarray], findings: Findings) -> None:
    for split, names in facts["lacking"].items():
        if names:
            why = "nothing to learn it from" if split == "train" else "nothing to measure it on"
            findings.warn(
                "lacking_labels", f"{split}: no row has {_listed(names)}, which other splits have: {why}"
            )
    train = counts.get("train", np.zeros(0, int))
    few = [name for name, count in zip(facts["names"], train, strict=False) if 0 < count < FEW_ROWS]
    if few:
        findings.warn("few_rows", f"train: fewer than {FEW_ROWS} rows have {_listed(few)}")
    unused = [name for name, *all_ in zip(facts["names"], *counts.values(), strict=True) if not any(all_)]
    if unused and counts:
        findings.warn(
            "unused_labels", f"no row of any split has {_listed(unused)}, which the label column declares"
        )


def _listed(names: list[str]) -> str:
    first = [*map(repr, names[:NAMED])]
    return f"{'the labels' if len(names) > 1 else 'the label'} {first_of(len(names), first)}"


def _others(counts: dict[str, np.ndarray], split: str) -> np.ndarray:
    return sum((count for other, count in counts.items() if other != split), np.zeros_like(counts[split]))
