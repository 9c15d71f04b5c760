"""From a config to encoded splits, done once per machine: find, read, audit, split, encode, cache."""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ft.checkpoint import find_damage, write_manifest
from ft.data.audit import (
    WRITTEN,
    Columns,
    Scoring,
    choose_columns,
    choose_id,
    describe_rows,
    find_bad_rows,
    guess_label,
    has_labels,
    ids_of,
    joined_text,
    plain,
    shared_rows,
    unused_texts,
)
from ft.data.encode import EncodedRows, encode, labels_of
from ft.data.files import ONE_FILE_A_ROW
from ft.data.pieces import Cut
from ft.data.sources import Source, find_sources
from ft.data.split import sample, stratified
from ft.errors import UserError
from ft.options import DataOptions
from ft.tasks.base import Task

CACHE_VERSION = 8  # part of every key: raise it when what is written changes


@dataclass
class Data:
    """The encoded splits ("train", "validation", "test"; those that there are), and what is known of them.
    One that an evaluation asked for has no labels where no row of its source has one.

    `facts` has, for each split, rows, rows dropped by reason and labels; `notes` are the lines to tell the
    user; `fingerprint` stands for all that decided the encoding, `sources` for the bytes of each source."""

    splits: dict[str, EncodedRows]
    columns: Columns
    facts: dict[str, Any]
    notes: list[str]
    fingerprint: str
    sources: dict[str, str]


def prepare_data(
    options: DataOptions,
    task: Task,
    tokenizer: Any,
    max_length: int,
    progress: Callable,
    splits: tuple[str, ...] = (),
    scoring: Scoring | None = None,
) -> Data:
    """Read, audit and encode the data that the options name, or map what an earlier run has encoded.

    `splits` limits the work to some of them (all: train, validation, test). Without "train" the task must
    know its targets already. `scoring` is for the one split of an evaluation: its rows may have ids, and need
    no labels. One process of a machine does the work while the others wait for its lock, not
    in a collective that could time out. Raises `UserError` for whatever is wrong with the data."""
    sources = find_sources(options)
    if not splits and "train" not in sources:
        raise UserError(
            f"no training data: found {' and '.join(sources)} only; set train_file or train_split_name."
        )
    prints = {split: source.fingerprint() for split, source in sources.items()}
    folder = cache_root() / _key(options, task, tokenizer, max_length, prints, splits, scoring)
    if not options.overwrite_cache and (data := _open(folder, task)):
        return data
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            again = options.overwrite_cache and os.environ.get("LOCAL_RANK", "0") == "0"
            data = None if again else _open(folder, task)
            if data is None:
                _build(
                    folder, options, task, tokenizer, max_length, sources, prints, splits, scoring, progress
                )
                data = _open(folder, task)
    except OSError as error:
        raise UserError(
            f"the encoding cache {str(folder.parent)!r} cannot be written: {error}; set HF_HOME."
        ) from None
    assert data is not None
    return data


def _open(folder: Path, task: Task) -> Data | None:
    """What an earlier run has encoded; None where there is nothing, or nothing whole."""
    if find_damage(folder, "data.json"):
        return None
    try:
        known = json.loads((folder / "data.json").read_text())
        data = Data(
            splits={name: EncodedRows(folder / f"{name}.arrow") for name in known["splits"]},
            columns=Columns(tuple(known["columns"].pop("texts")), **known["columns"]),
            facts=known["facts"],
            notes=known["notes"],
            fingerprint=folder.name,
            sources=known["sources"],
        )
    except (OSError, ValueError, KeyError):  # pyarrow's complaint of a cut file is a ValueError
        return None
    task.load_state(known["task"])
    return data


def cache_root() -> Path:
    """Where encodings are kept: beside the caches of the other Hugging Face libraries (HF_HOME)."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"
    )
    return Path(home).expanduser() / "ft-encoded"


def _key(
    options: DataOptions, task: Task, tokenizer: Any, max_length: int, prints: dict, splits: tuple,
    scoring: Scoring | None,
) -> str:  # fmt: skip
    """A hash over all that decides the encoding: bytes of the data, tokenizer, options, targets known
    beforehand."""
    chosen = {name: getattr(options, name) for name in DataOptions.__annotations__ if name not in NOT_IN_KEY}
    parts = [CACHE_VERSION, *_identity(tokenizer), max_length, chosen, prints, splits]
    parts += [type(task).__name__, task.state(), *([vars(scoring)] if scoring else [])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:32]


def _identity(tokenizer: Any) -> list[Any]:
    """What makes a tokenizer cut texts as it does, but not where it lies."""
    known: dict[str, Any] = {}
    for name, value in tokenizer.init_kwargs.items():
        if name.endswith("_file"):
            known[name] = (
                value and Path(value).exists() and hashlib.sha256(Path(value).read_bytes()).hexdigest()
            )
        elif name not in ("name_or_path", "is_local", "local_files_only"):
            known[name] = value
    if not tokenizer.is_fast:
        return [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), known]
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()  # these two are set anew with every call
    backend.no_padding()
    return [type(tokenizer).__name__, backend.to_str(), known]


# What does not change the encoding; paths are left out because the bytes behind them are in the key.
NOT_IN_KEY = (
    "overwrite_cache preprocessing_num_workers dataloader_num_workers train_file validation_file test_file "
    "dataset_name max_length"
).split()


def _build(
    folder: Path,
    options: DataOptions,
    task: Task,
    tokenizer: Any,
    max_length: int,
    sources: dict[str, Source],
    prints: dict[str, str],
    splits: tuple[str, ...],
    scoring: Scoring | None,
    progress: Callable,
) -> None:
    tables, columns, facts, notes = _audited(options, task, sources, splits, scoring)
    is_pair = len(columns.texts) == 2
    least = tokenizer.num_special_tokens_to_add(pair=is_pair) + len(columns.texts)
    if max_length < least:
        raise UserError(
            f"max_length: found {max_length}, expected at least {least} tokens for a pair of texts with this "
            "tokenizer."
        )
    cut = Cut(max_length, options.long_text or "truncate", options.max_windows or 1)
    if is_pair and cut.long_text != "truncate":
        raise UserError(
            f"long_text: found {cut.long_text}, but a row has two texts ({', '.join(columns.texts)}), of "
            "which the longer one is truncated; leave it out, or name one column in text_column_names."
        )
    tokenizer = copy.deepcopy(
        tokenizer
    )  # encoding sets its truncation, which would be exported with the model
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with progress(total=sum(t.num_rows for t in tables.values()), desc="encode", unit="rows") as bar:
            for name, table in tables.items():
                path = temporary / f"{name}.arrow"
                encode(table, columns, tokenizer, cut, path, options.preprocessing_num_workers, bar)
        state = {
            "splits": list(tables),
            "columns": vars(columns),
            "facts": facts,
            "notes": notes,
            "sources": prints,
            "task": task.state(),
        }
        (temporary / "data.json").write_text(json.dumps(state))
        write_manifest(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _audited(
    options: DataOptions, task: Task, sources: dict[str, Source], splits: tuple[str, ...],
    scoring: Scoring | None,
) -> tuple[dict[str, pa.Table], Columns, dict[str, Any], list[str]]:  # fmt: skip
    """The usable rows of every split, with the columns row, label (as numbers), the texts and the id."""
    read: dict[str, pa.Table] = {}
    if scoring and splits[0] in sources:
        split = splits[0]
        read[split] = sources[split].read()
        label = options.label_column_name or guess_label(read[split])
        twice = label is not None and read[split].column_names.count(label) > 1  # refused further down
        if label is None or not (twice or has_labels(read[split], label)):
            return _unlabelled(options, scoring, read.pop(split), label, split)
    learns = not task.has_targets
    ids: dict[str, str] = {}
    notes: list[str] = []
    facts: dict[str, Any] = {}
    tables: dict[str, pa.Table] = {}
    columns: Columns | None = None
    for split, source in sources.items():
        if splits == ("test",) and split != "test" and "test" in sources:
            continue  # nothing changes a test split that was given; the others may depend on one another
        raw = read.pop(split) if split in read else source.read()
        if split == "test" and not splits and columns and not has_labels(raw, columns.label):
            notes.append(f"test: no row has a label (column {columns.label!r}), so it is not scored")
            continue
        texts = columns.texts if columns else _texts(options, scoring, raw)
        is_first = columns is None
        label = columns.label if columns else options.label_column_name
        # Of the split that is scored, or the one that it is set aside from.
        if scoring and split == (splits[0] if splits[0] in sources else "train"):
            used = [*texts, *filter(None, [label or guess_label(raw)])]
            ids[split] = choose_id(raw, scoring.id, used, split)
        columns = choose_columns(raw, texts, label, split, id_column=ids.get(split, ""))
        others = unused_texts(raw, columns) if is_first and not texts else []
        if others:
            notes.append(_unused_note(columns, others))
        raw = plain(raw, columns)
        field, names = raw.schema.field(columns.label), source.class_names.get(columns.label)
        if split == "train" and learns:
            notes += task.choose_kind(raw[columns.label], field, names)
        keep, facts[split] = usable_rows(options, raw, columns, split, notes, task.blank_is_a_target)
        targets = raw[columns.label].take(keep)
        if split == "train" and learns:
            notes += task.learn_targets(targets, field, keep, names)
        tables[split] = pa.table(
            {name: raw[name].take(keep) for name in columns.texts}
            | {"row": keep, "label": task.encode_targets(targets, field, keep, split, names)}
            | ({columns.id: ids_of(raw, columns).take(keep)} if columns.id else {})
        )
    assert columns is not None
    columns = replace(columns, id=next(iter(ids.values()), ""))
    _set_aside(options, task, tables, facts, notes)
    tables = {split: tables[split] for split in ("train", "validation", "test") if split in tables}
    _drop_shared(options, tables, columns, facts, notes)
    for split in splits:
        if split not in tables:
            raise UserError(f"split: the data holds no {split} rows; it has {', '.join(tables)}.")
    limits = {"train": options.max_train_samples, "validation": options.max_eval_samples}
    for split in list(tables):
        if splits and split not in splits:
            del tables[split]
            continue
        most = limits.get(split, options.max_predict_samples)
        if most and most < tables[split].num_rows:
            notes.append(f"{split}: a sample of {most:,} of {tables[split].num_rows:,} rows")
            tables[split] = tables[split].take(sample(tables[split].num_rows, most))
        facts[split]["rows"] = tables[split].num_rows
    if learns:
        task.fit(labels_of(tables["train"]))
    return tables, columns, facts, notes


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
    others = [] if texts else unused_texts(raw, columns)
    if others:
        notes.append(_unused_note(columns, others))
    ids = ids_of(raw, columns) if columns.id else None
    raw = plain(raw.select(list(columns.texts)), columns)
    keep, facts = usable_rows(options, raw, columns, split, notes, blank_is_a_label=False)
    most = options.max_eval_samples if split == "validation" else options.max_predict_samples
    most = options.max_train_samples if split == "train" else most
    if most and most < len(keep):
        notes.append(f"{split}: a sample of {most:,} of {len(keep):,} rows")
        keep = keep[np.sort(sample(len(keep), most))]
    if len(keep) < raw.num_rows:
        raw, ids = raw.take(keep), None if ids is None else ids.take(keep)
    table = raw.append_column("row", pa.array(keep))
    if ids is not None:
        table = table.append_column(columns.id, ids)
    return {split: table}, columns, {split: {**facts, "rows": len(keep)}}, notes


def _texts(options: DataOptions, scoring: Scoring | None, raw: pa.Table) -> tuple[str, ...]:
    """The text columns that the user named, or that the model was trained on, if these are there; else
    none."""
    trained_on = scoring.texts if scoring and set(scoring.texts) <= set(raw.column_names) else ()
    texts = tuple(options.text_columns) or trained_on
    taken = [name for name in texts if scoring and len(texts) == 2 and name in WRITTEN]
    if taken:
        raise UserError(
            f"text_column_names: {taken[0]!r} is the name of another column of the predictions; rename it."
        )
    return texts


def _unused_note(columns: Columns, others: list[str]) -> str:
    return (
        f"the text is the column {columns.texts[0]!r}; not used: {', '.join(map(repr, others))}; "
        "text_column_names chooses another, or two for a pair"
    )


def usable_rows(
    options: DataOptions,
    raw: pa.Table,
    columns: Columns,
    split: str,
    notes: list[str],
    blank_is_a_label: bool,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Numbers of the rows that can be used, and how many cannot for which reason. Raises `UserError` for bad
    rows, unless they are to be dropped."""
    bad = find_bad_rows(raw, columns, blank_is_a_label)
    rows = np.unique(np.concatenate([*bad.values(), np.zeros(0, np.int64)])).astype(np.int64)
    if len(rows) and options.on_bad_rows == "error":
        files = raw["file"] if raw.schema.metadata == ONE_FILE_A_ROW else None
        reasons = "; ".join(f"{reason}: {describe_rows(where, files)}" for reason, where in bad.items())
        raise UserError(
            f"{split} data: {len(rows):,} of {raw.num_rows:,} rows cannot be used: {reasons}; rows count "
            "from 0. Mend them, or set on_bad_rows: drop."
        )
    if len(rows) == raw.num_rows:
        raise UserError(f"{split} data: none of its {raw.num_rows:,} rows can be used: {', '.join(bad)}.")
    if len(rows):
        reasons = ", ".join(f"{reason}: {len(where):,}" for reason, where in bad.items())
        notes.append(f"{split}: dropped {len(rows):,} of {raw.num_rows:,} rows ({reasons})")
    dropped = {reason: len(where) for reason, where in bad.items()}
    return np.setdiff1d(np.arange(raw.num_rows), rows), {"dropped": dropped}


def _set_aside(
    options: DataOptions, task: Task, tables: dict[str, pa.Table], facts: dict, notes: list[str]
) -> None:
    """Draw a validation split, and a test split if asked for, from the training rows, where there is none."""
    percentages = {"validation": options.validation_split_percentage, "test": options.test_split_percentage}
    percentages = {split: share for split, share in percentages.items() if share and split not in tables}
    if "train" not in tables or not percentages:
        return
    train = tables.pop("train")
    for split, rows in stratified(task.strata(labels_of(train)), percentages).items():
        tables[split] = train.take(rows)
        if split != "train":
            facts.setdefault(split, {})
            if not len(rows):
                classes = len(train["label"].unique())
                why = "each is the only one of its class; " if classes == train.num_rows else "raise it, "
                raise UserError(
                    f"{split}_split_percentage: {percentages[split]:g} percent of {train.num_rows} training "
                    f"rows of {classes} classes is no row at all; {why}give {split}_file, or set it to 0."
                )
    sizes = ", ".join(f"{split} {tables[split].num_rows:,}" for split in percentages)
    notes.append(f"set aside from the training rows, stratified by label: {sizes}")


def _drop_shared(options: DataOptions, tables: dict, columns: Columns, facts: dict, notes: list[str]) -> None:
    """Count texts that stand more than once; drop from training those of an evaluation split if asked to."""
    rows = sum(table.num_rows for table in tables.values())
    texts = pa.chunked_array([part for t in tables.values() for part in joined_text(t, columns).chunks])
    copies = rows - len(texts.unique())
    if copies and len(tables) > 1:
        notes.append(
            f"{copies:,} of {rows:,} rows repeat the text of an earlier one, in their split or another"
        )
    for split in ("test", "validation"):
        for other in ("validation", "train") if split == "test" else ("train",):
            if split not in tables or other not in tables:
                continue
            rows = shared_rows(tables[other], [tables[split]], columns)
            facts[other][f"shared_with_{split}"] = len(rows)
            if len(rows) and options.on_duplicates == "drop":
                tables[other] = tables[other].take(np.setdiff1d(np.arange(tables[other].num_rows), rows))
                notes.append(f"{other}: dropped {len(rows):,} rows whose text is in {split}, too")
            elif len(rows):
                notes.append(
                    f"WARNING {other}: {len(rows):,} rows have a text that is in {split}, too; "
                    "on_duplicates: drop takes them out"
                )
            if other in tables and tables[other].num_rows == 0:
                raise UserError(f"{other} data: every row's text is in {split}, too; nothing is left.")
    for split, table in tables.items():
        count = table.num_rows - len(joined_text(table, columns).unique())
        facts[split]["repeated_texts"] = count
        if count:
            notes.append(f"{split}: {count:,} rows repeat the text of another row of it")
