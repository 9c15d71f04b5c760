"""The preflight on one screen."""

from __future__ import annotations

import textwrap
from typing import Any

from ft.preflight.findings import BLOCKING, WARNING
from ft.preflight.forecast import duration, giga
from ft.preflight.near import sample_note
from ft.values import short

WIDTH = 110
WARNINGS = 8  # shown; preflight.json has them all
LABELS = 8


def screen(report: dict[str, Any]) -> list[str]:
    """The lines to print; `report` is the content of preflight.json, and "written", where that is stored."""
    lines = [*_rows(report), *_labels(report), *_machine(report)]
    warnings = [f["message"] for f in report["findings"] if f["level"] == WARNING]
    blocking = [f["message"] for f in report["findings"] if f["level"] == BLOCKING]
    for message in warnings[:WARNINGS]:
        lines += _wrapped(f"warning: {message}")
    if len(warnings) > WARNINGS:
        lines.append(f"... and {len(warnings) - WARNINGS} more warnings")
    for message in blocking:
        lines += _wrapped(f"BLOCKING: {message}")
    count = f"{len(blocking)} blocking finding{'s' * (len(blocking) > 1)}"
    lines.append(f"{'fit' if report['fit'] else f'NOT FIT: {count}'} (written: {report['written']})")
    return lines


def _rows(report: dict[str, Any]) -> list[str]:
    """A table with a column for each split."""
    facts, splits = report["rows"], list(report["rows"])
    table: list[tuple[str, list[Any]]] = [
        ("rows", [facts[s].get("used") for s in splits]),
        ("rows read", [facts[s].get("read") for s in splits]),
    ]
    for reason in dict.fromkeys(reason for s in splits for reason in facts[s].get("bad", {})):
        table.append((f"  {reason}", [_count(facts[s].get("bad", {}), reason) for s in splits]))
    if "copies" in report:
        exact, near = report["copies"], report["near_copies"]
        alike = f"  nearly (Jaccard >= {near['threshold']})"
        table.append(("repeat another row", [_count(exact["within"], s) for s in splits]))
        table.append((alike, [_count(near["within"], s) for s in splits]))
        for other in ("train", "validation"):
            pairs = [f"{s} in {other}" for s in splits]
            table.append((f"text is in {other}, too", [_count(exact["across"], pair) for pair in pairs]))
            table.append((alike, [_count(near["across"], pair) for pair in pairs]))
    if tokens := report.get("tokens", {}).get("splits"):
        form = "{mean:.0f} / {percentile_99} / {longest}".format
        table.append(
            ("tokens: mean / 99 % / longest", [form(**tokens[s]) if s in tokens else None for s in splits])
        )
        cut = [f"{tokens[s]['cut_share']:.1%}" if s in tokens else None for s in splits]
        table.append((f"cut at {report['tokens']['max_length']} tokens", cut))
    lines = [f"{'data':34}" + "".join(f"{split:>16}" for split in splits)] if splits else []
    for name, cells in table:
        if any(cell is not None for cell in cells):
            shown = ("-" if c is None else f"{c:,}" if isinstance(c, int) else c for c in cells)
            lines.append(f"{name:34}" + "".join(f"{cell:>16}" for cell in shown))
    if "near_copies" in report and (note := sample_note(report["near_copies"])):
        lines.append(f"  nearly: {note}")
    return lines


def _count(counted: dict[str, Any], key: str) -> int | None:
    return counted[key]["rows"] if key in counted else None


def _labels(report: dict[str, Any]) -> list[str]:
    lines, labels = [], report.get("labels", {})
    train = labels.get("counts", {}).get("train")
    if train:
        rows = report["rows"]["train"]["used"]
        ranked = sorted(train.items(), key=lambda item: -item[1])
        shown = ranked if len(ranked) <= LABELS else [*ranked[: LABELS // 2], None, *ranked[-LABELS // 2 :]]
        parts = ("..." if entry is None else f"{entry[0]} {entry[1] / rows:.1%}" for entry in shown)
        lines += _wrapped(f"labels in train: {len(train)} ({labels['problem_type']}): {', '.join(parts)}")
    if "train" in labels.get("targets", {}):
        spread = "mean {mean:.4g}, standard deviation {standard_deviation:.4g}, {least:.4g} to {greatest:.4g}"
        lines.append(f"targets in train: {spread.format(**labels['targets']['train'])}")
    if "copies" in report:
        lines.append(
            f"rows that repeat the text of an earlier one, over all splits: {report['copies']['all']:,}"
        )
    if "conflicts" in report:
        found = report["conflicts"]
        lines.append(f"same text, other label: {found['texts']:,} texts in {found['rows']:,} rows")
    if "tokens" in report and report["tokens"]["keeps_99_percent"]:
        lines.append(
            f"max_length that keeps 99 % of the training rows whole: {report['tokens']['keeps_99_percent']}"
        )
    if "floors" in report:
        floors = report["floors"]
        for name, words in (("prior", "without the text"), ("tf_idf", "TF-IDF and a linear model")):
            found = floors[name]
            numbers = [f"{m} {short(found[m], 3)}" for m in floors["headline"] if found.get(m) is not None]
            lines.append(f"to beat on validation, {words}: {', '.join(numbers) or 'not defined'}")
    return lines


def _machine(report: dict[str, Any]) -> list[str]:
    if "forecast" not in report:
        return []
    launch, longest, forecast = report["launch"], report["longest_update"], report["forecast"]
    saved, seconds = report["checkpoint"], forecast["seconds"]
    processes = f"{launch['processes']} process{'es' * (launch['processes'] > 1)}"
    took = {name: duration(value) for name, value in seconds.items()}
    lines = [
        f"launch: {processes} on {launch['device']}, mixed precision {launch['mixed_precision']}",
        f"longest update: number {longest['update']:,}, {longest['rows']} rows of up to "
        f"{longest['tokens']} tokens",
        f"checkpoint: {giga(saved['bytes'])}, saved in {duration(saved['save_seconds'])} (then "
        f"{duration(saved['write_seconds'])} in the background), read back in "
        f"{duration(saved['reload_seconds'])}",
        f"FORECAST time: {duration(forecast['total_seconds'])} = start {took['start']} + "
        f"{forecast['updates']:,} updates {took['updates']} + {forecast['evaluations']} evaluations "
        f"{took['evaluations']} + {forecast['saves']} saves {took['saves']} + end {took['end']}"
        + (f", for each of {forecast['runs']} seeds" if forecast["runs"] > 1 else ""),
        f"FORECAST memory: {giga(forecast['peak_memory_bytes'])} a process, of "
        f"{giga(forecast['memory_bytes'])} that it can have; disk: {giga(forecast['disk_bytes'])}, of "
        f"{giga(forecast['free_disk_bytes'])} free",
    ]
    if forecast["peak_device_bytes"]:
        used, there = giga(forecast["peak_device_bytes"]), giga(forecast["device_memory_bytes"])
        lines.append(f"FORECAST device memory: {used} of {there}")
    return [part for line in lines for part in _wrapped(line)]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False)
