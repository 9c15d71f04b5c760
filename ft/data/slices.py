"""The values of the columns by which results are sliced, read from the source of a split."""

from __future__ import annotations

from typing import Any

import numpy as np

from ft.config import Config
from ft.data.audit import guess_label, has_labels
from ft.data.sources import Source, find_sources
from ft.errors import UserError
from ft.tasks.base import Task


def check_slice_columns(
    options: Config, task: Task, splits: tuple[str, ...] = ("validation", "test")
) -> None:
    """Raise `UserError` where a column of `slice_columns` is not in the data of a split that is scored."""
    if not options.slice_names:
        return
    sources = find_sources(options)
    used = {source.name: source for split in splits if (source := _source_of(split, sources, options, task))}
    for split, source in used.items():
        there = source.read().column_names
        for name in options.slice_names:
            if there.count(name) != 1:
                found = "no column" if name not in there else "more than one column"
                raise UserError(
                    f"slice_columns: the {split} data has {found} {name!r}; its columns: "
                    f"{', '.join(map(repr, there))}."
                )


def slice_values(options: Config, task: Task, split: str, rows: np.ndarray) -> dict[str, list[Any]]:
    """For each column of `slice_columns` its values in some rows (rows,) of a split, which are named by their
    numbers in the source."""
    if not options.slice_names:
        return {}
    source = _source_of(split, find_sources(options), options, task)
    assert source is not None
    table = source.read()
    found = {}
    for name in options.slice_names:
        values = table[name].take(rows).to_pylist()
        classes = source.class_names.get(name)
        found[name] = [_named(value, classes) for value in values] if classes else values
    return found


def _named(value: Any, classes: list[str]) -> Any:
    """The name of a class in the place of its number, or of each in a list."""
    if isinstance(value, list):
        return [_named(one, classes) for one in value]
    return classes[value] if value is not None and value >= 0 else value


def _source_of(split: str, sources: dict[str, Source], options: Config, task: Task) -> Source | None:
    """Where the rows of a split come from: what was not given, or has no labels, was set aside from the
    training rows."""
    found = sources.get(split)
    if found and split == "test" and "train" in sources:
        label = options.label_column_name or guess_label(sources["train"].read())
        if label is None or not has_labels(found.read(), label, task):
            found = None
    return found or sources.get("train")
