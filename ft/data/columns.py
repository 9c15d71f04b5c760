"""Which columns of a table are the text, the label and the id, and how their values are used."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from ft.data.files import ONE_FILE_A_ROW
from ft.data.tables import is_mixed
from ft.errors import UserError

TEXT_NAMES = ["text", "sentence", "review", "content", "document", "title", "question"]
LABEL_NAMES = ["label", "labels", "target", "class", "category", "intent", "sentiment", "stars", "score"]
ID_NAMES = ["id", "idx", "row_id"]
# Columns of the encoded rows.
RESERVED = "row label input_ids token_type_ids full_length cut pieces".split()
WRITTEN = ["prediction", "probabilities", "label_quality"]  # beside the texts and ids of predictions
MEASURED = ["confidence", "error"]  # beside the texts of worst_errors


@dataclass(frozen=True)
class Columns:
    """The columns in use: one text or the two of a pair, the label, and, for predictions, an id; "" for
    none."""

    texts: tuple[str, ...]
    label: str
    id: str = ""


@dataclass(frozen=True)
class Scoring:
    """What an evaluation adds to the choice of columns: the texts and the label that the model was trained
    on, which are used if the data has them and the user names none, and the id column that the user named."""

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
    """The columns that the user named, or those inferred from names or types. For unlabelled rows, `label` is
    a column to ignore, which need not exist."""
    listed = _listed(table)
    label = label or guess_label(table)
    if label is None and is_labelled:
        raise UserError(f"label_column_name: cannot tell the label among the columns {listed}; name it.")
    if label and is_labelled:
        check_there("label_column_name", table, label, split)
    if not texts:
        # By its name, a column that mixes types is a text column, too, with an odd row.
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
                f"text_column_names: {name!r} is reserved in predictions and worst_errors; rename it."
            )
        _check_text(table, name, split)
    if label in texts and is_labelled:
        raise UserError(f"label_column_name: {label!r} is the text column, too; name another column.")
    return Columns(tuple(texts), label if label and is_labelled else "", id_column)


def guess_label(table: pa.Table) -> str | None:
    """The column whose name suggests that it is the label, if there is one."""
    return next(
        (name for wanted in LABEL_NAMES for name in table.column_names if name.lower() == wanted), None
    )


def choose_id(table: pa.Table, wanted: str | None, used: Sequence[str], split: str) -> str:
    """The column to copy to the predictions as row id: the one that the user named, or one with a suitable
    name; "" for none. `used` are the columns with another use."""
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
    if is_string(ids.type):
        _check_utf8(ids, columns.id)
    return ids


def unquoted(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    """For a column with values of several types, kept as JSON: its strings unquoted; any other column
    unchanged."""
    if not is_mixed(field):
        return column
    read = ([_plain(text) for text in chunk.to_pylist()] for chunk in column.chunks)
    return pa.chunked_array([pa.array(texts, pa.large_string()) for texts in read], pa.large_string())


def _plain(text: str | None) -> str | None:
    """The string in a JSON value; any other value as JSON."""
    return json.loads(text) if text and text.startswith('"') else text


def _as_id(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    if pa.types.is_integer(column.type):
        return column
    if pa.types.is_floating(column.type):  # whole numbers, one of them missing: not 4.006381333931e+12
        numbers = column.cast(pa.float64())
        known = pc.if_else(pc.is_nan(numbers), None, numbers)
        if pc.all(pc.and_(pc.equal(pc.floor(known), known), pc.less_equal(pc.abs(known), 2.0**53))).as_py():
            return known.cast(pa.int64())
    try:
        return column.cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
        return None


def _listed(table: pa.Table) -> str:
    """The columns; with the type if it may be why one is not taken."""
    odd = {f.name: "several types" if is_mixed(f) else f.type for f in table.schema if not _is_text(f)}
    return ", ".join(f"{name!r} ({odd[name]})" if name in odd else f"{name!r}" for name in table.column_names)


def check_there(key: str, table: pa.Table, name: str, split: str) -> None:
    """Raise `UserError` if the column that an option names is missing in the data of a split, or occurs
    twice."""
    there = table.column_names
    if there.count(name) != 1:
        found = "no column" if name not in there else "more than one column"
        comma = " A name with a comma is given in a list: '[\"a, b\"]'." if "," in "".join(there) else ""
        raise UserError(
            f"{key}: the {split} data has {found} {name!r}; its columns: {_listed(table)}.{comma}"
        )


def unused_texts(table: pa.Table, columns: Columns) -> list[str]:
    """Other text columns, which a user who named none may also have meant."""
    if table.schema.metadata == ONE_FILE_A_ROW:
        return []
    used = (*columns.texts, columns.label, columns.id)
    return [field.name for field in table.schema if _is_text(field) and field.name not in used]


def _check_text(table: pa.Table, name: str, split: str) -> None:
    """Refuse a text column that holds something else."""
    field = table.schema.field(name)
    if name in RESERVED:
        raise UserError(f"text_column_names: {name!r} is reserved for a column of encoded rows; rename it.")
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
    if not is_string(field.type):
        raise UserError(f"text_column_names: the {split} column {name!r} holds {field.type}, expected text.")


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_text(field: pa.Field) -> bool:
    """Whether a column holds texts, and nothing else."""
    return is_string(field.type) and not is_mixed(field)


def is_string(kind: pa.DataType) -> bool:
    """Whether a column holds strings of any kind."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def plain(table: pa.Table, columns: Columns) -> pa.Table:
    """The table with the strings of the columns in use in one form: dictionaries and views decoded."""
    for name in dict.fromkeys((*columns.texts, *([columns.label] if columns.label else []))):
        column, field = table[name], table.schema.field(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if is_string(column.type):
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
