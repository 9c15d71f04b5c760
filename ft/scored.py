"""Reads the predictions.jsonl of an evaluation."""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ft.analysis import predictions
from ft.analysis.predictions import Predictions
from ft.errors import UserError

SINGLE, MULTI, NUMBER = "one label a row", "any number of labels a row", "a number a row"
KINDS = {  # by the names that models have for them
    "single_label_classification": SINGLE,
    "multi_label_classification": MULTI,
    "regression": NUMBER,
}
KNOWN = ("row", "label", "prediction", "probabilities")  # keys of a line; the others are texts and an id


@dataclass
class Scored:
    """The rows of a file, by their numbers."""

    path: Path
    kind: str
    names: list[str]  # of the labels; empty for numbers
    rows: list[int]
    texts: list[dict[str, Any]]  # and the id, if an evaluation was given one
    labels: list[Any]  # a name, a sorted list of names, or a number
    predicted: list[Any]
    probabilities: np.ndarray | None  # (rows, labels)

    @staticmethod
    def read(path: Path) -> Scored:
        """Raises `UserError` for a file that eval.py did not write, or whose rows have no labels."""
        lines: list[dict[str, Any]] = []
        names: list[str] = []
        with open(path, encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                line = _read_line(text)
                given = {} if line is None else line.get("probabilities", {})
                names = names if lines else list(given)
                if line is None or given.keys() != set(names):
                    raise UserError(
                        f"compare: {path}: line {number} is no prediction of eval.py; score the model again."
                    )
                if "label" not in line:
                    raise UserError(
                        f"compare: {path}: line {number} has no label, so nothing says who is right; score "
                        "both runs on rows with labels."
                    )
                line["probabilities"] = np.array([given[name] for name in names])  # a tenth of their dict
                lines.append(line)
        if not lines:
            raise UserError(f"compare: {path} is empty; score the model again.")
        lines.sort(key=lambda line: line["row"])
        kind = NUMBER if not names else MULTI if isinstance(lines[0]["label"], list) else SINGLE
        return Scored(
            path, kind, names, [line["row"] for line in lines],
            [{key: value for key, value in line.items() if key not in KNOWN} for line in lines],
            [sorted(line["label"]) if kind == MULTI else line["label"] for line in lines],
            [line["prediction"] for line in lines],
            np.array([line["probabilities"] for line in lines]) if names else None,
        )  # fmt: skip

    @staticmethod
    def by_model(folder: Path) -> Scored | None:
        """A file without rows, for the task of an exported model; None if its config does not say."""
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            kind = KINDS[config["problem_type"]]
            names = [] if kind == NUMBER else list(config["id2label"].values())
        except (OSError, ValueError, KeyError):
            return None
        return Scored(folder, kind, names, [], [], [], [], None)

    def judged(self, names: Sequence[str]) -> Predictions:
        """The predictions with the labels in the order of `names`."""
        if self.probabilities is None:
            return predictions.regression(np.array(self.predicted, float), np.array(self.labels, float))
        place = {name: number for number, name in enumerate(names)}
        given = {name: number for number, name in enumerate(self.names)}
        table = self.probabilities[:, [given[name] for name in names]]
        sides = (self.labels, self.predicted)
        if self.kind == SINGLE:
            labels, predicted = (np.array([place[name] for name in side]) for side in sides)
            return predictions.single_label(table, labels, predicted)
        truth, predicted = (
            np.array([[name in row for name in names] for row in map(set, side)]) for side in sides
        )
        return predictions.multi_label(table, truth, predicted)


def _read_line(text: str) -> dict[str, Any] | None:
    """A line of the file; None if it cannot be one."""
    try:
        line = json.loads(text)
        names = line.get("probabilities", {})
        used = [line["prediction"], *([line["label"]] if "label" in line else [])]
        flat = [name for value in used for name in (value if isinstance(value, list) else [value])]
        known = set(flat) <= set(names) if names else all(type(value) in (int, float) for value in used)
        good = isinstance(line["row"], int) and known
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return line if good else None


def check_same(one: Scored, other: Scored) -> None:
    """Raise `UserError` if two files are not about the same rows and the same task."""
    if one.kind != other.kind:
        raise UserError(
            f"compare: the tasks differ: {one.path} predicts {one.kind}, {other.path} {other.kind}."
        )
    if set(one.names) != set(other.names):
        odd = sorted(set(one.names) ^ set(other.names))
        raise UserError(
            f"compare: the tasks differ: {one.path} has {len(one.names)} labels, {other.path} "
            f"{len(other.names)}; one of them alone has {', '.join(odd[:5])}{', ...' * (len(odd) > 5)}."
        )
    if one.rows != other.rows:
        alone = sorted(set(one.rows) ^ set(other.rows))
        where = f"row {alone[0]} is in only one of them" if alone else "some rows occur twice"
        raise UserError(
            f"compare: the rows differ: {one.path} scored {len(one.rows):,} rows, {other.path} "
            f"{len(other.rows):,}; {where}. Score both on the same data and split."
        )
    for what, same in (("texts", _same_texts), ("labels", operator.eq)):
        for row, mine, theirs in zip(one.rows, getattr(one, what), getattr(other, what), strict=True):
            if not same(mine, theirs):
                shown = f" ({mine!r} and {theirs!r})" if what == "labels" else ""
                columns = "" if what == "labels" else ", and from the same columns (text_column_names)"
                raise UserError(
                    f"compare: the rows differ: row {row} has other {what} in {one.path} than in "
                    f"{other.path}{shown}. Score both on the same data and split{columns}."
                )


def _same_texts(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether what both evaluations have of a row is the same. One of them may have copied an id, or another
    one; ids from a csv are texts, the same ones from a jsonl are numbers."""
    common = mine.keys() & theirs.keys()
    return bool(common) and all(str(mine[name]) == str(theirs[name]) for name in common)
