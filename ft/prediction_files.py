"""Predictions as lines, and their jsonl, csv or parquet file: written incrementally, complete or absent."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ft.config import EvalConfig
from ft.errors import UserError
from ft.tasks.base import Task
from ft.tracking import to_json

GROUP_ROWS = 16_384  # of a parquet file, which are in memory at once
DELIMITER = "|"  # between the labels of a row in csv, unless the user sets another


def prediction_lines(
    rows: Any, columns: Any, task: Task, scores: np.ndarray, places: np.ndarray | None = None
) -> Iterator[dict[str, Any]]:
    """One object per row: row number, id if there is one, text (or both texts), label, prediction and
    probabilities.

    `scores` is (rows, targets), in the order of the encoded split, in which `places` names the rows; by
    default all of them, in the order of the source."""
    texts = [rows.table[name] for name in columns.texts]
    ids = rows.table[columns.id] if columns.id else None
    for place in np.argsort(rows.row, kind="stable") if places is None else places:
        line = {"row": int(rows.row[place])}
        if ids is not None:
            line[columns.id] = ids[int(place)].as_py()
        if len(texts) == 1:
            line["text"] = texts[0][int(place)].as_py()
        else:
            line |= {name: text[int(place)].as_py() for name, text in zip(columns.texts, texts, strict=True)}
        if rows.labels is not None:
            line["label"] = task.describe_target(rows.labels[place])
        yield line | task.describe_prediction(scores[place])


class PredictionFile(AbstractContextManager):
    """Takes the lines of `prediction_lines` in parts. The file gets its name when all are written; after an
    error nothing is left.

    jsonl has the lines as they are. csv and parquet have, instead of the probabilities, a column
    probability_LABEL for each label. csv quotes every field, so that no text breaks a line, and puts several
    labels in one field, joined by label_delimiter; parquet has them as lists, and one row group or more per
    part. `schema` is that of the encoded rows, for the types of copied columns. Raises `UserError` if nothing
    can be written, or a name or a label is in the way."""

    def __init__(self, folder: Path, config: EvalConfig, schema: Any) -> None:
        self.kind, self.delimiter = config.predictions_format, config.label_delimiter or DELIMITER
        self.path = folder / f"predictions.{self.kind}"
        made = ("label", "prediction")
        self.types = {field.name: field.type for field in schema if field.name not in made}
        self._temporary = folder / f".{self.path.name}.tmp"
        self._table: Any = None  # the csv or parquet writer, once there is a first line
        with self._complaints():
            if self.kind == "parquet":
                self._file: Any = open(self._temporary, "wb")
            else:
                self._file = open(self._temporary, "w", encoding="utf-8", newline="")

    def write(self, lines: Iterable[dict[str, Any]]) -> None:
        """Add some lines; each has the keys of the first."""
        with self._complaints():
            {"jsonl": self._write_jsonl, "csv": self._write_csv, "parquet": self._write_parquet}[self.kind](
                lines
            )

    def _write_jsonl(self, lines: Iterable[dict[str, Any]]) -> None:
        self._file.writelines(to_json(line, ensure_ascii=False) + "\n" for line in lines)

    def _write_csv(self, lines: Iterable[dict[str, Any]]) -> None:
        for line in lines:
            flat = _flat(line)
            if self._table is None:
                self._check_delimiter(line)
                self._table = csv.writer(self._file, quoting=csv.QUOTE_ALL, lineterminator="\n")
                self._table.writerow(flat)
            values = flat.values()
            self._table.writerow(self.delimiter.join(v) if isinstance(v, list) else v for v in values)

    def _write_parquet(self, lines: Iterable[dict[str, Any]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        flat = map(_flat, lines)
        while rows := list(islice(flat, GROUP_ROWS)):
            if self._table is None:
                types = {name: self.types.get(name, _type_of(value)) for name, value in rows[0].items()}
                self._table = pq.ParquetWriter(self._file, pa.schema(list(types.items())))
            self._table.write_table(pa.Table.from_pylist(rows, self._table.schema))

    def _check_delimiter(self, line: dict[str, Any]) -> None:
        odd = [name for name in line.get("probabilities", ()) if self.delimiter in name]
        if odd and isinstance(line["prediction"], list):
            raise UserError(
                f"predictions_format: the label {odd[0]!r} holds {self.delimiter!r}, which separates "
                "the labels of a row in csv; set another label_delimiter, or choose jsonl or parquet."
            )

    @contextmanager
    def _complaints(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror or error}.") from None

    def close(self) -> None:
        """Flush all of it to disk, which may be full: from then on, what it replaces may be removed."""
        with self._complaints():
            self._finish()

    def _finish(self) -> None:
        if self.kind == "parquet" and self._table is not None:
            self._table.close()
        self._file.close()

    def __exit__(self, kind: Any, *exc: Any) -> None:
        with self._complaints():
            try:
                self._finish()
                if kind is None:
                    self._temporary.replace(self.path)
            finally:
                self._temporary.unlink(missing_ok=True)


def _flat(line: dict[str, Any]) -> dict[str, Any]:
    """A line without the mapping of probabilities, which become columns."""
    flat = {name: value for name, value in line.items() if name != "probabilities"}
    for name, probability in line.get("probabilities", {}).items():
        column = f"probability_{name}"
        if column in flat:
            raise UserError(
                f"predictions_format: {column!r} is a column of the data and of the predictions; rename it, "
                "or choose jsonl."
            )
        flat[column] = probability
    return flat


def _type_of(value: Any) -> Any:
    """The Arrow type of a column whose first value this is."""
    import pyarrow as pa

    if isinstance(value, list):
        return pa.list_(pa.string())
    return pa.int64() if isinstance(value, int) else pa.float64() if isinstance(value, float) else pa.string()
