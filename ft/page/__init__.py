"""report.html: one file for people, with everything that a run or an evaluation found, made from
results.json, the log, the data and the config."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ft.analysis.calibration import decisions, threshold_curve
from ft.cli import dump
from ft.config import Config
from ft.data.prepare import Data
from ft.evaluation import Evaluation, found_of
from ft.metrics import softmax
from ft.output import write_whole
from ft.page import audit
from ft.page.plots import Plots
from ft.report import environment, training_curves, truncation_notes
from ft.tasks.base import Task

NAME = "report.html"
MOST_ROWS = 100  # of a table
OTHER_LOSS = ("class_weights", "pos_weight", "focal_gamma", "label_smoothing_factor")  # only in training
MOST_CLASSES = 20  # of a confusion matrix as a table; a picture beyond
NOT_HTML = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ud800-\udfff]")  # what no HTML file may hold


def write_page(
    folder: Path, config: Config, task: Task, data: Data, results: Mapping[str, Any],
    scored: Mapping[str, Evaluation], accelerator: Any,
) -> None:  # fmt: skip
    """Write report.html into the folder that holds results.json; the texts of the data are escaped in it.

    `results` is the content of results.json, `scored` has its evaluations under their splits. To be called on
    the main process."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    jinja.filters |= {"number": number, "percent": percent, "said": said, "breakable": breakable}
    written = folder / "environment.json"  # by the run; next to an evaluation, it may be another's
    is_there = "train/total_steps" in results and written.exists()
    about = json.loads(written.read_text("utf-8")) if is_there else environment(config, data, accelerator)
    content = page_content(folder, config, task, data, results, scored) | {"environment": about}
    page = jinja.get_template("report.html.j2").render(content).lstrip()
    write_whole(folder / NAME, NOT_HTML.sub("\N{REPLACEMENT CHARACTER}", page))


def page_content(
    folder: Path, config: Config, task: Task, data: Data, results: Mapping[str, Any],
    scored: Mapping[str, Evaluation],
) -> dict[str, Any]:  # fmt: skip
    """What the template shows, except the environment. A table or plot that this kind of label lacks is empty
    or missing."""
    plots = Plots()
    found = {split: found_of(results, split) for split in scored}
    trained = "train/total_steps" in results
    return {
        "name": config.run_name or Path(config.output_dir).resolve().name,
        "config_file": shlex.quote(str(folder / "config.yaml")),
        "trained": trained,
        "results": results,
        "config": config,
        "rows_of_update": data.rows_of_update(config.global_batch_size) if trained else None,
        "source": _source(config, "train" if trained else results["split"]),
        "splits": found,
        "metrics": _metrics(found, results["headline"]),
        "curves": _curves(folder, config.best_metric, plots) if trained else [],
        "other_loss": [name for name in OTHER_LOSS if getattr(config, name, None) not in (None, "none", 0)],
        "plots": {split: _plots(split, found[split], task, data, scored[split], plots) for split in scored},
        "together": _plots_of_all(found, plots),
        "errors": {
            split: [_error(line) for line in found[split].get("worst_errors", [])] for split in scored
        },
        "data_splits": list(data.splits),
        "rows_table": audit.rows_table(data),
        "label_table": audit.label_table(data, task),
        "target_table": audit.target_table(data),
        "notes": [*data.notes, *truncation_notes(data.splits)],
        "findings": audit.preflight_findings(config.output_dir, data.sources),
        "yaml": dump(config.repeatable()),
        "most_rows": MOST_ROWS,
    }


def _source(config: Config, split: str) -> str:
    """The file or data set that the rows of a split come from: a split that was not given is set aside from
    the training rows."""
    return str(getattr(config, f"{split}_file") or config.dataset_name or config.train_file)


def _metrics(found: Mapping[str, dict[str, Any]], headline: list[str]) -> list[dict[str, Any]]:
    """The numbers, the headline first: name, and for each split value, low and high."""
    names = dict.fromkeys([*headline, *(name for numbers in found.values() for name in numbers)])
    return [
        {
            "name": name,
            "headline": name in headline,
            "cells": [[of.get(name), of.get(f"{name}_low"), of.get(f"{name}_high")] for of in found.values()],
        }
        for name in names
        if name != "rows" and not name.endswith(("_low", "_high"))
        and any(isinstance(numbers.get(name), int | float) for numbers in found.values())
    ]  # fmt: skip


def _curves(folder: Path, metric: str, plots: Plots) -> list[str]:
    """A plot for each training curve."""
    return [
        plots.lines(
            f"{title} over updates", "update", title,
            {key: tuple(points.T) for key, points in series.items()},
            [key for key in series if key.startswith("eval/")], whole_x=True,
        )
        for title, series in training_curves(folder, metric).items()
    ]  # fmt: skip


def _plots(
    split: str, found: Mapping[str, Any], task: Task, data: Data, result: Evaluation, plots: Plots
) -> dict[str, str]:
    """The plots of a single split."""
    scores, labels = result.scores, data.splits[split].labels
    assert scores is not None and labels is not None
    drawn = {}
    if len(found.get("confusion_matrix", [])) > MOST_CLASSES:
        drawn["confusion"] = plots.confusion(f"confusion matrix, {split}", found["confusion_matrix"])
    if labels.dtype.kind == "f":
        drawn["agreement"] = plots.agreement(f"predictions, {split}", labels, task.predictions(scores))
    elif labels.ndim == 2 or scores.shape[1] == 2:
        # With two classes, those of the second one: a label that a row has or not.
        given = decisions(scores, labels) if labels.ndim == 2 else (softmax(scores)[:, 1], labels == 1)
        used = [label["threshold"] for label in found.get("per_label", {}).values()] or [0.5]
        title = f"precision, recall and F1 against the threshold, {split}"
        drawn["thresholds"] = plots.thresholds(title, threshold_curve(*given), used)
    return drawn


def _plots_of_all(found: Mapping[str, dict[str, Any]], plots: Plots) -> dict[str, str]:
    """The plots that show all splits together."""
    drawn = {}
    if tables := {split: of["reliability"] for split, of in found.items() if "reliability" in of}:
        drawn["reliability"] = plots.reliability("reliability diagram", tables)
    if curves := {split: of["coverage"] for split, of in found.items() if "coverage" in of}:
        points = {
            split: ([p["coverage"] for p in curve], [p["accuracy"] for p in curve])
            for split, curve in curves.items()
        }
        drawn["coverage"] = plots.lines(
            "accuracy against coverage", "share of the rows, the surest first", "share that is right", points
        )
    return drawn


def _error(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of worst_errors with its texts separate."""
    known = ("row", "label", "prediction", "confidence", "error")
    texts = [(name, text) for name, text in line.items() if name not in known]
    return {"texts": texts, **{name: line[name] for name in known if name in line}}


def number(value: Any) -> str:
    """A number for people: four significant digits, whole numbers in full, a dash for none."""
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return "–"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    return f"{value:,.0f}" if 999.95 <= abs(value) < 1e15 else f"{value:#.4g}"


def percent(share: float) -> str:
    """A share from 0 to 1 as a percentage with three digits."""
    return f"{100 * share:.3g}\N{NO-BREAK SPACE}%"


def said(value: Any) -> str:
    """A target or a prediction, as in the data, for people."""
    if isinstance(value, list):
        return ", ".join(value) or "no label"
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if 1e7 <= abs(value) < 1e15 else f"{value:.7g}"  # seconds since 1970, whole


def breakable(name: str) -> Any:
    """A name, escaped, that a narrow column may break after underscores."""
    from markupsafe import Markup

    return Markup("_<wbr>").join(name.split("_"))
