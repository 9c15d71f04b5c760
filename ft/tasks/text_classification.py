"""Text classification: one label out of several for a text or a pair of texts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from ft.data.audit import describe_rows
from ft.data.files import MIXED
from ft.errors import UserError
from ft.tasks.base import Task

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from ft.data.loader import MicroBatch


class TextClassification(Task):
    """Cross-entropy over classes whose names come from the data.

    The order of the classes is that of a ClassLabel column where there is one; else whole numbers are in
    numerical and strings in alphabetical (code point) order. `label_smoothing` is mixed into the training
    loss alone."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_names: list[str] = []
        self.label_smoothing = label_smoothing

    # --- targets

    def learn_targets(
        self, values: pa.ChunkedArray, field: pa.Field, rows: np.ndarray, names: list[str] | None
    ) -> None:
        """The names of the classes, in their order; one class is an error."""
        if names is not None:
            self.label_names = names
        else:
            found = set(_as_names(values, field, rows, "train", None).unique().to_pylist())
            self.label_names = sorted(found, key=int) if all(map(_is_whole, found)) else sorted(found)
        present = len(values.unique())
        if present < 2:
            raise UserError(
                f"label_column_name: the training column {field.name!r} holds a single class "
                f"({values[0].as_py()!r}); there is nothing to tell apart. Expected at least two."
            )

    def encode_targets(
        self, values: pa.ChunkedArray, field: pa.Field, rows: np.ndarray, split: str, names: list[str] | None
    ) -> pa.Array:
        """Class numbers (rows,) int32."""
        import pyarrow as pa
        import pyarrow.compute as pc

        texts = _as_names(values, field, rows, split, names)
        numbers = pc.index_in(texts, value_set=pa.array(self.label_names))
        unknown = np.flatnonzero(np.asarray(pc.is_null(numbers)))
        if len(unknown):
            raise UserError(
                f"{split} data: {describe_rows(rows[unknown])}: found the label "
                f"{texts[int(unknown[0])].as_py()!r}, "
                f"which training lacks; expected one of {', '.join(self.label_names[:20])}. Mend the "
                "label, or add "
                "training rows that have it."
            )
        return numbers.cast(pa.int32())

    @property
    def has_targets(self) -> bool:
        """Whether the names of the classes are known."""
        return bool(self.label_names)

    def state(self) -> dict[str, Any]:
        """The names of the classes."""
        return {"label_names": self.label_names}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take the names of the classes."""
        self.label_names = state["label_names"]

    def load_from_model(self, model_config: Any) -> None:
        """The names of the classes are the model's `id2label`."""
        self.label_names = [model_config.id2label[number] for number in range(model_config.num_labels)]

    def describe(self) -> str:
        """Number and names of the classes."""
        names = self.label_names
        return f"{len(names)} classes: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"

    def describe_target(self, label: int) -> str:
        """The name of a class."""
        return self.label_names[label]

    # --- model and loss

    def build_model(self, path: str, model_config: Any, **options: Any) -> torch.nn.Module:
        """A sequence classifier; its config has the names of the classes."""
        from transformers import AutoModelForSequenceClassification

        model_config.num_labels = len(self.label_names)
        model_config.id2label = dict(enumerate(self.label_names))
        model_config.label2id = {name: number for number, name in enumerate(self.label_names)}
        model_config.problem_type = "single_label_classification"
        return AutoModelForSequenceClassification.from_pretrained(path, config=model_config, **options)

    def loss(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        """Cross-entropy (with label smoothing), weighted and summed over the rows."""
        from torch.nn.functional import cross_entropy

        logits = model(**batch.inputs).logits.float()
        losses = cross_entropy(logits, batch.labels, reduction="none", label_smoothing=self.label_smoothing)
        return (losses * batch.weights).sum()

    def predict(self, model: torch.nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (rows, classes), and the cross-entropy of each row without smoothing."""
        from torch.nn.functional import cross_entropy

        logits = model(**batch.inputs).logits.float()
        return logits, cross_entropy(logits, batch.labels, reduction="none")

    # --- results

    def metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """See `classification_metrics`."""
        from ft.metrics import classification_metrics

        return classification_metrics(softmax(scores), labels, self.label_names)

    def metric_names(self) -> list[str]:
        """See `CLASSIFICATION_METRICS`."""
        from ft.metrics import CLASSIFICATION_METRICS

        return list(CLASSIFICATION_METRICS)

    def predictions(self, scores: np.ndarray) -> np.ndarray:
        """The class with the highest score."""
        return scores.argmax(axis=1)

    def describe_prediction(self, scores: np.ndarray) -> dict[str, Any]:
        """The name of the class, and the probability of each."""
        probabilities = softmax(scores[None])[0]
        return {
            "prediction": self.label_names[int(scores.argmax())],
            "probabilities": {
                name: round(float(p), 6) for name, p in zip(self.label_names, probabilities, strict=True)
            },
        }


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities (rows, classes) of logits, in float64."""
    shifted = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def _as_names(
    values: pa.ChunkedArray, field: pa.Field, rows: np.ndarray, split: str, names: list[str] | None
) -> pa.ChunkedArray:
    """Labels of any kind as the names of their classes. Raises `UserError` for a column that mixes kinds."""
    import pyarrow as pa
    import pyarrow.compute as pc

    where = f"{split} data: the label column {field.name!r}"
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if names is not None:
        outside = np.flatnonzero((np.asarray(values) < 0) | (np.asarray(values) >= len(names)))
        if len(outside):
            raise UserError(
                f"{where}: {describe_rows(rows[outside])}: no class (found {values[int(outside[0])]})."
            )
        return pc.take(pa.chunked_array([names]), values)
    if field.metadata and MIXED.items() <= field.metadata.items():
        plain = [json.loads(value) for value in values.to_pylist()]
        kinds = [type(value).__name__ for value in plain]
        odd = next(i for i, kind in enumerate(kinds) if kind != kinds[0])
        raise UserError(
            f"{where} mixes types: row {rows[0]} holds {plain[0]!r} ({kinds[0]}) and row {rows[odd]} holds "
            f"{plain[odd]!r} ({kinds[odd]}); expected labels of one type."
        )
    if pa.types.is_boolean(values.type):
        return pc.if_else(values, "true", "false")
    if pa.types.is_floating(values.type):
        broken = np.flatnonzero(np.asarray(pc.not_equal(pc.floor(values), values)))
        if len(broken):
            raise UserError(
                f"{where}: row {rows[broken[0]]} holds {values[int(broken[0])]}, which is no class; "
                "expected whole "
                "numbers or names."
            )
        values = values.cast(pa.int64())
    if pa.types.is_integer(values.type):
        return values.cast(pa.string())
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise UserError(f"{where} holds {values.type}, expected whole numbers or names.")
    values = pc.utf8_trim_whitespace(values.cast(pa.string()))
    whole = {name: _is_whole(name) for name in values.unique().to_pylist()}
    if any(whole.values()) and not all(whole.values()):
        listed = values.to_pylist()
        few = sum(whole[name] for name in listed) * 2 < len(listed)  # whichever kind is rarer is the odd one
        odd = next(i for i, name in enumerate(listed) if whole[name] == few)
        raise UserError(
            f"{where} mixes whole numbers and names: row {rows[odd]} holds {listed[odd]!r}, unlike "
            "most others; "
            "expected labels of one type."
        )
    if all(whole.values()):
        return values.cast(pa.int64()).cast(pa.string())  # "01" and "1" are one class
    return values


def _is_whole(name: str) -> bool:
    return name.removeprefix("-").isdecimal() and name.isascii()
