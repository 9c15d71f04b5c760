"""Exact copies of a text within a split and across splits, and the same text under different labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ft.preflight.rows import EXAMPLES, Rows, Texts, plain


def pairs_of(splits: list[str]) -> list[tuple[str, str]]:
    """The pairs of splits that must not share texts: (the one that is scored, the one that was seen before
    it)."""
    order = [split for split in ("train", "validation", "test") if split in splits]
    return [(later, earlier) for i, later in enumerate(order) for earlier in order[:i]]


def exact_copies(texts: Texts, splits: dict[str, Rows]) -> dict[str, Any]:
    """How many rows repeat the text of an earlier row of their split ("within"), and how many rows of a split
    have a text that also occurs in one that was seen before it ("across", under "test in train"), each with
    the first of them: [row, row that it repeats], as numbered in their sources. "all" counts the rows, over
    all splits, that repeat the text of an earlier one."""
    within, across = {}, {}
    for split, numbers in texts.numbers.items():
        repeats = np.ones(len(numbers), bool)
        repeats[np.unique(numbers, return_index=True)[1]] = False
        within[split] = count_rows(repeats, splits[split], texts.first_row(split, splits[split])[numbers])
    for later, earlier in pairs_of(list(splits)):
        partner = texts.first_row(earlier, splits[earlier])[texts.numbers[later]]
        across[f"{later} in {earlier}"] = count_rows(partner >= 0, splits[later], partner)
    repeats_of_all = sum(map(len, texts.numbers.values())) - len(texts)
    return {"all": repeats_of_all, "within": within, "across": across}


def count_rows(mask: np.ndarray, rows: Rows, partner: np.ndarray) -> dict[str, Any]:
    """The number of rows in `mask` (rows,), and [row, partner] of the first of them."""
    found = np.stack([rows.row, partner], axis=1)[mask]
    return {"rows": len(found), "first": plain(found[np.argsort(found[:, 0], kind="stable")][:EXAMPLES])}


def label_conflicts(
    texts: Texts, splits: dict[str, Rows], describe: Callable[[Any], Any] = plain
) -> dict[str, Any]:
    """Texts with different labels, in one split or in several.

    Returns the number of these texts ("texts") and rows ("rows"), and for the first texts their rows with the
    label ("first"), as `describe` names it."""
    named = [split for split, rows in splits.items() if rows.labels is not None]
    if not named:
        return {"texts": 0, "rows": 0, "first": []}
    labels: Any = np.concatenate([splits[split].labels for split in named])
    _, label = np.unique(labels, axis=0, return_inverse=True)
    number = np.concatenate([texts.numbers[split] for split in named])
    pairs = np.unique(np.stack([number, label.ravel()], axis=1), axis=0)
    found, labels_each = np.unique(pairs[:, 0], return_counts=True)
    in_conflict = found[labels_each > 1]
    first = []
    for text in in_conflict[:EXAMPLES]:
        where = [
            {"split": split, "row": int(splits[split].row[i]), "label": describe(splits[split].labels[i])}  # type: ignore[index]
            for split in named
            for i in np.flatnonzero(texts.numbers[split] == text)
        ]
        first.append({"text": texts.excerpt(text), "rows": where[:EXAMPLES]})
    rows = int(np.isin(number, in_conflict).sum())
    return {"texts": len(in_conflict), "rows": rows, "first": first}
