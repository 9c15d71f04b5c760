"""Rows that a model was trained on or selected by: an evaluation must not score them, and a second training
must know of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ft.config import Config, EvalConfig
from ft.data.sources import local_path
from ft.errors import UserError
from ft.pretrained import of_training, training_columns

if TYPE_CHECKING:
    from ft.data.prepare import Data


def check_unseen(options: EvalConfig, data: Data, split: str) -> list[str]:
    """Raise `UserError` if the rows of a split are set aside from the training rows, but differently than in
    training: the model may have been trained on most of them. Returns notes for the user if that cannot be
    known."""
    if not data.was_set_aside(split):
        if split != "train" and _was_split(options, data, split, "train"):
            return [f"WARNING {split}: these are the rows of the data that the model was trained on"]
        if split != "validation" and fitted_on(options, data, split):
            return [
                f"WARNING {split}: these are the validation rows of the training: what was chosen by them "
                "(the best model, its temperature, its thresholds) fits them better than other rows"
            ]
        return []
    if not of_training(options).get("draw"):
        return [
            f"the {split} rows are set aside from the training rows; nothing beside the model says which of "
            "them it was trained on, so these may be rows that it has learned"
        ]
    if what := _drawn_otherwise(options, data):
        raise UserError(
            f"split: the {split} rows are set aside from the training rows, but {what}: they would differ "
            "from those in training, and the model has learned most of them. Restore it, or name the "
            "rows to score as test_file."
        )
    return []


def learned_before(config: Config, data: Data, targets: dict[str, Any]) -> list[str]:
    """Notes for the user whose training starts from a model of an earlier run, in its best/ or final/, if
    that model may have been trained on the validation or test rows: their results would be too good, and so
    would be what they select. `targets` are the data's, as returned by `Task.state`."""
    splits = [split for split in data.splits if split != "train"]
    drawn = [split for split in splits if data.was_set_aside(split)]
    notes = [
        f"WARNING {split}: these are the rows of the data that the model in {config.model_name_or_path} was "
        "trained on"
        for split in splits
        if split not in drawn and _was_split(config, data, split, "train")
    ]
    is_alike = training_columns(config) == (data.columns.texts, data.columns.label)
    is_alike = is_alike and (_was_split(config, data, "train", "train") or _may_name(config, targets))
    if drawn and is_alike and (what := _drawn_otherwise(config, data)):
        notes.append(
            f"WARNING {' and '.join(drawn)}: set aside from the training rows, but not as when the model in "
            f"{config.model_name_or_path} was trained ({what}). If it was trained on this data, it "
            "has learned most of the rows now set aside, and the results are too good: name the rows that "
            f"were set aside then as {' and '.join(f'{split}_file' for split in drawn)}"
        )
    return notes


def _may_name(config: Config, targets: dict[str, Any]) -> bool:
    """Whether some of the labels are the model's; otherwise, it was trained on other data."""
    labels = {name.casefold() for name in targets.get("label_names", [])}
    try:
        path = local_path(config.model_name_or_path) / "config.json"
        names = json.loads(path.read_text(encoding="utf-8"))["id2label"].values()
        theirs = {name.casefold() for name in names}
    except (OSError, ValueError, KeyError, AttributeError):
        return True
    return not labels or not theirs.isdisjoint(labels)


def fitted_on(options: EvalConfig, data: Data, split: str) -> bool:
    """Whether the rows of a split, whatever it is called here, are the validation rows of the training, on
    which it fitted the temperature."""
    return _was_split(options, data, split, "validation")


def has_set_test_aside(options: EvalConfig) -> bool:
    """Whether the model's training has set test rows aside from its training rows."""
    return bool(of_training(options).get("draw", {}).get("test_split_percentage"))


def _was_split(options: Config, data: Data, split: str, then: str) -> bool:
    """Whether the source of a split is that of the split `then` of the model's training."""
    known = of_training(options).get("sources", {}).get(then)
    return known is not None and data.sources.get(split) == known


def _drawn_otherwise(options: Config, data: Data) -> str | None:
    """Why the rows set aside from the training rows are not those that the model's training set aside; None
    if they are the same, or nothing is known about them."""
    known, now = of_training(options).get("draw", {}), data.draw(options)
    # Runs of earlier versions record less of it.
    differing = [name for name in now if name in known and (now[name] or None) != (known[name] or None)]
    if not differing:
        return None
    name, *_ = differing
    return {
        "train": "the training data has changed since",
        "dropped": "other rows are dropped from the training data than then",
    }.get(name, f"{name} is {_used(now[name])}, and was {_used(known[name])} then")


def _used(value: Any) -> str:
    return "not used" if value is None else f"{value:g}" if isinstance(value, float | int) else repr(value)
