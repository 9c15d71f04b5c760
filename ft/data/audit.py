"""Look at rows before anything is trained on them: which columns, which rows cannot be used, which stand
twice."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ft.data.files import JOINED, LONGEST_TEXT, ONE_FILE_A_ROW
from ft.data.tables import is_mixed
from ft.errors import UserError
from ft.tasks.base import Task

TEXT_NAMES = ["text", "sentence", "review", "content", "document", "title", "question"]
LABEL_NAMES = ["label", "labels", "target", "class", "category", "intent", "sentiment", "stars", "score"]
ID_NAMES = ["id", "idx", "row_id"]

HIDDEN = "-1"  # a label that a benchmark keeps for itself
SHOWN = 10  # rows or values in a message
# Columns of the encoded rows.
RESERVED = "row label input_ids token_type_ids full_length cut pieces".split()
WRITTEN = ["prediction", "probabilities", "label_quality"]  # beside the texts and ids of predictions
MEASURED = ["confidence", "error"]  # beside the texts of worst_errors


@dataclass(frozen=True)
class Columns:
    """The columns that are used: one text, or the two of a pair, the label, and, for predictions, an id; ""
    where there is none."""

    texts: tuple[str, ...]
    label: str
    id: str = ""


@dataclass(frozen=True)
class Scoring:
    """What else an evaluation asks of the columns: the texts and the label that the model was trained on,
    which are taken where the data has them and the user names none, and the id that the user named."""

    texts: tuple[str, ...] = ()
    label: str | None = None
    id: str | None = None


def choose_columns(
    table: pa.Table,
    texts: Sequence[str],
    label: str | None,
    split: str,
    is_labelled: bool = True,
    id_column: str = "",
) -> Columns:
    """The columns that the user named, or those that a name or a type gives away. For rows that are not
    labelled, `label` is a column to leave alone, which need not be there."""
    listed = _listed(table)
    label = label or guess_label(table)
    if label is None and is_labelled:
        raise UserError(f"label_column_name: cannot tell the label among the columns {listed}; name it.")
    if label and is_labelled:
        check_there("label_column_name", table, label, split)
    if not texts:
        # By its name, a column that mixes types is one of texts, too, of which a row is odd.
        fields = [f for f in table.schema if _is_text(f) or (is_mixed(f) and f.name.lower() in TEXT_NAMES)]
        strings = [f.name for f in fields if f.name not in (label, id_column)]
        known = [name for wanted in TEXT_NAMES for name in strings if name.lower() == wanted]
        if not known and len(strings) != 1:
            raise UserError(
                f"text_column_names: cannot tell the text among the columns {listed}; name it, or the two "
                "of a pair."
            )
        texts = known[:1] or strings
    for name in texts:
        check_there("text_column_names", table, name, split)
        if len(texts) == 2 and name in (*WRITTEN, *MEASURED):  # a single text is called "text" there
            raise UserError(
                f"text_column_names: {name!r} is the name of something else in predictions or worst_errors; "
                "rename it."
            )
        _check_text(table, name, split)
    if label in texts and is_labelled:
        raise UserError(f"label_column_name: {label!r} is the text column, too; name another column.")
    return Columns(tuple(texts), label if label and is_labelled else "", id_column)


def guess_label(table: pa.Table) -> str | None:
    """The column whose name says that it is the label, if there is one."""
    return next(
        (name for wanted in LABEL_NAMES for name in table.column_names if name.lower() == wanted), None
    )


def choose_id(table: pa.Table, wanted: str | None, used: Sequence[str], split: str) -> str:
    """The column that is copied to the predictions as the id of a row: the one that the user named, or one
    whose name says it; "" where there is none. `used` are the columns with another use."""
    there = table.column_names
    if wanted is None:
        known = [name for known in ID_NAMES for name in there if name.lower() == known]
        good = [name for name in known if there.count(name) == 1 and name not in used]
        return next((name for name in good if _as_id(table[name]) is not None), "")
    check_there("id_column_name", table, wanted, split)
    if wanted in used:
        raise UserError(f"id_column_name: {wanted!r} is the text or the label, too; name another column.")
    if wanted in (*RESERVED, *WRITTEN, "text"):
        raise UserError(
            f"id_column_name: {wanted!r} is the name of another column of the predictions; rename it."
        )
    if _as_id(table[wanted]) is None:
        kind = table.schema.field(wanted).type
        raise UserError(
            f"id_column_name: the {split} column {wanted!r} holds {kind}, expected numbers or texts."
        )
    return wanted


def ids_of(table: pa.Table, columns: Columns) -> pa.ChunkedArray:
    """The column of the ids: whole numbers as they are, anything else as texts."""
    ids = _as_id(table[columns.id])
    assert ids is not None
    ids = unquoted(ids, table.schema.field(columns.id))
    if _is_string(ids.type):
        _check_utf8(ids, columns.id)
    return ids


def unquoted(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    """A column whose values have several types, and are kept as JSON, with its texts as they are; any other
    column as it is."""
    if not is_mixed(field):
        return column
    read = ([_plain(text) for text in chunk.to_pylist()] for chunk in column.chunks)
    return pa.chunked_array([pa.array(texts, pa.large_string()) for texts in read], pa.large_string())


def _plain(text: str | None) -> str | None:
    """A text that stands as JSON beside other values; those as JSON."""
    return json.loads(text) if text and text.startswith('"') else text


def _as_id(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    if pa.types.is_integer(column.type):
        return column
    if pa.types.is_floating(column.type):  # whole numbers, where one is missing: not 4.006381333931e+12
        numbers = column.cast(pa.float64())
        known = pc.if_else(pc.is_finite(numbers), numbers, None)
        if pc.all(pc.and_(pc.equal(pc.floor(known), known), pc.less_equal(pc.abs(known), 2.0**53))).as_py():
            return known.cast(pa.int64())
    try:
        return column.cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
        return None


def _listed(table: pa.Table) -> str:
    """The columns; the type is said where it may be why one is not taken."""
    odd = {f.name: "several types" if is_mixed(f) else f.type for f in table.schema if not _is_text(f)}
    return ", ".join(f"{name!r} ({odd[name]})" if name in odd else f"{name!r}" for name in table.column_names)


def check_there(key: str, table: pa.Table, name: str, split: str) -> None:
    """Raise `UserError` where the column that an option names is not in the data of a split, or is there
    twice."""
    there = table.column_names
    if there.count(name) != 1:
        found = "no column" if name not in there else "more than one column"
        comma = " A name with a comma is given in a list: '[\"a, b\"]'." if "," in "".join(there) else ""
        raise UserError(
            f"{key}: the {split} data has {found} {name!r}; its columns: {_listed(table)}.{comma}"
        )


def joined_rows(table: pa.Table, split: str) -> list[str]:
    """What to say of lines of a csv file that a quote has made one row."""
    where = (table.schema.metadata or {}).get(JOINED)
    said = "are one row, as a quote opens there; where these are several, double the quotes inside a field"
    return [f"WARNING {split}: {where.decode()} {said}"] if where else []


def unused_texts(table: pa.Table, columns: Columns) -> list[str]:
    """Other columns of text, which a user who named none may have meant, too."""
    if table.schema.metadata == ONE_FILE_A_ROW:
        return []
    used = (*columns.texts, columns.label, columns.id)
    return [field.name for field in table.schema if _is_text(field) and field.name not in used]


def _check_text(table: pa.Table, name: str, split: str) -> None:
    """Refuse a text column that holds something else."""
    field = table.schema.field(name)
    if name in RESERVED:
        raise UserError(f"text_column_names: {name!r} is the name of a column that is made here; rename it.")
    if is_mixed(field):
        row, odd = next(
            (row, value)
            for row, text in enumerate(table[name].to_pylist())
            if text is not None and not isinstance(value := json.loads(text), str)
        )
        raise UserError(
            f"text_column_names: the {split} column {name!r} mixes types: row {row} holds {odd!r} "
            f"({type(odd).__name__}); rows count from 0. Expected text in every row."
        )
    if not _is_string(field.type):
        raise UserError(f"text_column_names: the {split} column {name!r} holds {field.type}, expected text.")


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds a list a row."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_text(field: pa.Field) -> bool:
    """Whether a column is one of texts, and of nothing else."""
    return _is_string(field.type) and not is_mixed(field)


def _is_string(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def plain(table: pa.Table, columns: Columns) -> pa.Table:
    """The table with the strings of the columns that are used in one form: categories and views written
    out."""
    for name in dict.fromkeys((*columns.texts, *([columns.label] if columns.label else []))):
        column, field = table[name], table.schema.field(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if _is_string(column.type):
            _check_utf8(column, name)
            column = column.cast(pa.large_string())  # a string column holds 2 GB at most
        place = table.schema.get_field_index(name)
        table = table.set_column(place, field.with_type(column.type), column)
    return table


def _check_utf8(column: pa.ChunkedArray, name: str) -> None:
    """Refuse strings that are none: parquet and arrow files are not checked when they are read."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        for row, value in enumerate(column):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"the column {name!r}: row {row} is not UTF-8 ({error.reason} at byte "
                    f"{error.start + 1}); rows count from 0. Write the file again with texts in UTF-8."
                ) from None
        raise


def has_labels(table: pa.Table, label: str, task: Task) -> bool:
    """Whether a split has a label at all; test splits of competitions often have none, or -1 in the place of
    each (GLUE's), unless that is one of the labels that the task knows, or no list that holds one."""
    if label not in table.column_names or pc.all(_is_missing(table[label])).as_py():
        return False
    if HIDDEN in task.state().get("label_names", ()):
        return True
    column = table[label].drop_null()
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if _is_string(column.type):  # of a csv file
        trimmed = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
        hidden = pc.is_in(trimmed, pa.array(["", HIDDEN, f"{HIDDEN}.0"], pa.large_string()))
    elif is_list(column.type):
        hidden = pc.equal(pc.list_value_length(column), 0)
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        hidden = pc.equal(column.cast(pa.float64(), safe=False), float(HIDDEN))
    else:
        return True
    return not pc.all(hidden).as_py()


def _is_missing(label: pa.ChunkedArray, blank_is_a_label: bool = False) -> pa.ChunkedArray:
    missing = pc.is_null(label, nan_is_null=True)
    return pc.or_(missing, _is_blank(label)) if _is_string(label.type) and not blank_is_a_label else missing


def _is_blank(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """True for a string of white space only or of nothing; False for null. (To trim them would write all
    anew.)"""
    text = text.cast(pa.large_string())
    return pc.or_(pc.utf8_is_space(text), pc.equal(pc.binary_length(text), 0)).fill_null(False)


def find_bad_rows(table: pa.Table, columns: Columns, blank_is_a_label: bool = False) -> dict[str, np.ndarray]:
    """Row numbers (from 0) of the rows that cannot be used, under the reason."""
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
        missing = _is_missing(label, blank_is_a_label)
        if is_mixed(table.schema.field(columns.label)) and not blank_is_a_label:  # JSON texts
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
    """ "rows 3, 17 and 40 more" for a message, with the files of the rows if `names` has them; rows count
    from 0."""
    shown = [str(int(row)) + (f" ({names[int(row)]})" if names is not None else "") for row in rows[:SHOWN]]
    return f"row{'s' if len(rows) > 1 else ''} {_first_of(len(rows), shown)}"


def describe_values(values: Iterable[Any]) -> str:
    """ "'a', 'b' and 40 more" for a message: each value once, in the order of its first row."""
    different = list(dict.fromkeys(map(repr, values)))
    return _first_of(len(different), different[:SHOWN])


def _first_of(count: int, shown: list[str]) -> str:
    """ "3, 17 and 40 more": what is shown of so many things."""
    return ", ".join(shown) + (f" and {count - SHOWN:,} more" if count > SHOWN else "")


def joined_text(table: pa.Table, columns: Columns) -> pa.ChunkedArray:
    """One string a row: the text, or both texts of a pair."""
    arrays = [table[name] for name in columns.texts]
    return (
        arrays[0]
        if len(arrays) == 1
        else pc.binary_join_element_wise(*arrays, pa.scalar("\x1f", arrays[0].type))
    )


def text_marks(table: pa.Table, columns: Columns) -> pa.ChunkedArray:
    """A hash of each row's text, or of both: the same where these are, letter for letter. (To look for copies
    among the texts themselves takes up to three times their memory.)"""
    parts = []
    for batch in table.select(list(columns.texts)).to_batches(max_chunksize=1024):
        texts = zip(*(column.to_pylist() for column in batch.columns), strict=True)
        marks = b"".join(blake2b("\x1f".join(row).encode(), digest_size=16).digest() for row in texts)
        parts.append(pa.Array.from_buffers(pa.binary(16), batch.num_rows, [None, pa.py_buffer(marks)]))
    return pa.chunked_array(parts, pa.binary(16))


def shared_rows(marks: pa.ChunkedArray, others: pa.ChunkedArray) -> np.ndarray:
    """Numbers of the rows of which the mark is among `others`."""
    return _rows(pc.is_in(marks, value_set=others))


def chosen(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Some rows, by their numbers in rising order. (Arrow's `take` would first copy all texts, to join
    them.)"""
    if len(rows) == table.num_rows:
        return table
    mask = np.zeros(table.num_rows, bool)
    mask[rows] = True
    return table.filter(pa.array(mask))
