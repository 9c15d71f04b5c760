"""What is reported of a scored split beyond its metrics: intervals, calibration, and where the model fails.

Used by train.py and eval.py, on the main process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ft.analysis.errors import confused_pairs, surest_errors
from ft.analysis.resampling import RESAMPLES
from ft.analysis.summary import calibration_summary, interval_numbers, slice_tables
from ft.data.prepare import Data
from ft.data.slices import slice_values
from ft.evaluation import Evaluation
from ft.output import write_whole
from ft.prediction_files import prediction_lines
from ft.tasks.base import Task
from ft.tracking import to_json

WORST = 20  # rows with their texts in results.json
LONGEST = 500  # characters of a text there


def assess(
    task: Task, data: Data, split: str, result: Evaluation, resamples: int = RESAMPLES,
    fitted_on: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Everything that results.json has for a split: the metrics of its evaluation; NAME_low and NAME_high for
    each, from `resamples` bootstrap resamples; calibration and coverage; the slices; confused_pairs;
    worst_errors, most confident first (for a regression, largest first).

    `fitted_on`: these are the validation rows of the training, under another name."""
    rows, scores = data.splits[split], result.scores
    assert scores is not None and rows.labels is not None
    judged = task.judge(scores, rows.labels)
    # The temperature was fitted on the validation rows: it would say nothing new there.
    is_news = split != "validation" and not fitted_on
    temperature = task.calibration.get("temperature") if is_news else None
    found = {**result.metrics, **interval_numbers(judged, resamples)}
    found |= calibration_summary(judged, scores, rows.labels, temperature)
    sliced = slice_values(data, split, rows.row)
    found |= slice_tables(judged, task.headline, rows.full_lengths, sliced, resamples)
    if judged.one_label:
        names = list(result.metrics["per_class"])
        found["confused_pairs"] = confused_pairs(judged.truth, judged.predicted, names)
    if judged.right is not None and judged.confidence is not None:
        key, measured = "confidence", judged.confidence
        worst = surest_errors(judged.confidence, judged.right, WORST)
    else:
        assert judged.error is not None
        key, measured = "error", judged.error
        worst = np.argsort(-judged.error, kind="stable")[:WORST]
    lines = prediction_lines(rows, data.columns, task, scores, worst)
    skipped = ("probabilities", data.columns.id)  # the same as after training, which reads no ids
    found["worst_errors"] = [
        {name: _shortened(value) for name, value in line.items() if name not in skipped}
        | {key: float(measured[place])}
        for line, place in zip(lines, worst, strict=True)
    ]
    return found


def _shortened(value: Any) -> Any:
    return value[:LONGEST] + "..." if isinstance(value, str) and len(value) > LONGEST else value


def write_label_errors(folder: Path, task: Task, data: Data, split: str, scores: np.ndarray) -> str:
    """Write label_errors.jsonl: rows whose label is likely wrong, worst first. Returns a line for the
    user."""
    from ft.analysis.label_errors import suspects

    rows = data.splits[split]
    assert rows.labels is not None
    judged = task.judge(scores, rows.labels)
    suspected = suspects(judged)
    found, quality = suspected or (np.zeros(0, int), np.zeros(0))
    lines = prediction_lines(rows, data.columns, task, scores, found)
    text = "".join(
        to_json({**line, "label_quality": round(float(quality[place]), 6)}, ensure_ascii=False) + "\n"
        for line, place in zip(lines, found, strict=True)
    )
    write_whole(folder / "label_errors.jsonl", text)
    if suspected is None:
        return "suspected label errors: none, as all rows have the same label"
    count = f"{len(found):,} of {len(rows):,} rows"
    if judged.probabilities is None:
        count += ", the fixed share that fits its predictions least"
    said = f"suspected label errors: {count}, in label_errors.jsonl"
    if split == "train":
        said += (
            "\nnote: few are found among rows that the model was trained on: it has learned their labels, "
            "wrong ones too"
        )
    return said
