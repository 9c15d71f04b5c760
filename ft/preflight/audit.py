"""The audit of the data: reads, encodes and checks every row, in a process of its own.

A process of its own, because the memory and imports of an audit are no part of the run whose memory is to be
measured. It leaves the encoded texts in the cache, where the run finds them."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ft.config import Config
from ft.data.split import sample
from ft.errors import UserError
from ft.preflight.findings import Findings
from ft.preflight.near import near_copies, sample_note
from ft.preflight.rows import Rows

if TYPE_CHECKING:
    from ft.data.prepare import Data
    from ft.preflight.reading import ReadSplit

CUT_SHARE = 0.01  # of the training rows; above it, there is a warning


def audit_apart(config: Config) -> tuple[dict[str, Any], Findings]:
    """`audit`, in a process that ends with it. Raises `UserError` if that is killed."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        try:
            return pool.submit(audit, config).result()
        except (BrokenProcessPool, MemoryError):
            raise UserError(
                "preflight: the process that looks at the data was killed, most often because the host ran "
                "out of memory: it holds all texts. Give it more, or try it on a file of fewer rows."
            ) from None


def audit(config: Config) -> tuple[dict[str, Any], Findings]:
    """What is known about the data, as JSON: rows, labels, copies, near_copies, conflicts, tokens, floors and
    notes; and what was found wrong. What could not be determined because of a fault is left out of the
    first."""
    from ft.preflight.duplicates import exact_copies, label_conflicts
    from ft.preflight.floors import floors
    from ft.preflight.labels import label_facts
    from ft.preflight.lengths import token_lengths
    from ft.preflight.reading import read_splits
    from ft.preflight.rows import different_texts
    from ft.tasks import build_task

    findings = Findings()
    task = build_task(config)
    read = read_splits(config, task, findings)
    tokenizer, max_length = _tokenizer(config, findings)
    splits = {name: split.rows() for name, split in read.items() if len(split.row)}
    rows = {name: split.facts() for name, split in read.items()}
    report: dict[str, Any] = {"rows": rows, "notes": [], "sources": {}}
    if tokenizer is not None and (data := _prepared(config, tokenizer, max_length, findings)):
        splits = {name: _rows_of(data, name) for name in data.splits}
        report |= {"notes": data.notes, "sources": data.sources}
        for name, known in data.facts.items():
            rows.setdefault(name, {"read": None, "bad": {}}).update(known)
    elif tokenizer is not None:
        splits = {name: replace(kept, tokens=_tokens(read[name], tokenizer)) for name, kept in splits.items()}
    for name, kept in splits.items():
        rows[name]["used"] = len(kept)
    if splits:
        texts = different_texts(splits)
        report["copies"] = exact_copies(texts, splits)
        report["near_copies"] = near_copies(texts, splits)
        report["conflicts"] = label_conflicts(texts, splits, task.describe_target)
    if splits and tokenizer is not None:
        report["tokens"] = token_lengths(splits, max_length)
    if splits and task.has_targets:
        kind, names = task.state()["problem_type"], task.state()["label_names"]
        report["labels"] = label_facts(kind, names, splits, findings)
        report["labels"]["unknown"] = {name: split.unknown for name, split in read.items() if split.unknown}
        train, scored = (_labelled(splits, name) for name in ("train", "validation"))
        if train and scored:
            report["floors"] = {"headline": list(task.headline), **floors(kind, names, train, scored)}
    is_pair = any(len(split.columns.texts) == 2 for split in read.values())
    _warn(report, findings)
    _warn_of_cuts(report, config, is_pair, findings)
    return report, findings


def _tokenizer(config: Config, findings: Findings) -> tuple[Any, int]:
    """The run's tokenizer and its max_length; None and 0 if there is a fault."""
    from ft.pretrained import load_model_config, load_tokenizer, longest_text

    try:
        model_config = load_model_config(config)
        tokenizer = load_tokenizer(config, model_config)
        return tokenizer, longest_text(config.max_length, tokenizer, model_config)
    except UserError as error:
        findings.block("model", str(error))
        return None, 0


def _prepared(config: Config, tokenizer: Any, max_length: int, findings: Findings) -> Data | None:
    """The rows as training gets them: set aside, sampled, without those that are dropped. None if the data
    has faults that cannot be dropped."""
    from ft.data.prepare import prepare_data
    from ft.report import progress_bar
    from ft.tasks import build_task

    options, blocking = config, findings.blocking_topics()
    if blocking == {"bad_rows"}:
        options = replace(config, on_bad_rows="drop")
    elif blocking:
        return None
    bar = partial(progress_bar, True, leave=False)
    try:
        return prepare_data(options, build_task(config), tokenizer, max_length, bar)
    except UserError as error:
        findings.block("data", str(error))
        return None


def _rows_of(data: Data, split: str) -> Rows:
    from ft.data.audit import joined_text

    encoded = data.splits[split]
    texts = joined_text(encoded.table, data.columns)
    return Rows(texts, encoded.row, encoded.labels, encoded.full_lengths, encoded.cut)


def _tokens(split: ReadSplit, tokenizer: Any) -> np.ndarray:
    """(rows,) lengths in tokens of rows that could not be encoded for training."""
    lengths: list[int] = []
    for batch in split.table.to_batches(max_chunksize=4096):
        texts = [batch.column(name).to_pylist() for name in split.columns.texts]
        lengths += map(len, tokenizer(*texts, truncation=False, verbose=False)["input_ids"])
    return np.array(lengths)


def _labelled(splits: dict[str, Rows], name: str) -> tuple[list[str], np.ndarray] | None:
    """Texts and labels of a split, of at most the rows that floors use; None if it has no labels."""
    from ft.preflight.floors import MOST_ROWS

    rows = splits.get(name)
    if rows is None or rows.labels is None:
        return None
    chosen = np.sort(sample(len(rows), MOST_ROWS))
    return rows.texts.take(pa.array(chosen)).to_pylist(), rows.labels[chosen]


def _warn(report: dict[str, Any], findings: Findings) -> None:
    """Warnings about files left out, pairs without a separator, odd label names, copies and
    conflicts."""
    topics = {"text_column_names": "pair", "dataset_name": "files", "labels": "label_names"}
    for note in report["notes"]:
        for option, topic in topics.items():
            if note.startswith(f"WARNING {option}: "):
                findings.warn(topic, note.removeprefix("WARNING "))
    copies, near = report.get("copies"), report.get("near_copies")
    if copies and near:
        for pair, exact in copies["across"].items():
            later, earlier = pair.split(" in ")
            close = near["across"][pair]
            if exact["rows"]:
                findings.warn(
                    "copies_across",
                    f"{later}: {exact['rows']:,} rows have a text that is in {earlier}, too "
                    f"({_first(exact)}); on_duplicates: drop takes it out of {earlier}",
                )
            if close["rows"]:
                note = sample_note(near)
                findings.warn(
                    "near_copies_across",
                    f"{later}: {close['rows']:,} rows nearly repeat a text of {earlier} ({_first(close)})"
                    + (note and f"; {note}"),
                )
        if (repeats := copies["within"].get("train")) and repeats["rows"]:
            findings.warn(
                "copies_within", f"train: {repeats['rows']:,} rows repeat another one ({_first(repeats)})"
            )
    conflicts = report.get("conflicts")
    if conflicts and conflicts["texts"]:
        first = "; ".join(
            ", ".join(f"{where['split']} row {where['row']} {where['label']!r}" for where in text["rows"][:4])
            for text in conflicts["first"][:3]
        )
        findings.warn(
            "conflicts",
            f"{conflicts['texts']:,} texts have different labels, in {conflicts['rows']:,} rows: "
            + first
            + ("; ..." if conflicts["texts"] > 3 else ""),
        )


def _warn_of_cuts(report: dict[str, Any], config: Config, is_pair: bool, findings: Findings) -> None:
    """A warning about truncated texts, with a remedy valid for the run; windows are for single texts."""
    tokens = report.get("tokens", {})
    train = tokens.get("splits", {}).get("train")
    if not train or train["cut_share"] <= CUT_SHARE:
        return
    where, remedy = f"max_length {tokens['max_length']}", ""
    if config.long_text == "windows":
        where += f" in {config.max_windows} windows"
        remedy = "; a higher max_windows sees more"
    elif not is_pair:
        remedy = "; long_text: windows sees the rest, as far as max_windows go"
    findings.warn(
        "cut",
        f"train: {train['cut_share']:.1%} of the rows are cut at {where}; {tokens['keeps_99_percent']} would "
        f"keep 99 % of them whole, where the model takes as many{remedy}",
    )


def _first(counted: dict[str, Any]) -> str:
    """ "row 3 as 17, 5 as 40, ..." from the result of `count_rows`."""
    shown = ", ".join(f"{row} as {other}" for row, other in counted["first"][:3])
    return f"row{'s' if counted['rows'] > 1 else ''} {shown}{', ...' if counted['rows'] > 3 else ''}"
