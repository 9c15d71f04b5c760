"""The values of the columns by which results are sliced: read at the start of a run, together with the
training data, because the files may have changed when it ends."""

from __future__ import annotations

from typing import Any

import numpy as np

from ft.config import Config
from ft.data.columns import check_there, unquoted
from ft.data.prepare import Data
from ft.data.sources import find_sources
from ft.errors import UserError


def read_slice_columns(options: Config, data: Data) -> None:
    """Store in `data` the columns of `slice_columns` for each scored split. Raises `UserError` if one is
    missing."""
    if not options.slice_names:
        return
    sources = find_sources(options)
    held_out = [split for split in data.splits if split != "train"]
    for split in held_out or data.splits:  # eval.py --split train has only that
        source = sources["train" if data.was_set_aside(split) else split]
        table = source.read()
        if source.fingerprint() != data.sources[source.name]:
            raise UserError(
                f"slice_columns: the {source.name} data was changed while it was read; start again."
            )
        for name in options.slice_names:
            check_there("slice_columns", table, name, source.name)
        data.slices[split] = {
            name: (unquoted(table[name], table.schema.field(name)), source.class_names.get(name, []))
            for name in options.slice_names
        }


def slice_values(data: Data, split: str, rows: np.ndarray) -> dict[str, list[Any]]:
    """For each column of `slice_columns`, its values in some rows (rows,) of a split, given by their numbers
    in the source."""
    found = {}
    for name, (column, classes) in data.slices.get(split, {}).items():
        values = column.take(rows).to_pylist()
        found[name] = [_named(value, classes) for value in values] if classes else values
    return found


def _named(value: Any, classes: list[str]) -> Any:
    """The name of a class instead of its number, or of each in a list."""
    if isinstance(value, list):
        return [_named(one, classes) for one in value]
    return classes[value] if value is not None and value >= 0 else value
