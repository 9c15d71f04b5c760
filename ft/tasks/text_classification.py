"""Text classification: one label out of several for a text or a pair of texts."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ft.data.audit import describe_rows
from ft.data.files import MIXED
from ft.errors import UserError, printable
from ft.tasks.base import Task

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from ft.analysis.predictions import Predictions
    from ft.data.loader import MicroBatch


# In the config of an exported model; its own "temperature" is about generating texts.
TEMPERATURE = "calibration_temperature"
WHOLE = re.compile(r"-?[0-9]{1,18}")  # in 64 bits; a longer row of digits is a name
NUMBER = re.compile(r"-?[0-9]{1,18}(\.[0-9]*)?")


class TextClassification(Task):
    """Cross-entropy over classes whose names come from the data.

    The order of the classes is that of a ClassLabel column where there is one; else whole numbers are in
    numerical and strings in alphabetical (code point) order. `label_smoothing` is mixed into the training
    loss alone."""

    pipeline_tag: ClassVar[str] = "text-classification"
    headline: ClassVar[tuple[str, ...]] = ("accuracy", "f1_macro")

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_names: list[str] = []
        self.label_smoothing = label_smoothing

    # --- targets

    def learn_targets(
        self, values: pa.ChunkedArray, field: pa.Field, rows: np.ndarray, names: list[str] | None
    ) -> None:
        """The names of the classes, in their order; one class is an error."""
        found = _as_names(values, field, rows, "train", names).unique().to_pylist()
        if len(found) < 2:
            raise UserError(
                f"label_column_name: the training column {field.name!r} holds a single class "
                f"({found[0]!r}); there is nothing to tell apart. Expected at least two."
            )
        whole = all(map(WHOLE.fullmatch, found))
        self.label_names = list(names) if names else sorted(found, key=int if whole else None)

    def encode_targets(
        self, values: pa.ChunkedArray, field: pa.Field, rows: np.ndarray, split: str, names: list[str] | None
    ) -> pa.Array:
        """Class numbers (rows,) int32."""
        import pyarrow as pa
        import pyarrow.compute as pc

        texts = _as_names(values, field, rows, split, names)
        numbers = pc.index_in(texts, value_set=pa.array(self.label_names, pa.large_string()))
        unknown = np.flatnonzero(np.asarray(pc.is_null(numbers)))
        if len(unknown):
            raise UserError(
                f"{split} data: {describe_rows(rows[unknown])}: found the label "
                f"{texts[int(unknown[0])].as_py()!r}, which training lacks; rows count from 0. Expected one "
                f"of {', '.join(self.label_names[:20])}{', ...' if len(self.label_names) > 20 else ''}. "
                "Mend the label, or add training rows that have it."
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
        """The names of the classes are the model's `id2label`; a temperature comes along from training."""
        self.label_names = [model_config.id2label[number] for number in range(model_config.num_labels)]
        temperature = getattr(model_config, TEMPERATURE, None)
        self.calibration = {} if temperature is None else {"temperature": temperature}

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
        vars(model_config).pop(TEMPERATURE, None)  # of the model that is trained on
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

    def export_weights(self, state: dict[str, torch.Tensor], model_config: Any) -> dict[str, torch.Tensor]:
        """The same; the model's config gets the temperature."""
        if "temperature" in self.calibration:
            setattr(model_config, TEMPERATURE, self.calibration["temperature"])
        return state

    # --- results

    def calibrate(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """The temperature that fits the probabilities to these rows, see `fit_temperature`."""
        from ft.analysis.calibration import fit_temperature

        return {"temperature": fit_temperature(scores, labels)}

    def metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """See `classification_metrics`."""
        from ft.metrics import classification_metrics

        return classification_metrics(softmax(scores), labels, self.label_names)

    def judge(self, scores: np.ndarray, labels: np.ndarray) -> Predictions:
        """One label a row."""
        from ft.analysis import predictions

        return predictions.single_label(softmax(scores), labels)

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

    def card_labels(self) -> str:
        """One name a line, quoted, in a block of code: shown as it is, whatever it means to Markdown or
        HTML."""
        names = "\n".join(json.dumps(printable(name), ensure_ascii=False) for name in self.label_names)
        return f"```text\n{names}\n```"

    def card_usage(self) -> str:
        """With `pipeline`."""
        return USAGE


USAGE = """```python
from transformers import pipeline

classify = pipeline("text-classification", model="path/of/this/folder")
classify("a text", truncation=True)
```"""


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
    if names is not None:
        outside = np.flatnonzero((np.asarray(values) < 0) | (np.asarray(values) >= len(names)))
        if len(outside):
            raise UserError(
                f"{where}: {describe_rows(rows[outside])}: found {values[int(outside[0])]}, expected the "
                f"number of one of its {len(names)} classes (0 to {len(names) - 1})."
            )
        return pc.take(pa.chunked_array([pa.array(names, pa.large_string())]), values)
    if field.metadata and MIXED.items() <= field.metadata.items():
        plain = [json.loads(value) for value in values.to_pylist()]
        kinds = [type(value).__name__ for value in plain]
        if set(kinds) == {"int"}:  # some beyond 64 bits; in a csv file these are names, too
            return pa.chunked_array([pa.array(map(str, plain), pa.large_string())])
        odd = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), 0)
        raise UserError(
            f"{where} mixes types: row {rows[0]} holds {plain[0]!r} ({kinds[0]}) and row {rows[odd]} holds "
            f"{plain[odd]!r} ({kinds[odd]}); rows count from 0. Expected labels of one type."
        )
    if pa.types.is_boolean(values.type):
        return pc.if_else(values, "true", "false").cast(pa.large_string())
    if pa.types.is_integer(values.type):
        return values.cast(pa.large_string())
    if pa.types.is_large_string(values.type):
        values = pc.utf8_trim_whitespace(values)
        number = {name: bool(NUMBER.fullmatch(name)) for name in values.unique().to_pylist()}
        if not any(number.values()):
            return values
        if not all(number.values()):
            listed = values.to_pylist()
            few = sum(number[name] for name in listed) * 2 < len(
                listed
            )  # whichever kind is rarer is the odd one
            odd = next(i for i, name in enumerate(listed) if number[name] == few)
            raise UserError(
                f"{where} mixes numbers and names: row {rows[odd]} holds {listed[odd]!r}, unlike most "
                "others; rows count from 0. Expected labels of one type."
            )
        if all(map(WHOLE.fullmatch, number)):
            return values.cast(pa.int64()).cast(pa.large_string())  # "01" and "1" are one class
        values = values.cast(pa.float64())
    if not pa.types.is_floating(values.type):
        raise UserError(f"{where} holds {values.type}, expected whole numbers or names.")
    numbers = np.asarray(values, np.float64)
    broken = np.flatnonzero((numbers != np.floor(numbers)) | (np.abs(numbers) > 2**53))
    if len(broken):
        raise UserError(
            f"{where}: row {rows[broken[0]]} holds {numbers[broken[0]]:g}, which is no class; rows count "
            "from 0. Expected whole numbers or names."
        )
    return pa.chunked_array([pa.array(numbers.astype(np.int64)).cast(pa.large_string())])
