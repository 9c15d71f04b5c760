"""Collects rows into an Arrow table, a chunk at a time; a column of several types is kept as JSON."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ft.errors import UserError

ROWS_PER_CHUNK = 10_000
CHARACTERS_PER_CHUNK = 2**27
MIXED = {b"values": b"mixed"}  # metadata of a column


def gather(rows: Iterator[dict[str, Any]], path: Path, names: Sequence[str] = ()) -> pa.Table:
    """Collect rows in chunks, so that a large file is never held as Python objects. `names` are the columns
    that every row has; without them, they are those that occur.

    A column whose values have several types (a number here, a string there) is kept as JSON strings, with
    `MIXED` in its metadata: it matters only if the column is used, and the audit then names the odd row.
    """
    sizes: list[int] = []
    chunks: list[dict[str, Any]] = []  # a list instead of an array if pyarrow found several types
    mixed = set()
    for chunk in _chunks(rows):
        columns: dict[str, Any] = {}
        for name in names or dict.fromkeys(name for row in chunk for name in row):
            if not is_unicode(name):
                raise UserError(
                    f"{path}: the column {name!r} is named with half of a surrogate pair; rename it."
                )
            columns[name] = values = [row.get(name) for row in chunk]
            try:
                array = pa.array(values)
                if pa.types.is_floating(array.type) and bool in set(map(type, values)):
                    raise pa.ArrowTypeError("a bool behind a fraction, which Arrow takes for a number")
                columns[name] = array
            except UnicodeEncodeError:  # JSON may escape one half of a character: "\ud83d"
                row = sum(sizes) + next(i for i, value in enumerate(values) if not is_unicode(value))
                raise UserError(
                    f"{path}: row {row} (rows count from 0): {name!r} holds half of a surrogate pair, which "
                    "is no text; write the character whole."
                ) from None
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
                mixed.add(name)
        sizes.append(len(chunk))
        chunks.append(columns)
    arrays, table_fields = [], []
    for name in names or dict.fromkeys(name for chunk in chunks for name in chunk):
        parts = [chunk.get(name, pa.nulls(size)) for chunk, size in zip(chunks, sizes, strict=True)]
        types = {part.type for part in parts if isinstance(part, pa.Array)} - {pa.null()}
        if len(types) > 1:
            types -= {pa.list_(pa.null())}  # a chunk of empty lists
        if name in mixed or not (len(types) <= 1 or types == {pa.int64(), pa.float64()}):
            lists = (part.to_pylist() if isinstance(part, pa.Array) else part for part in parts)
            texts = ([None if v is None else json.dumps(v) for v in values] for values in lists)
            parts = [pa.array(values, pa.string()) for values in texts]
            table_fields.append(pa.field(name, pa.string(), metadata=MIXED))
        else:
            kind = pa.float64() if len(types) > 1 else next(iter(types), pa.string())
            parts = [part.cast(kind, safe=False) for part in parts]
            table_fields.append(pa.field(name, kind))
        arrays.append(pa.chunked_array(parts, table_fields[-1].type))
    return pa.table(arrays, schema=pa.schema(table_fields))


def is_mixed(field: pa.Field) -> bool:
    """Whether a column holds values of several types, as JSON strings."""
    return bool(field.metadata) and MIXED.items() <= field.metadata.items()


def _chunks(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Some rows at a time, fewer if they are long: an Arrow array holds 2 GB of text."""
    chunk: list[dict[str, Any]] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(chunk) == ROWS_PER_CHUNK or characters > CHARACTERS_PER_CHUNK:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def is_unicode(value: Any) -> bool:
    """Whether the texts in a value can be written: they hold no half of a surrogate pair, which is also how
    Python keeps bytes of a file name that are not UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
