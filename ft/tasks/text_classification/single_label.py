"""One label out of several for each text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ft.errors import UserError
from ft.metrics import CLASSIFICATION_METRICS, classification_metrics, softmax
from ft.tasks.text_classification.kind import Kind
from ft.tasks.text_classification.label_names import joined_notes, odd_names
from ft.tasks.text_classification.labels import (
    SINGLE,
    WHOLE,
    in_order,
    names_of,
    numbers_of,
)
from ft.tasks.text_classification.losses import cross_entropy
from ft.tasks.text_classification.weights import Weights, described, label_weights

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from ft.analysis.predictions import Predictions


class SingleLabel(Kind):
    """Softmax cross-entropy over classes whose names come from the data, see `labels.in_order`.

    `class_weights` weights the rows by their class, so that the loss of an update is the weighted mean, as in
    torch's CrossEntropyLoss; `smoothing` and `gamma` change only the training loss, see `losses`."""

    problem_type: ClassVar[str] = SINGLE
    headline: ClassVar[tuple[str, ...]] = ("accuracy", "f1_macro")
    default_metric: ClassVar[str] = "accuracy"
    metric_style: ClassVar[str] = "classes"

    def __init__(
        self,
        class_weights: Weights = "none",
        smoothing: float = 0.0,
        gamma: float = 0.0,
        may_mix: bool = False,
    ) -> None:
        super().__init__()
        self.class_weights, self.smoothing, self.gamma = class_weights, smoothing, gamma
        self.may_mix = may_mix  # names that are numbers and names that are not
        self._weights: np.ndarray | None = None  # (classes,), known once there are training rows

    # --- targets

    def learn(
        self, values: pa.ChunkedArray, field: pa.Field, rows: np.ndarray, names: list[str] | None
    ) -> list[str]:
        """The names of the classes, in their order; one class is an error."""
        found = names_of(values, field, rows, "train", names, self.may_mix).unique().to_pylist()
        if len(found) < 2:
            raise UserError(
                f"label_column_name: the training column {field.name!r} holds a single class "
                f"({found[0]!r}); there is nothing to tell apart. Expected at least two."
            )
        self.label_names = in_order(found, names)
        return [*odd_names(self.label_names), *([] if names else joined_notes(found))]

    def encode(
        self, values: pa.ChunkedArray, field: pa.Field, rows: np.ndarray, split: str, names: list[str] | None
    ) -> pa.Array:
        """Class numbers (rows,) int32."""
        import pyarrow as pa

        are_names = not all(map(WHOLE.fullmatch, self.label_names))  # an odd one is then unknown
        texts = names_of(values, field, rows, split, names, are_names)
        return pa.array(numbers_of(texts, self.label_names, rows, field, split))

    def fit(self, labels: np.ndarray) -> None:
        """A single class is an error here, too: these are the rows that remain of those that `learn` has
        seen."""
        if len(labels) and (labels == labels[0]).all():
            raise UserError(
                f"the training rows that are left all have the label {self.label_names[labels[0]]!r}; there "
                "is nothing to tell apart. Expected at least two: raise max_train_samples, or keep more rows "
                "with on_duplicates: warn."
            )

    def describe(self) -> str:
        """Number and names of the classes, and their weights."""
        names = self.label_names
        text = f"{len(names)} classes: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        if self.class_weights == "none" or self._weights is None:
            return text
        return f"{text}; class weights {described(names, self._weights)}"

    def describe_target(self, label: Any) -> str:
        """The name of a class."""
        return self.label_names[int(label)]

    # --- loss

    def row_weights(self, labels: np.ndarray) -> np.ndarray:
        """The weights of the rows' classes. Balanced: rows / (classes * rows of the class), as in
        scikit-learn."""
        counts = np.bincount(labels, minlength=len(self.label_names))
        balanced = len(labels) / (len(counts) * np.maximum(counts, 1))
        self._weights = label_weights("class_weights", self.class_weights, self.label_names, balanced)
        return self._weights[labels]

    def training_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy, smoothed and focused."""
        return cross_entropy(logits, labels, self.smoothing, self.gamma)

    def plain_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy."""
        return cross_entropy(logits, labels)

    # --- results

    def calibrate(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """The temperature that fits the probabilities to these rows, see `fit_temperature`."""
        from ft.analysis.calibration import fit_temperature

        return {"temperature": fit_temperature(scores, labels)}

    def metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """See `classification_metrics`."""
        return classification_metrics(softmax(scores), labels, self.label_names)

    def judge(self, scores: np.ndarray, labels: np.ndarray) -> Predictions:
        """One label per row."""
        from ft.analysis import predictions

        return predictions.single_label(softmax(scores), labels)

    def metric_names(self) -> list[str]:
        """See `CLASSIFICATION_METRICS`."""
        return list(CLASSIFICATION_METRICS)

    def predictions(self, scores: np.ndarray) -> np.ndarray:
        """(rows,) the class with the highest score."""
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

    def card_usage(self) -> str:
        """One call."""
        return "classify(text, truncation=True)"
