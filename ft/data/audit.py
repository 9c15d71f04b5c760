"""Look at rows before anything is trained on them: which columns, which rows cannot be used, which stand
twice."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ft.errors import UserError

TEXT_NAMES = ["text", "sentence", "review", "content", "document", "title", "question"]
LABEL_NAMES = ["label", "labels", "target", "class", "category", "intent", "sentiment", "stars"]


@dataclass(frozen=True)
class Columns:
    """The columns that are used: one text, or the two of a pair, and the label (None where there is none)."""

    texts: tuple[str, ...]
    label: str | None


def choose_columns(
    table: pa.Table, texts: Sequence[str], label: str | None, split: str, labelled: bool
) -> Columns:
    """The columns that the user named, or those that a name or a type gives away; `labelled` asks for a
    label."""
    there = table.column_names
    for key, names in (("text_column_names", texts), ("label_column_name", [label] if label else [])):
        for name in names:
            if name not in there:
                raise UserError(
                    f"{key}: the {split} data has no column {name!r}; its columns: {', '.join(there)}."
                )
    if label is None:
        label = next((name for wanted in LABEL_NAMES for name in there if name.lower() == wanted), None)
    if label is None and labelled:
        raise UserError(
            f"label_column_name: cannot tell the label among the columns {', '.join(there)}; name it."
        )
    if not texts:
        strings = [f.name for f in table.schema if _is_string(f.type) and f.name not in (label, "file")]
        known = [name for wanted in TEXT_NAMES for name in strings if name.lower() == wanted]
        if not known and len(strings) != 1:
            raise UserError(
                f"text_column_names: cannot tell the text among the columns {', '.join(there)}; name it."
            )
        texts = known[:1] or strings
    for name in texts:
        if not _is_string(table.schema.field(name).type):
            kind = table.schema.field(name).type
            raise UserError(f"text_column_names: the {split} column {name!r} holds {kind}, expected text.")
    return Columns(tuple(texts), label)


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def find_bad_rows(table: pa.Table, columns: Columns) -> dict[str, np.ndarray]:
    """Row numbers (from 0) of the rows that cannot be used, under the reason."""
    bad = {}
    for name in columns.texts:
        text = table[name]
        null = pc.is_null(text)
        if "file" in table.column_names and name == "text":
            bad["the file is not UTF-8"] = _rows(null)
        else:
            bad[f"{name} is null"] = _rows(null)
        length = pc.utf8_length(text)
        bad[f"{name} is empty"] = _rows(pc.equal(length, 0))
        blank = pc.and_(pc.greater(length, 0), pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(text)), 0))
        bad[f"{name} is only white space"] = _rows(blank)
    if columns.label is not None:
        label = table[columns.label]
        missing = pc.is_null(label, nan_is_null=True)
        if _is_string(label.type):
            missing = pc.or_kleene(missing, pc.equal(pc.utf8_trim_whitespace(label), ""))
        bad[f"{columns.label} is missing"] = _rows(missing)
    return {reason: rows for reason, rows in bad.items() if len(rows)}


def _rows(mask: pa.ChunkedArray) -> np.ndarray:
    return np.flatnonzero(
        mask.fill_null(False).to_numpy(zero_copy_only=False) if mask.null_count else np.asarray(mask)
    )


def describe_rows(rows: Sequence[int] | np.ndarray, most: int = 10) -> str:
    """ "rows 3, 17 and 40 more" for a message; rows count from 0."""
    shown = ", ".join(str(int(row)) for row in rows[:most])
    more = f" and {len(rows) - most:,} more" if len(rows) > most else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"


def joined_text(table: pa.Table, columns: Columns) -> pa.ChunkedArray:
    """One string a row: the text, or both texts of a pair."""
    arrays = [table[name].cast(pa.large_string()) for name in columns.texts]
    return arrays[0] if len(arrays) == 1 else pc.binary_join_element_wise(*arrays, "\x1f")


def shared_rows(table: pa.Table, others: Sequence[pa.Table], columns: Columns) -> np.ndarray:
    """Row numbers of `table` whose text, letter for letter, stands in one of `others`, too."""
    there = pa.concat_arrays([chunk for other in others for chunk in joined_text(other, columns).chunks])
    return _rows(pc.is_in(joined_text(table, columns), value_set=there))
