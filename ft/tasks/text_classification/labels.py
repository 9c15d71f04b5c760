"""A label column of any type as the names of its labels, and the kind of learning that it calls for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ft.data.audit import describe_rows, describe_values
from ft.data.columns import is_list, is_string
from ft.data.tables import is_mixed
from ft.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"

WHOLE = re.compile(r"[+-]?[0-9]{1,100}")  # an id is a class, too
ANY_NUMBER = re.compile(r"[+-]?[0-9]{1,100}(\.[0-9]*)?")
NUMBER = re.compile(r"-?[0-9]{1,18}(\.[0-9]*)?")  # beside names, anything else like a number is a name
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def choose_problem_type(
    values: pa.ChunkedArray, field: pa.Field, names: list[str] | None, delimiter: str | None
) -> tuple[str, str]:
    """What a label column calls for, under Transformers' name, and why: lists (or a delimiter) are
    multi-label, numbers that are not all whole are regression, everything else is single-label."""
    import pyarrow as pa
    import pyarrow.compute as pc

    where = f"the label column {field.name!r} holds"
    if is_list(values.type):
        return MULTI, f"{where} lists"
    if delimiter is not None:
        return MULTI, "label_delimiter is set"
    if names is not None:
        return SINGLE, f"{where} classes"
    if is_mixed(field):
        plain = [json.loads(value) for value in values.to_pylist() if value is not None]
        numbers = [v for v in plain if isinstance(v, int | float) and not isinstance(v, bool)]
        if any(isinstance(value, list) for value in plain):
            return MULTI, f"{where} lists"
        fractions = any(number != number // 1 for number in numbers)
        is_regression = fractions and 2 * len(numbers) > len(plain)
    elif pa.types.is_large_string(values.type):
        texts = pc.utf8_trim_whitespace(values.drop_null())
        texts = texts.filter(pc.greater(pc.utf8_length(texts), 0))
        if len(texts) and _written_lists(texts).all():
            return MULTI, f"{where} lists, written as texts"
        is_regression = _mostly_fractions(values)
        commas = np.asarray(pc.match_substring_regex(texts, r"^[+-]?[0-9]+,[0-9]+$"), bool)
        if 2 * commas.sum() > len(commas):
            raise UserError(
                f"{where} {texts[int(commas.argmax())].as_py()!r} and the like. Numbers are written with a "
                "point; for several labels a row, set label_delimiter; for names that look so, set "
                f"problem_type: {SINGLE}."
            )
    elif pa.types.is_floating(values.type) or pa.types.is_decimal(values.type):
        array = np.asarray(values.drop_null().cast(pa.float64()))
        is_regression = bool((array[np.isfinite(array)] % 1 != 0).any())
    else:
        is_regression = False
    if is_regression:
        return REGRESSION, f"{where} numbers that are not all whole"
    return SINGLE, f"{where} one name or whole number a row"


def _mostly_fractions(values: pa.ChunkedArray) -> bool:
    """Whether most of the texts are numbers, and not all of these whole."""
    import pyarrow.compute as pc

    counts = pc.value_counts(pc.utf8_trim_whitespace(values.drop_null())).to_pylist()
    numbers = [entry for entry in counts if DECIMAL.fullmatch(entry["values"])]
    fractions = any(float(entry["values"]) % 1 for entry in numbers)
    return fractions and 2 * sum(e["counts"] for e in numbers) > sum(
        e["counts"] for e in counts if e["values"]
    )


def in_order(found: Sequence[str], names: list[str] | None) -> list[str]:
    """The labels of a column in the order of their numbers: that of a ClassLabel if there is one; else whole
    numbers in numerical and names in alphabetical (code point) order."""
    whole = all(map(WHOLE.fullmatch, found))
    return list(names) if names else sorted(found, key=(lambda name: (int(name), name)) if whole else None)


def numbers_of(
    names: Any, label_names: list[str], rows: np.ndarray, field: pa.Field, split: str
) -> np.ndarray:
    """(names,) int32: the number of each name. `rows` are the row numbers of `names`, for the `UserError`
    that an unknown one is."""
    import pyarrow as pa
    import pyarrow.compute as pc

    numbers = pc.index_in(names, value_set=pa.array(label_names, pa.large_string()))
    unknown = np.flatnonzero(np.asarray(pc.is_null(numbers)))
    if len(unknown):
        odd, where = names.take(unknown).to_pylist(), describe_rows(np.unique(rows[unknown]))
        hint = ""
        if all(re.fullmatch("LABEL_[0-9]+", name) for name in label_names):  # a model without names
            hint = " Or rename the model's labels: id2label and label2id in its config.json."
        elif {name.casefold() for name in odd} & {name.casefold() for name in label_names}:
            hint = " (Case counts. A model's own names are in its config.json: id2label and label2id.)"
        raise UserError(
            f"{split} data: the label column {field.name!r}: {where}: found the label {describe_values(odd)}"
            f", which training lacks; rows count from 0. Expected one of {', '.join(label_names[:20])}"
            f"{', ...' if len(label_names) > 20 else ''}. Fix the label, or add training rows that have it."
            f"{hint}"
        )
    return np.asarray(numbers).astype(np.int32)


def names_of(
    values: pa.ChunkedArray, field: pa.Field, rows: np.ndarray, split: str, names: list[str] | None,
    may_mix: bool = False,
) -> pa.ChunkedArray:  # fmt: skip
    """One label per row, of any type, as its name. Raises `UserError` for a column that mixes types,
    including numbers and names, unless it may mix these."""
    import pyarrow as pa
    import pyarrow.compute as pc

    where = f"{split} data: the label column {field.name!r}"
    if names is not None:
        return _class_names(values, names, rows, where)
    if is_mixed(field):
        plain = [json.loads(value) for value in values.to_pylist()]
        types = {type(value) for value in plain}  # numbers beyond 64 bits, or the odd row was dropped
        if types in ({int}, {str}) or (may_mix and types == {int, str}):
            texts = [str(value).strip() for value in plain]
            return pa.chunked_array([pa.array(texts, pa.large_string())])
        raise _mixed(plain, rows, where, "labels of one type")
    if pa.types.is_boolean(values.type):
        return pc.if_else(values, "true", "false").cast(pa.large_string())
    if pa.types.is_integer(values.type):
        return values.cast(pa.large_string())
    if pa.types.is_large_string(values.type):
        values = pc.utf8_trim_whitespace(values)
        if may_mix and split != "train":
            return values  # whichever of the names occur
        found = values.unique().to_pylist()
        pattern = ANY_NUMBER if all(map(ANY_NUMBER.fullmatch, found)) else NUMBER
        number = {name: bool(pattern.fullmatch(name)) for name in found}
        if not any(number.values()):
            return values
        if not all(number.values()):
            if may_mix:
                return values
            listed = values.to_pylist()
            # Whichever kind is rarer is the odd one.
            few = sum(number[name] for name in listed) * 2 < len(listed)
            odd = next(i for i, name in enumerate(listed) if number[name] == few)
            raise UserError(
                f"{where} mixes numbers and names: row {rows[odd]} holds {listed[odd]!r}, unlike most "
                f"others; rows count from 0. Expected labels of one type; if all are names, set "
                f"problem_type: {SINGLE}."
            )
        if all(map(WHOLE.fullmatch, number)):
            return values  # as written: "01" is not "1"
        padded = [name for name in found if re.match(r"[+-]?0[0-9]", name)]
        pointed = [name for name in found if "." in name and name not in padded]
        if padded and pointed:
            raise UserError(
                f"{where} mixes {padded[0]!r} with {pointed[0]!r}: beside one with a point, it would be a "
                "number, without its 0. Expected labels of one type."
            )
        values = pc.utf8_ltrim(values, "+").cast(pa.float64())
    if pa.types.is_decimal(values.type):  # from a database: NUMERIC
        values = values.cast(pa.float64())
    if is_list(values.type):
        raise UserError(
            f"{where} holds {values.type}, expected one whole number or name a row; for lists of labels, set "
            f"problem_type: {MULTI}."
        )
    if not pa.types.is_floating(values.type):
        raise UserError(f"{where} holds {values.type}, expected whole numbers or names.")
    expected = f"whole numbers or names; for numbers to predict, set problem_type: {REGRESSION}"
    return pa.chunked_array([_whole_names(values, rows, where, "class", expected)])


def name_lists_of(
    values: pa.ChunkedArray, field: pa.Field, rows: np.ndarray, split: str, names: list[str] | None,
    delimiter: str | None,
) -> tuple[pa.Array, np.ndarray]:  # fmt: skip
    """Any number of labels per row, as one flat array of their names, and the place in `rows` of each.

    Takes lists of names, whole numbers or classes, and texts of names with a delimiter between them, whose
    empty parts are no labels. Raises `UserError` for anything else."""
    import pyarrow as pa
    import pyarrow.compute as pc

    where = f"{split} data: the label column {field.name!r}"
    if is_mixed(field):
        plain = [json.loads(value) for value in values.to_pylist()]
        try:  # the odd row may have been dropped
            kind = pa.large_string() if all(isinstance(value, str) for value in plain) else None
            values = pa.chunked_array([pa.array(plain, kind)])
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            raise _mixed(plain, rows, where, "a list of labels in every row") from None
    values = pa.chunked_array([values.combine_chunks()]) if values.num_chunks != 1 else values
    are_texts = pa.types.is_large_string(values.type)
    if are_texts:
        _refuse_written_lists(values, rows, where)
        if delimiter is None:
            raise UserError(
                f"{where} holds texts ({values[0].as_py()!r} in row {rows[0]}); set label_delimiter to what "
                'stands between the labels of a row, for example "|".'
            )
        values = pc.split_pattern(values, delimiter)
    elif not is_list(values.type):
        raise UserError(
            f"{where} holds {values.type}; multi-label expects a list of labels a row, or texts with a "
            f"label_delimiter. For one label a row, set problem_type: {SINGLE}."
        )
    flat = pc.list_flatten(values).combine_chunks()
    places = np.asarray(pc.list_parent_indices(values)).astype(np.int64)
    if pa.types.is_dictionary(flat.type):
        flat = flat.cast(flat.type.value_type)
    missing = np.flatnonzero(np.asarray(pc.is_null(flat, nan_is_null=True)))
    if pa.types.is_null(flat.type):  # only empty lists
        flat = flat.cast(pa.large_string())
    if len(missing):
        raise UserError(
            f"{where}: {describe_rows(np.unique(rows[places[missing]]))}: holds null among the labels of the "
            "row; rows count from 0. Take it out of the list, or leave the list empty."
        )
    flat = _flat_names(flat, rows[places], where, names)
    blank = np.asarray(pc.equal(pc.utf8_length(flat), 0))
    if blank.any() and not are_texts:
        raise UserError(
            f"{where}: {describe_rows(np.unique(rows[places[blank]]))}: holds an empty name among the labels "
            "of the row; rows count from 0. Take it out of the list, or leave the list empty."
        )
    return flat.filter(pa.array(~blank)), places[~blank]


def _flat_names(flat: pa.Array, rows: np.ndarray, where: str, names: list[str] | None) -> pa.Array:
    """The elements of lists as names."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if names is not None:
        return _class_names(flat, names, rows, where).combine_chunks()
    if pa.types.is_boolean(flat.type):
        return pc.if_else(flat, "true", "false").cast(pa.large_string())
    if is_string(flat.type):
        return pc.utf8_trim_whitespace(flat.cast(pa.large_string()))
    if pa.types.is_integer(flat.type):
        return flat.cast(pa.large_string())
    if pa.types.is_floating(flat.type):
        return _whole_names(flat, rows, where, "label", "lists of names or whole numbers")
    raise UserError(f"{where} holds lists of {flat.type}, expected lists of names or whole numbers.")


def _whole_names(values: Any, rows: np.ndarray, where: str, what: str, expected: str) -> pa.Array:
    """Floating-point numbers that must all be whole, as names."""
    import pyarrow as pa

    numbers = np.asarray(values, np.float64)
    broken = np.flatnonzero((numbers != np.floor(numbers)) | (np.abs(numbers) > 2**53))
    if len(broken):
        raise UserError(
            f"{where}: row {rows[broken[0]]} holds {numbers[broken[0]]:g}, which is no {what}; rows count "
            f"from 0. Expected {expected}."
        )
    return pa.array(numbers.astype(np.int64)).cast(pa.large_string())


def _class_names(values: Any, names: list[str], rows: np.ndarray, where: str) -> pa.ChunkedArray:
    """The names of the numbers of a ClassLabel."""
    import pyarrow as pa
    import pyarrow.compute as pc

    outside = np.flatnonzero((np.asarray(values) < 0) | (np.asarray(values) >= len(names)))
    if len(outside):
        found = describe_values(values.take(outside).to_pylist())
        raise UserError(
            f"{where}: {describe_rows(rows[outside])}: found {found}, expected the number of one of its "
            f"{len(names)} classes (0 to {len(names) - 1})."
        )
    return pc.take(pa.chunked_array([pa.array(names, pa.large_string())]), values)


def _written_lists(values: pa.ChunkedArray) -> np.ndarray:
    """(texts,) bool: whether each is a list written as text, such as "['a', 'b']"."""
    import pyarrow.compute as pc

    return np.asarray(pc.match_substring_regex(values, r"^\s*\[.*\]\s*$"), bool)


def _refuse_written_lists(values: pa.ChunkedArray, rows: np.ndarray, where: str) -> None:
    """A csv cannot hold lists: "['a', 'b']" is a text that only looks like one."""
    written = np.flatnonzero(_written_lists(values))
    if len(written):
        place = int(written[0])
        raise UserError(
            f"{where}: row {rows[place]} holds {values[place].as_py()!r}, a list written as a text; rows "
            'count from 0. Write the labels as "a|b" and set label_delimiter: "|", or use jsonl or parquet; '
            f"for one name a row, set problem_type: {SINGLE}."
        )


def _mixed(plain: list[Any], rows: np.ndarray, where: str, expected: str) -> UserError:
    """The error for a column of several types."""
    if all(isinstance(value, list) for value in plain):
        rows = np.repeat(rows, [len(value) for value in plain])
        plain, expected = [one for value in plain for one in value], "labels of one type in the lists"
    kinds = [type(value).__name__ for value in plain]
    odd = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), 0)
    return UserError(
        f"{where} mixes types: row {rows[0]} holds {plain[0]!r} ({kinds[0]}) and row {rows[odd]} holds "
        f"{plain[odd]!r} ({kinds[odd]}); rows count from 0. Expected {expected}."
    )
