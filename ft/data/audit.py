"""Checks rows before training: which are unusable, which are duplicates, and how messages describe them."""

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ft.data.columns import Columns, is_list, is_string
from ft.data.files import JOINED, LONGEST_TEXT, ONE_FILE_A_ROW
from ft.data.tables import is_mixed
from ft.tasks.base import Task
from ft.values import first_of

HIDDEN = "-1"  # a label that a benchmark keeps for itself
SHOWN = 10  # rows or values in a message


def joined_rows(table: pa.Table, split: str) -> list[str]:
    """A warning about lines of a csv file that an open quote has joined into one row."""
    where = (table.schema.metadata or {}).get(JOINED)
    said = "are one row, as a quote opens there; where these are several, double the quotes inside a field"
    return [f"WARNING {split}: {where.decode()} {said}"] if where else []


def has_labels(table: pa.Table, label: str, task: Task) -> bool:
    """Whether a split has labels at all; test splits of competitions often have none, or -1 for every row
    (GLUE's), unless that is a label that the task knows, or empty lists."""
    if table.column_names.count(label) > 1:
        return True  # whoever chooses the columns refuses it
    if label not in table.column_names or pc.all(_is_missing(table[label])).as_py():
        return False
    if HIDDEN in task.state().get("label_names", ()):
        return True
    column = table[label].drop_null()
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if is_string(column.type):  # of a csv file
        trimmed = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
        hidden = pc.is_in(trimmed, pa.array(["", HIDDEN, f"{HIDDEN}.0"], pa.large_string()))
    elif is_list(column.type):
        hidden = pc.equal(pc.list_value_length(column), 0)
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        hidden = pc.equal(column.cast(pa.float64(), safe=False), float(HIDDEN))
    else:
        return True
    return not pc.all(hidden).as_py()


def _is_missing(label: pa.ChunkedArray, blank_is_a_target: bool = False) -> pa.ChunkedArray:
    missing = pc.is_null(label, nan_is_null=True)
    return pc.or_(missing, _is_blank(label)) if is_string(label.type) and not blank_is_a_target else missing


def _is_blank(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """True for an empty or white-space string; False for null. (Trimming would copy all texts.)"""
    text = text.cast(pa.large_string())
    return pc.or_(pc.utf8_is_space(text), pc.equal(pc.binary_length(text), 0)).fill_null(False)


def find_bad_rows(table: pa.Table, columns: Columns, blank_is_a_target: bool) -> dict[str, np.ndarray]:
    """Row numbers (from 0) of unusable rows, by reason."""
    bad = {}
    for name in columns.texts:
        null, blank = pc.is_null(table[name]), _is_blank(table[name])
        empty = pc.equal(pc.binary_length(table[name]), 0).fill_null(False)
        unreadable = table.schema.metadata == ONE_FILE_A_ROW
        bad["the file is not UTF-8" if unreadable else f"{name} is null"] = _rows(null)
        bad[f"{name} is empty"] = _rows(empty)
        bad[f"{name} is only white space"] = _rows(pc.and_not(blank, empty))
        long = pc.greater(pc.utf8_length(table[name]), LONGEST_TEXT).fill_null(False)
        bad[f"{name} is longer than {LONGEST_TEXT:,} characters"] = _rows(long)
    if columns.label:
        label = table[columns.label]
        missing = _is_missing(label, blank_is_a_target)
        if is_mixed(table.schema.field(columns.label)) and not blank_is_a_target:  # JSON texts
            blank = pc.match_substring_regex(label, r'^"(\s|\\[nrt])*"$').fill_null(False)
            missing = pc.or_(missing, blank)
        if pa.types.is_floating(label.type):
            null = pc.is_null(label)
            bad[f"{columns.label} is nan"] = _rows(pc.and_not(missing, null))
            missing = null
        bad[f"{columns.label} is missing"] = _rows(missing)
    return {reason: rows for reason, rows in bad.items() if len(rows)}


def _rows(mask: pa.ChunkedArray) -> np.ndarray:
    return np.flatnonzero(np.asarray(mask))


def describe_rows(rows: Sequence[int] | np.ndarray, names: pa.ChunkedArray | None = None) -> str:
    """A description for a message, "rows 3, 17 and 40 more", with the files of the rows if `names` has them;
    rows count from 0."""
    shown = [str(int(row)) + (f" ({names[int(row)]})" if names is not None else "") for row in rows[:SHOWN]]
    return f"row{'s' if len(rows) > 1 else ''} {first_of(len(rows), shown)}"


def describe_values(values: Iterable[Any]) -> str:
    """ "'a', 'b' and 40 more" for a message: each value once, in the order of its first row."""
    different = list(dict.fromkeys(map(repr, values)))
    return first_of(len(different), different[:SHOWN])


def joined_text(table: pa.Table, columns: Columns) -> pa.ChunkedArray:
    """One string per row: the text, or both texts of a pair."""
    arrays = [table[name] for name in columns.texts]
    return (
        arrays[0]
        if len(arrays) == 1
        else pc.binary_join_element_wise(*arrays, pa.scalar("\x1f", arrays[0].type))
    )


def text_marks(table: pa.Table, columns: Columns) -> pa.ChunkedArray:
    """A hash of each row's text or pair of texts: equal for identical ones. (Searching for copies among the
    texts themselves takes up to three times their memory.)"""
    parts = []
    for batch in table.select(list(columns.texts)).to_batches(max_chunksize=1024):
        texts = zip(*(column.to_pylist() for column in batch.columns), strict=True)
        marks = b"".join(blake2b("\x1f".join(row).encode(), digest_size=16).digest() for row in texts)
        parts.append(pa.Array.from_buffers(pa.binary(16), batch.num_rows, [None, pa.py_buffer(marks)]))
    return pa.chunked_array(parts, pa.binary(16))


def shared_rows(marks: pa.ChunkedArray, others: pa.ChunkedArray) -> np.ndarray:
    """Numbers of the rows whose mark is among `others`."""
    return _rows(pc.is_in(marks, value_set=others))


def chosen(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Some rows, by their numbers in ascending order. (Arrow's `take` would first copy all texts, to join
    them.)"""
    if len(rows) == table.num_rows:
        return table
    mask = np.zeros(table.num_rows, bool)
    mask[rows] = True
    return table.filter(pa.array(mask))
