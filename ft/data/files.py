"""Read one file of rows into an Arrow table; what is wrong with the file is a `UserError` that names the
line."""

import csv
import gzip
import io
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from ft.errors import UserError

FORMATS = ("csv", "tsv", "json", "jsonl", "parquet", "arrow")
ROWS_PER_CHUNK = 10_000
MIXED = {b"values": b"mixed"}


def format_of(path: Path) -> str | None:
    """The format that a file name stands for, with .gz taken off where that makes sense; None for any
    other."""
    parts = path.name.lower().split(".")
    if len(parts) > 2 and parts[-1] == "gz" and parts[-2] in FORMATS[:4]:
        return parts[-2]
    return parts[-1] if len(parts) > 1 and parts[-1] in FORMATS else None


def read_table(path: Path) -> pa.Table:
    """All rows of a csv, tsv, json, jsonl (each also .gz), parquet or arrow file, in their order.

    Columns of csv and tsv are strings. Raises `UserError` for a file that is empty, broken or not UTF-8.
    """
    kind = format_of(path)
    try:
        if kind in ("csv", "tsv"):
            table = _read_csv(path, "\t" if kind == "tsv" else ",")
        elif kind in ("json", "jsonl"):
            table = _read_json(path)
        elif kind == "parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path)
        elif kind == "arrow":
            table = _read_arrow(path)
        else:
            raise UserError(
                f"{path}: expected a file that ends in {', '.join(FORMATS)} (text formats also in .gz)."
            )
    except UnicodeDecodeError:
        raise UserError(f"{path}: {_not_utf8(path)}; save the file as UTF-8.") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: is not a whole {kind} file: {str(error).splitlines()[0]}") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path}: is not a whole gzip file: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None
    if table.num_rows == 0:
        raise UserError(f"{path}: holds no rows.")
    return table


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _read_csv(path: Path, delimiter: str) -> pa.Table:
    csv.field_size_limit(sys.maxsize)
    with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            if not any(header):
                raise UserError(f"{path}: is empty; expected a header line with the names of the columns.")
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise UserError(f"{path}: line 1: the column {twice[0]!r} stands more than once; rename one.")
            return _table(
                _csv_rows(reader, header, path), pa.schema([(name, pa.string()) for name in header])
            )
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num}: broken row: {error}.") from None


def _csv_rows(reader: Any, header: list[str], path: Path) -> Iterator[dict[str, str]]:
    start = reader.line_num + 1
    for fields in reader:
        if fields:
            if len(fields) != len(header):
                raise UserError(
                    f"{path}: line {start}: found {len(fields)} fields, expected {len(header)} "
                    f"({', '.join(header)}); quote a field that holds a delimiter or a line break."
                )
            if any("\0" in field for field in fields):
                raise UserError(
                    f"{path}: line {start}: holds a NUL byte; the file is damaged or not UTF-8 text."
                )
            yield dict(zip(header, fields, strict=True))
        start = reader.line_num + 1


def _read_json(path: Path) -> pa.Table:
    with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as text:
        first = text.read(1)
        while first.isspace():
            first = text.read(1)
        text.seek(0)
        if first != "[":
            return _table(_json_lines(text, path))
        try:
            rows = json.load(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {error.lineno}: broken JSON: {error.msg}.") from None
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise UserError(
                    f"{path}: row {number}: found {type(row).__name__}, expected an object {{...}}."
                )
        return _table(iter(rows))


def _json_lines(text: IO[str], path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}: line {number}: broken JSON: {error.msg} (column {error.colno})."
                ) from None
            if not isinstance(row, dict):
                raise UserError(
                    f"{path}: line {number}: found {type(row).__name__}, expected an object {{...}}."
                )
            yield row


def _table(rows: Iterator[dict[str, Any]], schema: pa.Schema | None = None) -> pa.Table:
    """Gather rows in chunks, so that a large file is never held as Python objects.

    A column whose values have several types (a number here, a string there) is kept as JSON texts, with
    `MIXED` in its metadata: it matters only where the column is used, and the audit then names the odd row.
    """
    chunks: list[dict[str, Any]] = []  # a list where pyarrow found several types
    mixed = set()
    while chunk := list(islice(rows, ROWS_PER_CHUNK)):
        columns: dict[str, Any] = {}
        for name in schema.names if schema else dict.fromkeys(name for row in chunk for name in row):
            columns[name] = values = [row.get(name) for row in chunk]
            try:
                columns[name] = pa.array(values)
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                mixed.add(name)
        columns[""] = pa.nulls(len(chunk))
        chunks.append(columns)
    names = schema.names if schema else [n for n in dict.fromkeys(n for chunk in chunks for n in chunk) if n]
    arrays, table_fields = [], []
    for name in names:
        parts = [chunk.get(name, chunk[""]) for chunk in chunks]
        types = {part.type for part in parts if isinstance(part, pa.Array)} - {pa.null()}
        if name in mixed or not (len(types) <= 1 or types == {pa.int64(), pa.float64()}):
            values = [part.to_pylist() if isinstance(part, pa.Array) else part for part in parts]
            parts = [pa.array([None if v is None else json.dumps(v) for v in part]) for part in values]
            table_fields.append(pa.field(name, pa.string(), metadata=MIXED))
        else:
            kind = pa.float64() if len(types) > 1 else next(iter(types), pa.string())
            parts = [part.cast(kind) for part in parts]
            table_fields.append(pa.field(name, kind))
        arrays.append(pa.chunked_array(parts, table_fields[-1].type))
    return pa.table(arrays, schema=pa.schema(table_fields))


def _read_arrow(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        try:
            return pa.ipc.open_file(file).read_all()
        except pa.ArrowInvalid:  # the streaming format, which `datasets` writes
            file.seek(0)
            return pa.ipc.open_stream(file).read_all()


def _not_utf8(path: Path) -> str:
    """Where the first bytes that are not UTF-8 stand; runs only after a read has failed."""
    with _open(path) as file:
        lines: Iterable[bytes] = file
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {number}: byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8"
    return "is not UTF-8"
