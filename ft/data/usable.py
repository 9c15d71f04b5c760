"""From sources to the usable rows of every split: columns, bad rows, held-out splits, duplicates, samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from ft.data.audit import (
    chosen,
    describe_rows,
    find_bad_rows,
    has_labels,
    joined_rows,
    shared_rows,
    text_marks,
)
from ft.data.columns import (
    Columns,
    Scoring,
    choose_columns,
    choose_id,
    guess_label,
    ids_of,
    plain,
    unused_texts,
)
from ft.data.encode import labels_of
from ft.data.files import ONE_FILE_A_ROW
from ft.data.sources import Source
from ft.data.split import sample, stratified
from ft.errors import UserError
from ft.options import DataOptions
from ft.tasks.base import Task
from ft.values import first_of


def usable_splits(
    options: DataOptions, task: Task, sources: dict[str, Source], only: str | None, scoring: Scoring | None
) -> tuple[dict[str, pa.Table], Columns, dict[str, Any], list[str]]:
    """The usable rows of every split, with the columns row, label (as numbers), the texts and the id; which
    columns those are; facts about each split; and the notes for the user. A task that does not know its
    targets yet learns them here."""
    read: dict[str, pa.Table] = {}
    if scoring and only in sources:
        read[only] = sources[only].read()
        label = _label(options, scoring, read[only])
        if label is None or not has_labels(read[only], label, task):
            return _unlabelled(options, scoring, read.pop(only), label, only)
    learns = not task.has_targets
    ids: dict[str, str] = {}
    notes: list[str] = []
    facts: dict[str, Any] = {}
    tables: dict[str, pa.Table] = {}
    columns: Columns | None = None
    for split, source in sources.items():
        if only == "test" and split != "test" and "test" in sources:
            continue  # a given test split is not changed by others; the others may depend on one another
        raw = read.pop(split) if split in read else source.read()
        if split == "test" and only != "test" and columns and not has_labels(raw, columns.label, task):
            if only is None:
                notes.append(f"test: no row has a label (column {columns.label!r}), so it is not scored")
            continue
        notes += joined_rows(raw, split)
        is_first = columns is None
        if columns:
            texts, label = columns.texts, columns.label
        elif scoring:
            texts, label = _texts(options, scoring, raw), _label(options, scoring, raw)
        else:
            texts, label = tuple(options.text_columns), options.label_column_name
        # For the split that is scored, or the one that it is set aside from.
        if scoring and split == (only if only in sources else "train"):
            used = [*texts, *filter(None, [label])]
            ids[split] = choose_id(raw, scoring.id, used, split)
        columns = choose_columns(raw, texts, label, split, id_column=ids.get(split, ""))
        if is_first and scoring:
            notes += [*_text_notes(options, scoring, columns), *_label_notes(options, scoring, label)]
        others = unused_texts(raw, columns) if is_first and not texts else []
        if others:
            notes.append(_unused_note(columns, others))
        raw = plain(raw, columns)
        field, names = raw.schema.field(columns.label), source.class_names.get(columns.label)
        if split == "train" and learns:
            notes += task.choose_kind(raw[columns.label], field, names)
        keep, facts[split] = usable_rows(options, raw, columns, split, notes, task.blank_is_a_target)
        kept = chosen(raw.select([*columns.texts, columns.label]), keep)
        targets = kept[columns.label]
        if split == "train" and learns:
            notes += task.learn_targets(targets, field, keep, names)
        tables[split] = pa.table(
            {name: kept[name] for name in columns.texts}
            | {"row": keep, "label": task.encode_targets(targets, field, keep, split, names)}
            | ({columns.id: ids_of(raw, columns).take(keep)} if columns.id else {})
        )
        if split == "validation" and learns:
            _check_learned(task, labels_of(tables["train"]), labels_of(tables[split]), keep)
        del raw, kept, targets  # columns that are not used, and rows that were dropped
    assert columns is not None
    columns = replace(columns, id=next(iter(ids.values()), ""))
    if only is None:  # an evaluation takes the share of its run
        notes += _share_notes(options, tables)
    _set_aside(options, task, tables, facts, notes)
    tables = {split: tables[split] for split in ("train", "validation", "test") if split in tables}
    _drop_shared(options, tables, columns, facts, notes)
    if only is not None and only not in tables:
        raise UserError(f"split: the data holds no {only} rows; it has {', '.join(tables)}.")
    for split in list(tables):
        if only not in (None, split):
            del tables[split]
            continue
        drawn = _sampled(options, split, tables[split].num_rows, notes)
        if len(drawn) < tables[split].num_rows:
            tables[split] = chosen(tables[split], np.sort(drawn)).take(np.argsort(np.argsort(drawn)))
        facts[split]["rows"] = len(drawn)
    if learns:
        learned = labels_of(tables["train"])
        for split in (name for name in tables if name != "train"):
            unlearned = task.unlearned(learned, labels_of(tables[split]))
            if unlearned:
                first = [f"{name!r} ({rows:,})" for name, rows in unlearned.items()][:5]
                notes.append(
                    f"WARNING {split}: has labels that no training row has, so they can hardly be "
                    f"predicted (rows in brackets): {first_of(len(unlearned), first)}"
                )
        task.fit(learned)
    return tables, columns, facts, notes


def _check_learned(task: Task, learned: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> None:
    """Refuse validation labels, named by a ClassLabel, that no training row has, just as unnamed ones. `rows`
    are the numbers of the rows."""
    for name in task.unlearned(learned, labels):
        label = task.state()["label_names"].index(name)
        has = labels == label if labels.ndim == 1 else labels[:, label] != 0
        raise UserError(
            f"validation data: {describe_rows(rows[has])}: found the label {name!r}, which no training row "
            "has; rows count from 0. Fix the label, or add training rows that have it."
        )


def _unlabelled(
    options: DataOptions, scoring: Scoring, raw: pa.Table, label: str | None, split: str
) -> tuple[dict[str, pa.Table], Columns, dict[str, Any], list[str]]:
    """The same for a split without labels, in the order of its source."""
    texts = _texts(options, scoring, raw)
    used = [*texts, *([label] if label and label in raw.column_names else [])]
    id_column = choose_id(raw, scoring.id, used, split)
    columns = choose_columns(raw, texts, label, split, is_labelled=False, id_column=id_column)
    named = f" (column {label!r})" if label else ""
    notes = [f"{split}: no row has a label{named}, so its rows are predicted and not scored"]
    notes += [*joined_rows(raw, split), *_text_notes(options, scoring, columns)]
    others = [] if texts else unused_texts(raw, columns)
    if others:
        notes.append(_unused_note(columns, others))
    ids = ids_of(raw, columns) if columns.id else None
    raw = plain(raw, columns)
    keep, facts = usable_rows(options, raw, columns, split, notes, blank_is_a_target=False)
    raw = raw.select(list(columns.texts))
    keep = keep[np.sort(_sampled(options, split, len(keep), notes))]
    if len(keep) < raw.num_rows:
        raw, ids = chosen(raw, keep), None if ids is None else ids.take(keep)
    table = raw.append_column("row", pa.array(keep))
    if ids is not None:
        table = table.append_column(columns.id, ids)
    return {split: table}, columns, {split: {**facts, "rows": len(keep)}}, notes


def _sampled(options: DataOptions, split: str, count: int, notes: list[str]) -> np.ndarray:
    """The places of the rows of a split that its sample takes; all `count` places without a sample."""
    limits = {"train": options.max_train_samples, "validation": options.max_eval_samples}
    most = limits.get(split, options.max_predict_samples)
    if most and most < count:
        notes.append(f"{split}: a sample of {most:,} of {count:,} rows")
    return sample(count, most or None)


def _texts(options: DataOptions, scoring: Scoring, raw: pa.Table) -> tuple[str, ...]:
    """The text columns that the user named, or that the model was trained on, if these are there; else
    none."""
    if options.text_columns:
        return tuple(options.text_columns)
    missing = [name for name in scoring.texts if name not in raw.column_names]
    if missing and len(scoring.texts) > 1:
        raise UserError(
            f"text_column_names: the model was trained on {' and '.join(map(repr, scoring.texts))}, but the "
            f"data has no column {missing[0]!r}; its columns: {', '.join(map(repr, raw.column_names))}. Name "
            "the two here."
        )
    return () if missing else scoring.texts


def _label(options: DataOptions, scoring: Scoring, raw: pa.Table) -> str | None:
    """The label column that the user named, or that the model was trained on, if it exists; else a guess, if
    any."""
    known = scoring.label if scoring.label in raw.column_names else None
    return options.label_column_name or known or guess_label(raw)


def _text_notes(options: DataOptions, scoring: Scoring, columns: Columns) -> list[str]:
    """Notes for the user about a text column that nobody named."""
    if not scoring.texts or options.text_columns or columns.texts == scoring.texts:
        return []
    return [
        f"WARNING text_column_names: the model was trained on the column {scoring.texts[0]!r}, which the "
        f"data lacks, and reads {columns.texts[0]!r}; name the column"
    ]


def _label_notes(options: DataOptions, scoring: Scoring, label: str | None) -> list[str]:
    """The same about a label column."""
    if not scoring.label or label in (scoring.label, options.label_column_name):
        return []
    return [
        f"WARNING label_column_name: the model was trained on the column {scoring.label!r}, which the data "
        f"lacks, and is scored by {label!r}; name the column, or {scoring.label!r} to predict only"
    ]


def _unused_note(columns: Columns, others: list[str]) -> str:
    return (
        f"the text is the column {columns.texts[0]!r}, and not {', '.join(map(repr, others))}; "
        "text_column_names chooses another, or two for a pair"
    )


def usable_rows(
    options: DataOptions,
    raw: pa.Table,
    columns: Columns,
    split: str,
    notes: list[str],
    blank_is_a_target: bool,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Numbers of the usable rows, and how many are unusable, by reason. Raises `UserError` for bad rows,
    unless they are to be dropped."""
    bad = find_bad_rows(raw, columns, blank_is_a_target)
    rows = np.unique(np.concatenate([*bad.values(), np.zeros(0, np.int64)])).astype(np.int64)
    if len(rows) and options.on_bad_rows == "error":
        files = raw["file"] if raw.schema.metadata == ONE_FILE_A_ROW else None
        reasons = "; ".join(f"{reason}: {describe_rows(where, files)}" for reason, where in bad.items())
        raise UserError(
            f"{split} data: {len(rows):,} of {raw.num_rows:,} rows cannot be used: {reasons}; rows count "
            "from 0. Fix them, or set on_bad_rows: drop."
        )
    if len(rows) == raw.num_rows:
        raise UserError(f"{split} data: none of its {raw.num_rows:,} rows can be used: {', '.join(bad)}.")
    if len(rows):
        reasons = ", ".join(f"{reason}: {len(where):,}" for reason, where in bad.items())
        notes.append(f"{split}: dropped {len(rows):,} of {raw.num_rows:,} rows ({reasons})")
    dropped = {reason: len(where) for reason, where in bad.items()}
    return np.setdiff1d(np.arange(raw.num_rows), rows), {"dropped": dropped}


def _share_notes(options: DataOptions, tables: dict[str, pa.Table]) -> list[str]:
    """Notes for a user who asked for a share of the training rows as a split that the data already has."""
    splits = [split for split in ("validation", "test") if split in tables]
    asked = {split: getattr(options, f"{split}_split_percentage") for split in splits}
    return [
        f"{split}_split_percentage: the data has {split} rows of its own; nothing is set aside"
        for split, share in asked.items()
        if share not in (0, getattr(DataOptions, f"{split}_split_percentage"))
    ]


def _set_aside(
    options: DataOptions, task: Task, tables: dict[str, pa.Table], facts: dict, notes: list[str]
) -> None:
    """Draw a validation split, and a test split if asked for, from the training rows, where there is none."""
    percentages = {"validation": options.validation_split_percentage, "test": options.test_split_percentage}
    percentages = {split: share for split, share in percentages.items() if share and split not in tables}
    if "train" not in tables or not percentages:
        return
    train = tables.pop("train")
    strata = task.strata(labels_of(train))
    for split, rows in stratified(strata, percentages).items():
        tables[split] = chosen(train, rows)
        if split != "train":
            facts.setdefault(split, {})
            if not len(rows):
                classes = len(np.unique(strata))
                why = "each is the only one of its class; " if classes == train.num_rows else "raise it, "
                raise UserError(
                    f"{split}_split_percentage: {percentages[split]:g} percent of {train.num_rows} training "
                    f"rows of {classes} classes gives no row; {why}give {split}_file, or set it to 0."
                )
    sizes = ", ".join(f"{split} {tables[split].num_rows:,}" for split in percentages)
    notes.append(f"set aside from the training rows, stratified by label: {sizes}")


def _drop_shared(options: DataOptions, tables: dict, columns: Columns, facts: dict, notes: list[str]) -> None:
    """Count texts that occur more than once. If asked to, drop from training those of an evaluation split,
    and from validation those of the test split."""
    marks = {split: text_marks(table, columns) for split, table in tables.items()}
    all_marks = pa.chunked_array([part for of_split in marks.values() for part in of_split.chunks])
    copies = len(all_marks) - len(all_marks.unique())
    if copies and len(tables) > 1:
        notes.append(
            f"{copies:,} of {len(all_marks):,} rows repeat the text of an earlier one, in their split or "
            "another"
        )
    for split in ("test", "validation"):
        for other in ("validation", "train") if split == "test" else ("train",):
            if split not in tables or other not in tables:
                continue
            rows = shared_rows(marks[other], marks[split])
            facts[other][f"shared_with_{split}"] = len(rows)
            if len(rows) and options.on_duplicates == "drop":
                kept = np.setdiff1d(np.arange(tables[other].num_rows), rows)
                tables[other], marks[other] = chosen(tables[other], kept), marks[other].take(kept)
                notes.append(f"{other}: dropped {len(rows):,} rows whose text is in {split}, too")
            elif len(rows):
                notes.append(
                    f"WARNING {other}: {len(rows):,} rows have a text that is in {split}, too; "
                    "on_duplicates: drop takes them out"
                )
            if tables[other].num_rows == 0:
                raise UserError(f"{other} data: every row's text is in {split}, too; nothing is left.")
    for split, table in tables.items():
        count = table.num_rows - len(marks[split].unique())
        facts[split]["repeated_texts"] = count
        if count:
            notes.append(f"{split}: {count:,} rows repeat the text of another row of it")
