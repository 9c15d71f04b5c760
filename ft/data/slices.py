"""The values of the columns by which results are sliced, read from the source of a split."""

from __future__ import annotations

from typing import Any

import numpy as np

from ft.config import Config
from ft.data.audit import check_there
from ft.data.prepare import Data
from ft.data.sources import Source, find_sources


def check_slice_columns(options: Config, data: Data) -> None:
    """Raise `UserError` where a column of `slice_columns` is not in the data of a split that is scored."""
    if not options.slice_names:
        return
    sources = find_sources(options)
    held_out = [split for split in data.splits if split != "train"]
    for split in held_out or data.splits:  # eval.py --split train has that alone
        source = _source_of(split, sources, data)
        table = source.read()
        for name in options.slice_names:
            check_there("slice_columns", table, name, source.name)


def slice_values(options: Config, data: Data, split: str, rows: np.ndarray) -> dict[str, list[Any]]:
    """For each column of `slice_columns` its values in some rows (rows,) of a split, which are named by their
    numbers in the source."""
    if not options.slice_names:
        return {}
    source = _source_of(split, find_sources(options), data)
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


def _source_of(split: str, sources: dict[str, Source], data: Data) -> Source:
    return sources["train" if data.was_set_aside(split) else split]
