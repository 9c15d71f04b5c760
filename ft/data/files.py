"""Reads one file of rows into an Arrow table; anything wrong with the file is a `UserError` that names the
line."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from ft.data.tables import gather
from ft.errors import UserError, first_line

SEPARATORS = {"csv": ",", "tsv": "\t"}
TEXT_FORMATS = (*SEPARATORS, "json", "jsonl")
FORMATS = (*TEXT_FORMATS, "parquet", "arrow")
LONGEST_TEXT = 2**24  # characters; to tokenise as many takes about a gigabyte
NOT_GZIP = (gzip.BadGzipFile, zlib.error, EOFError)
TOO_LONG = "holds a whole number of thousands of digits; put it in quotes, as a text."  # Python's limit
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
JOINED = b"joined"  # metadata key of a table with a row of a csv file that may be several
ONE_FILE_A_ROW = {b"rows": b"files"}  # metadata of a table that was made of a folder of texts


def format_of(path: Path) -> str | None:
    """The format that a file name stands for, ignoring .gz where it is allowed; None for any other."""
    parts = path.name.lower().split(".")
    if len(parts) > 2 and parts[-1] == "gz" and parts[-2] in TEXT_FORMATS:
        return parts[-2]
    return parts[-1] if len(parts) > 1 and parts[-1] in FORMATS else None


def read_table(path: Path, errors: str = "strict") -> pa.Table:
    """All rows of a csv, tsv, json, jsonl (each also .gz), parquet or arrow file, in order. Columns of csv
    and tsv are strings.

    Raises `UserError` for a file that is empty, broken or not UTF-8; `errors="replace"` reads a text file
    that is not UTF-8 anyway, with replacement characters.
    """
    kind = format_of(path)
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: is empty (0 bytes).")
        if is_pointer(path):
            raise UserError(
                f"{path}: is a Git LFS pointer to a file that was not fetched; run `git lfs pull`."
            )
        if kind in SEPARATORS:
            table = _read_csv(path, SEPARATORS[kind], errors)
        elif kind in TEXT_FORMATS:
            table = _read_json(path, errors)
        elif kind == "parquet":
            import pyarrow.parquet

            # Not read_table, which takes columns from the names of the folders, as in "lr=1/train.parquet".
            with pyarrow.parquet.ParquetFile(path) as file:
                table = file.read()
        else:
            table = _read_arrow(path)
    except UnicodeDecodeError:
        raise UserError(f"{path}: {_not_utf8(path)}; save the file as UTF-8.") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply; expected one object {{...}} for each row.") from None
    except NOT_GZIP as error:
        raise _broken_gzip(path, error) from None
    except (pa.ArrowException, OSError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        if kind in ("parquet", "arrow") and not getattr(error, "errno", None):
            raise UserError(f"{path}: is not a whole {kind} file: {reason}; make or copy it again.") from None
        raise UserError(f"{path}: cannot be read: {reason}.") from None
    if table.num_rows == 0:
        raise UserError(f"{path}: holds no rows.")
    return table


def is_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer to one that was not fetched."""
    with open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def is_hidden(path: Path) -> bool:
    """Whether a file, or a folder that it is in, is hidden."""
    return any(part.startswith(".") for part in path.parts)


def class_labels(path: Path) -> dict[str, list[str]]:
    """The class names of ClassLabel columns and of lists of them, which `datasets` stores in its parquet and
    arrow files; empty for any other file, and for a broken one."""
    try:
        if format_of(path) == "parquet":
            import pyarrow.parquet

            schema = pyarrow.parquet.read_schema(path)
        elif format_of(path) == "arrow":
            schema = _read_arrow(path).schema
        else:
            return {}
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = {}
        for name, feature in features.items():
            inner = feature[0] if isinstance(feature, list) and feature else feature  # older lists: [{...}]
            inner = inner.get("feature", inner) if isinstance(inner, dict) else None
            if not isinstance(inner, dict) or inner.get("_type") != "ClassLabel":
                continue
            kind = schema.field(name).type if schema.names.count(name) == 1 else pa.null()
            if pa.types.is_integer(getattr(kind, "value_type", kind)):
                found[name] = list(inner["names"])
        return found
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError):
        return {}


def read_text(path: Path) -> str | None:
    """The whole of a .txt file (also .gz); None if it is not UTF-8."""
    try:
        with _open(path) as raw, io.TextIOWrapper(raw, "utf-8-sig") as text:
            return text.read()
    except UnicodeDecodeError:
        return None
    except NOT_GZIP as error:
        raise _broken_gzip(path, error) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from None


def _broken_gzip(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: is not a whole gzip file: {error}; make or copy it again.")


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _read_csv(path: Path, delimiter: str, errors: str) -> pa.Table:
    csv.field_size_limit(LONGEST_TEXT)
    with _open(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", errors, newline="") as text:
        taken: list[str] = []
        joined: list[str] = []
        lines = _noted(_lines(text, path), taken)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        records = _csv_records(reader, path, taken, joined)
        line, fields = next((record for record in records if record[1]), (1, []))
        header = [name.strip() for name in fields]
        if not any(header):
            raise UserError(f"{path}: is empty; expected a header line with the names of the columns.")
        other = next((mark for mark in ";\t|," if mark in header[0]), None) if len(header) == 1 else None
        if other:
            raise _separated_otherwise(path, line, header[0], delimiter, other)
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice[:1] == [""]:
            raise UserError(
                f"{path}: line {line}: {header.count('')} columns have no name; name them, or delete them."
            )
        if twice:
            raise UserError(f"{path}: line {line}: the column {twice[0]!r} occurs twice or more; rename one.")
        if len(header) == 1:
            begin = [*islice(records, 4)]
            records = chain(begin, records)
            # A blank line before each row comes from the line ends ("\r\r\n").
            if [bool(fields) for _, fields in begin] != [False, True, False, True]:
                records = _with_blank_lines(records)
        table = gather(_csv_rows(records, header, path), path, header)
    more = f" (and {len(joined) - 1:,} more)" if len(joined) > 1 else ""
    return table.replace_schema_metadata({JOINED: f"{path.name}, {joined[0]}{more}"}) if joined else table


def _separated_otherwise(path: Path, line: int, header: str, delimiter: str, other: str) -> UserError:
    return UserError(
        f"{path}: line {line}: found one column, {header!r}, expected several, separated by {delimiter!r} "
        f"and not by {other!r}; save it again" + (", or name it .tsv." if other == "\t" else ".")
    )


def _csv_records(
    reader: Any, path: Path, taken: list[str], joined: list[str]
) -> Iterator[tuple[int, list[str]]]:
    """The line on which a row begins, and its fields, none for a blank line. `taken` has the lines of each;
    `joined` gets those of a row that may be several."""
    delimiter = reader.dialect.delimiter
    while True:
        start = reader.line_num + 1
        taken.clear()
        try:
            fields = next(reader, None)
        except csv.Error as error:
            # A header of quoted names. (The strict reader expects a separator after each.)
            other = re.match(r'\s*"[^"]*"\s*([;\t|,])', taken[0]) if start == 1 else None
            if other and other[1] != delimiter:
                raise _separated_otherwise(path, 1, taken[0].strip(), delimiter, other[1]) from None
            lines = f"line {start}" if reader.line_num <= start else f"lines {start} to {reader.line_num}"
            why = str(error).replace("unexpected end of data", "a quoted field is not closed")
            why = why.replace("field larger than", "a quoted field is not closed, or longer than")
            raise UserError(
                f"{path}: {lines}: broken row: {why}; double the quotes inside a quoted field."
            ) from None
        if fields is None:
            return
        if any("\0" in field for field in fields):
            raise UserError(f"{path}: line {start}: holds a NUL byte; the file is damaged or not UTF-8 text.")
        seem_rows = len(taken) > 1 and all(line.count(delimiter) == len(fields) - 1 > 0 for line in taken)
        if seem_rows and len(taken) > 2:
            joined.append(f"lines {start} to {reader.line_num}")
        # Tab-separated files are often not quoted at all, and texts seldom contain tabs.
        if seem_rows and delimiter == "\t":
            raise UserError(
                f"{path}: lines {start} to {reader.line_num}: broken row: a quote opens a field that goes on "
                f"over {len(taken)} rows; double the quotes inside a field, and put it in quotes. Where "
                "the text does hold tabs and line breaks, save the file as csv or jsonl."
            )
        yield start, fields


def _with_blank_lines(records: Iterable[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
    """For a file with one column, in which a blank line between others is a row without text."""
    blank: list[int] = []
    for line, fields in records:
        if fields:
            yield from ((number, [""]) for number in blank)
            yield line, fields
            blank = []
        else:
            blank.append(line)


def _noted(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line


def _lines(text: IO[str], path: Path) -> Iterator[str]:
    """The lines of a text file; one that would fill the memory is not read."""
    number = 0
    while line := text.readline(LONGEST_TEXT + 1):
        number += 1
        if len(line) > LONGEST_TEXT:
            raise UserError(
                f"{path}: line {number}: is longer than {LONGEST_TEXT:,} characters; expected one row. Is it "
                "a text file with line breaks?"
            )
        yield line


def _csv_rows(
    records: Iterable[tuple[int, list[str]]], header: list[str], path: Path
) -> Iterator[dict[str, str]]:
    for line, fields in records:
        if not fields:
            continue  # a blank line
        if (
            len(header) > 1
            and fields[-1].strip() == header[-1]
            and [field.strip("\ufeff \t") for field in fields] == header
        ):
            raise UserError(
                f"{path}: line {line}: repeats the header; were several files joined? Delete the line."
            )
        if len(fields) != len(header):
            raise UserError(
                f"{path}: line {line}: found {len(fields)} fields, expected {len(header)} "
                f"({', '.join(header)}); quote a field that holds a delimiter or a line break."
            )
        yield dict(zip(header, fields, strict=True))


def _read_json(path: Path, errors: str) -> pa.Table:
    with _open(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", errors) as text:
        first = text.read(1)
        while first.isspace():
            first = text.read(1)
        text.seek(0)
        if first != "[":
            return gather(_json_lines(text, path), path)
        try:
            rows = json.load(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}: line {error.lineno}: broken JSON: {error.msg} (column {error.colno})."
            ) from None
        except UnicodeDecodeError:
            raise
        except ValueError:
            raise UserError(f"{path}: {TOO_LONG}") from None
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise UserError(
                    f"{path}: row {number}: found {type(row).__name__}, expected an object {{...}}."
                )
        return gather(iter(rows), path)


def _json_lines(text: IO[str], path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(text, path), start=1):
        if line.strip():
            try:
                row = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}: line {number}: broken JSON: {error.msg} (column {error.colno}); expected one "
                    "object {...} a line, or one array [...] of objects."
                ) from None
            except ValueError:
                raise UserError(f"{path}: line {number}: {TOO_LONG}") from None
            if not isinstance(row, dict):
                raise UserError(
                    f"{path}: line {number}: found {type(row).__name__}, expected an object {{...}}."
                )
            yield row


def _read_arrow(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        try:
            return pa.ipc.open_file(file).read_all()
        except pa.ArrowInvalid:  # the streaming format, which `datasets` writes
            file.seek(0)
            return pa.ipc.open_stream(file).read_all()


def _not_utf8(path: Path) -> str:
    """Where the first bytes that are not UTF-8 are; runs only after a read has failed."""
    number, error = next(lines_not_utf8(path), (0, None))
    if error is None:
        return "is not UTF-8"
    return f"line {number}: byte {error.start + 1} (0x{error.object[error.start]:02x}) is not UTF-8"


def lines_not_utf8(path: Path) -> Iterator[tuple[int, UnicodeDecodeError]]:
    """The numbers, from 1, of the lines of a text file that are not UTF-8, with the error in each."""
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                yield number, error
