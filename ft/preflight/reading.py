"""Reads the data as training would, but continues where training would stop: every fault is found."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ft.config import Config, EvalConfig
from ft.data.audit import chosen, find_bad_rows, has_labels, joined_text
from ft.data.columns import Columns, choose_columns, plain
from ft.data.encode import labels_of
from ft.data.files import TEXT_FORMATS, format_of, lines_not_utf8, read_table
from ft.data.sources import Source, find_sources
from ft.data.usable import usable_rows
from ft.errors import UserError
from ft.preflight.findings import Findings
from ft.preflight.rows import EXAMPLES, Rows
from ft.tasks.base import Task
from ft.values import first_of

MOST_VALUES = 1000  # distinct labels that are tried one by one


@dataclass
class ReadSplit:
    """`table` has the usable rows, `bad` the numbers of the others by reason. `labels` are None if the task
    cannot encode them; `unknown` are the labels that it does not know."""

    table: pa.Table
    row: np.ndarray
    columns: Columns
    read: int
    bad: dict[str, np.ndarray]
    labels: np.ndarray | None
    unknown: list[Any]

    def rows(self) -> Rows:
        """The usable rows for the audit."""
        return Rows(joined_text(self.table, self.columns), self.row, self.labels)

    def facts(self) -> dict[str, Any]:
        """Rows as read, and the bad ones with the first row numbers."""
        bad = {
            reason: {"rows": len(rows), "first": rows[:EXAMPLES].tolist()}
            for reason, rows in self.bad.items()
        }
        return {"read": self.read, "bad": bad}


def read_splits(config: Config, task: Task, findings: Findings) -> dict[str, ReadSplit]:
    """All splits that can be read; the task learns its targets from the training rows. What is wrong goes to
    `findings`."""
    sources = _sources(config, findings)
    if "train" not in sources and not findings.blocking_topics():
        findings.block("data", f"no training data: found {' and '.join(sources)} only.")
    splits: dict[str, ReadSplit] = {}
    columns: Columns | None = None
    for name in [split for split in ("train", "validation", "test") if split in sources]:
        try:
            table = _read(sources[name], findings)
            if name == "test" and columns and not has_labels(table, columns.label, task):
                continue  # it is not scored
            given = columns or Columns(tuple(config.text_columns), config.label_column_name or "")
            columns = choose_columns(table, given.texts, given.label or None, name)
            splits[name] = _split(config, task, sources[name], plain(table, columns), columns, findings)
        except UserError as error:
            findings.block("data", str(error))
    return splits


def _sources(config: Config, findings: Findings) -> dict[str, Source]:
    """The splits that can be found; each option that names data is tried by itself, so that a wrong one does
    not hide faults of the others."""
    sources: dict[str, Source] = {}
    for name in EvalConfig.DATA:  # all that may name data; files take precedence over the data set
        if getattr(config, name):
            others: dict[str, Any] = dict.fromkeys(set(EvalConfig.DATA) - {name})
            try:
                sources |= find_sources(replace(config, **others))
            except UserError as error:
                findings.block("data", str(error))
    return sources


def _read(source: Source, findings: Findings) -> pa.Table:
    """The table of a source. If a text file is not UTF-8, all such lines are named, and it is read
    anyway."""
    try:
        return source.read()
    except UserError:
        path = source.files[0] if len(source.files) == 1 else Path()
        try:
            lines = [number for number, _ in lines_not_utf8(path)] if format_of(path) in TEXT_FORMATS else []
        except (OSError, EOFError, zlib.error):  # what is wrong with it is in the error above
            lines = []
        if not lines:
            raise
    first = [*map(str, lines[:EXAMPLES])]
    findings.block(
        "not_utf8",
        f"{path}: {len(lines):,} line{'s are' if len(lines) > 1 else ' is'} not UTF-8: "
        f"{first_of(len(lines), first)}; save the file as UTF-8.",
    )
    return read_table(path, errors="replace")


def _split(
    config: Config, task: Task, source: Source, raw: pa.Table, columns: Columns, findings: Findings
) -> ReadSplit:
    name, column, field = source.name, raw[columns.label], raw.schema.field(columns.label)
    names = source.class_names.get(columns.label)
    try:
        if name == "train":
            task.choose_kind(column, field, names)
    except UserError as error:
        findings.block("labels", str(error))
    has_kind = bool(task.state())
    bad = find_bad_rows(raw, columns, has_kind and task.blank_is_a_target)
    keep = _keep(config, raw, columns, name, has_kind and task.blank_is_a_target, findings)
    labels, unknown = None, []
    targets = column.take(pa.array(keep))
    try:
        if name == "train" and has_kind and len(keep):
            task.learn_targets(targets, field, keep, names)
        if task.has_targets and len(keep):
            encoded = task.encode_targets(targets, field, keep, name, names)
            labels = labels_of(pa.table({"label": encoded}))
    except UserError as error:
        findings.block("labels", str(error))
        if task.has_targets:
            unknown = _unknown(task, targets, field, keep, name, names)
    texts = chosen(raw.select(list(columns.texts)), keep)
    return ReadSplit(texts, keep, columns, raw.num_rows, bad, labels, unknown)


def _keep(
    config: Config, raw: pa.Table, columns: Columns, split: str, blank_is_a_target: bool, findings: Findings
) -> np.ndarray:
    """The numbers of the usable rows; unusable ones are a finding, as on_bad_rows says."""
    for mode in dict.fromkeys((config.on_bad_rows, "drop")):
        notes: list[str] = []
        options = replace(config, on_bad_rows=mode)
        try:
            keep, _ = usable_rows(options, raw, columns, split, notes, blank_is_a_target)
        except UserError as error:
            findings.block("bad_rows" if mode == "error" else "data", str(error))
            continue
        for note in notes if mode == config.on_bad_rows else ():
            findings.warn("bad_rows", note)
        return keep
    return np.zeros(0, np.int64)


def _unknown(
    task: Task,
    targets: pa.ChunkedArray,
    field: pa.Field,
    rows: np.ndarray,
    split: str,
    names: list[str] | None,
) -> list[Any]:
    """The labels that cannot be encoded, each tried by itself."""
    unknown = []
    first = {repr(value): place for place, value in reversed(list(enumerate(targets.to_pylist())))}
    for place in sorted(first.values())[:MOST_VALUES]:
        try:
            task.encode_targets(targets.slice(place, 1), field, rows[place : place + 1], split, names)
        except UserError:
            value = targets[place].as_py()
            unknown.append(value if isinstance(value, str | int | float | list) else str(value))
    return unknown
