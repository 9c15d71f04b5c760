"""What the page says about the data: rows, labels, what was dropped, repeated or cut, and what the preflight
found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ft.analysis.targets import count_labels, spread
from ft.data.prepare import Data
from ft.tasks.base import Task

REASONS = {
    "repeated_texts": "repeat the text of another row of the split",
    "shared_with_validation": "text is in validation, too",
    "shared_with_test": "text is in test, too",
}

# Topics of a preflight's findings that no option fixes.
OF_ROWS = "conflicts copies_within few_rows labels lacking_labels near_copies_across unused_labels".split()


def rows_table(data: Data) -> list[tuple[str, list[int | float | None]]]:
    """Lines of a table with a column for each split; None if a split has no such number."""
    splits = list(data.splits)
    facts = [data.facts.get(split, {}) for split in splits]
    reasons = dict.fromkeys(reason for known in facts for reason in known.get("dropped", {}))
    lengths = [data.splits[split].full_lengths for split in splits]
    table: list[tuple[str, list[Any]]] = [
        ("rows", [len(data.splits[split]) for split in splits]),
        *((f"dropped: {why}", [known.get("dropped", {}).get(why) for known in facts]) for why in reasons),
        *((words, [known.get(name) for known in facts]) for name, words in REASONS.items()),
        ("tokens a row, mean", [float(known.mean()) for known in lengths]),
        ("tokens, longest row", [int(known.max()) for known in lengths]),
        ("texts that are cut", [int(data.splits[split].cut.sum()) for split in splits]),
    ]  # fmt: skip
    return [(name, cells) for name, cells in table if any(cell is not None for cell in cells)]


def label_table(data: Data, task: Task) -> list[tuple[str, list[int]]]:
    """Rows that have each label, a column for each split, the most frequent first; nothing for numbers."""
    labels = _labels(data)
    if not labels or labels[0].dtype.kind == "f":
        return []
    if labels[0].ndim == 2:
        each = np.arange(labels[0].shape[1])
        names = [task.describe_target(each == number)[0] for number in each]
    else:
        names = [task.describe_target(n) for n in range(1 + max(int(rows.max()) for rows in labels))]
    counts = [count_labels(rows, len(names)) for rows in labels]
    order = np.argsort(-counts[0], kind="stable")
    return [(names[place], [int(count[place]) for count in counts]) for place in order]


def target_table(data: Data) -> list[tuple[str, list[float]]]:
    """The spread of the targets of a regression, a column for each split; nothing for labels."""
    labels = _labels(data)
    if not labels or labels[0].dtype.kind != "f":
        return []
    found = [spread(rows) for rows in labels]
    return [
        (f"target, {name.replace('_', ' ')}", [of[name] for of in found])
        for name in ("mean", "standard_deviation", "least", "greatest")
    ]


def _labels(data: Data) -> list[np.ndarray]:
    """The encoded targets of every split; empty if one has none."""
    labels = [rows.labels for rows in data.splits.values()]
    return [] if any(rows is None for rows in labels) else labels  # type: ignore[return-value]


def preflight_findings(output_dir: str, sources: dict[str, str]) -> list[dict[str, str]]:
    """What a preflight of the same data in the same folder found in the rows; nothing without one. What it
    found about the options and the machine has been fixed since, or there would be nothing to show."""
    try:
        found = json.loads((Path(output_dir) / "preflight.json").read_text(encoding="utf-8"))
        is_same = sources.items() <= found["sources"].items()  # an evaluation may read only the test file
        return [one for one in found["findings"] if one["topic"] in OF_ROWS] if is_same else []
    except (OSError, ValueError, KeyError, TypeError):  # none, or the user's own file of that name
        return []
