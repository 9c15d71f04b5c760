"""Any number of labels for each text, including none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ft.data.columns import is_list
from ft.errors import UserError
from ft.metrics import AT_HALF, MULTILABEL_METRICS, multilabel_metrics, sigmoid
from ft.tasks.text_classification.kind import Kind, output_layer
from ft.tasks.text_classification.label_names import joined_notes, odd_names
from ft.tasks.text_classification.labels import (
    MULTI,
    in_order,
    name_lists_of,
    numbers_of,
)
from ft.tasks.text_classification.losses import binary_cross_entropy
from ft.tasks.text_classification.thresholds import DEFAULT, choose_thresholds
from ft.tasks.text_classification.weights import Weights, described, label_weights

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from ft.analysis.predictions import Predictions


class MultiLabel(Kind):
    """Sigmoid cross-entropy, the mean over labels whose names come from the data, see `labels.in_order`.

    `pos_weight` weights the labels that a row has against those that it does not have; `threshold_mode`
    (none, global or per_label) says how `calibrate` chooses the probability from which on a label counts as
    predicted: global by default."""

    problem_type: ClassVar[str] = MULTI
    headline: ClassVar[tuple[str, ...]] = ("f1_micro", "f1_macro", "subset_accuracy")
    default_metric: ClassVar[str] = "f1_micro"
    metric_style: ClassVar[str] = "labels"
    blank_is_a_target: ClassVar[bool] = True  # in a text with a delimiter

    def __init__(
        self, delimiter: str | None = None, pos_weight: Weights = "none", gamma: float = 0.0,
        threshold_mode: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.delimiter, self.pos_weight, self.gamma = delimiter, pos_weight, gamma
        self.threshold_mode = threshold_mode
        self.counts, self.rows = np.zeros(0, np.int64), 0  # of each label in training, and those rows
        self._weights: np.ndarray | None = None  # (labels,), known once there are training rows
        self._tensors: dict[Any, torch.Tensor] = {}  # the same on a device

    # --- targets

    def learn(
        self, values: pa.ChunkedArray, field: pa.Field, rows: np.ndarray, names: list[str] | None
    ) -> list[str]:
        """The names of the labels, in their order; the same labels in every row are an error."""
        flat, places = name_lists_of(values, field, rows, "train", names, self.delimiter)
        found = flat.unique().to_pylist()
        self.label_names = in_order(found, names)
        numbers = numbers_of(flat, self.label_names, rows[places], field, "train")
        pairs = np.unique(places * max(1, len(self.label_names)) + numbers)  # a row and one of its labels
        repeated = len(flat) - len(pairs)
        are_flags = set(found) in ({"0", "1"}, {"false", "true"})
        if repeated and are_flags and len(flat) % len(rows) == 0:
            raise UserError(
                f"label_column_name: the training column {field.name!r} holds rows of "
                f"{' and '.join(sorted(found))}; expected the labels that a row has, by name or number, such "
                "as [2, 5]."
            )
        counts = np.bincount(pairs % max(1, len(self.label_names)), minlength=1)
        if not ((counts > 0) & (counts < len(rows))).any():
            what = f"the same labels ({', '.join(found[:8])})" if found else "no label"
            raise UserError(
                f"label_column_name: every row of the training column {field.name!r} has {what}; there is "
                "nothing to tell apart."
            )
        notes = odd_names(self.label_names)
        if repeated:
            notes.append(f"{repeated:,} labels occur twice in their row, and count once")
        if self.delimiter is not None and is_list(values.type):
            notes.append(
                f"label_delimiter: the label column {field.name!r} holds lists, which {self.delimiter!r} "
                "does not split"
            )
        elif self.delimiter is not None:
            notes += joined_notes(found)  # with another one
        return notes

    def encode(
        self, values: pa.ChunkedArray, field: pa.Field, rows: np.ndarray, split: str, names: list[str] | None
    ) -> pa.Array:
        """(rows, labels) of 0 and 1, one byte each."""
        import pyarrow as pa

        flat, places = name_lists_of(values, field, rows, split, names, self.delimiter)
        matrix = np.zeros((len(rows), len(self.label_names)), np.uint8)
        matrix[places, numbers_of(flat, self.label_names, rows[places], field, split)] = 1
        return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1])

    def fit(self, labels: np.ndarray) -> None:
        """Count the training rows that have each label."""
        self.counts, self.rows = labels.sum(axis=0, dtype=np.int64), len(labels)

    def state(self) -> dict[str, Any]:
        """The names of the labels, and how often they occur."""
        return {**super().state(), "counts": self.counts.tolist(), "rows": self.rows}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        super().load_state(state)
        self.counts, self.rows = np.array(state["counts"], np.int64), state["rows"]

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """The rarest label of each row; rows without any are one more stratum."""
        counts = labels.sum(axis=0, dtype=np.int64)
        strata = np.full(len(labels), labels.shape[1])
        # The rarest is set last, of equals the first. (A table of counts is eight times the labels.)
        for label in np.argsort(counts, kind="stable")[::-1]:
            strata[labels[:, label] != 0] = label
        return strata

    def describe(self) -> str:
        """Number and names of the labels, and their weights."""
        names = self.label_names
        text = f"{len(names)} labels, any number a row: {', '.join(names[:8])}{', ...' * (len(names) > 8)}"
        if self.pos_weight == "none" or self._weights is None:
            return text
        return f"{text}; pos_weight {described(names, self._weights)}"

    def describe_target(self, label: Any) -> list[str]:
        """The names of a row's labels."""
        return [self.label_names[number] for number in np.flatnonzero(label)]

    # --- loss

    def row_weights(self, labels: np.ndarray) -> np.ndarray:
        """One per row. This also computes the weights of the labels; balanced: rows without the label / rows
        with it, so that both weigh the same."""
        self._weights = self._weights_of(labels.sum(axis=0, dtype=np.int64), len(labels))
        self._tensors.clear()
        return np.ones(len(labels))

    def _weights_of(self, counts: np.ndarray, rows: int) -> np.ndarray:
        balanced = np.where(counts > 0, (rows - counts) / np.maximum(counts, 1), 1.0)
        balanced[counts == rows] = 1.0  # a label that every training row has would weigh nothing
        return label_weights("pos_weight", self.pos_weight, self.label_names, balanced)

    def training_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy, weighted and focused."""
        return binary_cross_entropy(logits, labels, self._pos_weight(logits), self.gamma)

    def plain_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy."""
        return binary_cross_entropy(logits, labels)

    def _pos_weight(self, like: torch.Tensor) -> torch.Tensor | None:
        if self.pos_weight == "none" or self._weights is None:
            return None
        if like.device not in self._tensors:  # copied once: a copy makes the host wait
            self._tensors[like.device] = like.new_tensor(self._weights)
        return self._tensors[like.device]

    # --- weights of the model

    def head_loaded(self, model: torch.nn.Module, new: set[str]) -> None:
        """Have a new head predict the frequency of each label for every text (Lin et al., 2017, Focal Loss,
        4.1).

        If it starts at one half for each, the first updates push all features one way, and with many rare
        labels a model may stay there: MiniLM never left it on GoEmotions at a rate of 2e-4."""
        import torch

        found = output_layer(model, len(self.label_names))
        if found is None or found[1].bias is None or f"{found[0]}.bias" not in new or not self.rows:
            return
        odds = (self.counts + 0.5) / (self.rows - self.counts + 0.5)
        with torch.no_grad():
            found[1].bias.copy_(torch.from_numpy(np.log(odds * self._weights_of(self.counts, self.rows))))

    # --- results

    @property
    def thresholds(self) -> np.ndarray | None:
        """(labels,) the thresholds that were chosen, or None."""
        chosen = self.calibration.get("thresholds")
        return None if chosen is None else np.array([chosen.get(name, DEFAULT) for name in self.label_names])

    def calibrate(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """The temperature, see `fit_temperature`, and the thresholds of the plain probabilities under the
        names of the labels."""
        from ft.analysis.calibration import fit_temperature

        found: dict[str, Any] = {"temperature": fit_temperature(scores, labels)}
        if self.threshold_mode != "none":
            chosen = choose_thresholds(sigmoid(scores), labels, self.threshold_mode == "per_label")
            found["thresholds"] = dict(zip(self.label_names, chosen.tolist(), strict=True))
        return found

    def load_from_model(self, model_config: Any) -> None:
        """Take the names of the labels, and the thresholds if the model has some, unless `threshold_mode` is
        none. Raises `UserError` if it has none, or others, than were asked for."""
        super().load_from_model(model_config)
        thresholds = getattr(model_config, "thresholds", None)
        if thresholds is None:
            if self.threshold_mode not in (None, "none"):
                raise UserError(
                    f"threshold_mode: found {self.threshold_mode}, but the model holds no thresholds "
                    "(training chooses them); leave it out to score at 0.5."
                )
            self.threshold_mode = "none"
        elif self.threshold_mode != "none":
            # Models of earlier versions do not record it; one value for all may come from either mode.
            seems = "per_label" if len(set(thresholds.values())) > 1 else self.threshold_mode
            held = getattr(model_config, "threshold_mode", seems)
            if self.threshold_mode not in (None, held):
                raise UserError(
                    f"threshold_mode: found {self.threshold_mode}, but the thresholds that the model holds "
                    f"are {held} (training chooses them); leave it out to score at these, or set none to "
                    "score at 0.5."
                )
            self.threshold_mode = held
            self.calibration["thresholds"] = thresholds

    def configure(self, model_config: Any) -> None:
        """Add the thresholds, and how they were chosen."""
        super().configure(model_config)
        if "thresholds" in self.calibration:
            model_config.thresholds = self.calibration["thresholds"]
            model_config.threshold_mode = self.threshold_mode or "global"

    def metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """See `multilabel_metrics`."""
        return multilabel_metrics(sigmoid(scores), labels, self.label_names, self.thresholds)

    def judge(self, scores: np.ndarray, labels: np.ndarray) -> Predictions:
        """Any number of labels per row, at the thresholds."""
        from ft.analysis import predictions

        at_thresholds = None if self.thresholds is None else self.predictions(scores)
        return predictions.multi_label(sigmoid(scores), labels, at_thresholds)

    def metric_names(self) -> list[str]:
        """See `MULTILABEL_METRICS`; if thresholds are chosen, those at 0.5 have names of their own."""
        at_half = [name + AT_HALF for name in MULTILABEL_METRICS if name != "auroc"]
        return [*MULTILABEL_METRICS, *(at_half if self.threshold_mode != "none" else [])]

    def predictions(self, scores: np.ndarray) -> np.ndarray:
        """(rows, labels) of 0 and 1, at the thresholds."""
        thresholds = DEFAULT if self.thresholds is None else self.thresholds
        return (sigmoid(scores) >= thresholds).astype(np.int32)

    def describe_prediction(self, scores: np.ndarray) -> dict[str, Any]:
        """The names of the predicted labels, and the probability of each label."""
        return {
            "prediction": self.describe_target(self.predictions(scores[None])[0]),
            "probabilities": {
                name: round(float(p), 6) for name, p in zip(self.label_names, sigmoid(scores), strict=True)
            },
        }

    def card_usage(self) -> str:
        """All scores, and the labels from their thresholds on."""
        threshold = "0.5" if self.thresholds is None else 'model.config.thresholds[score["label"]]'
        thresholds = "" if self.thresholds is None else "model = classify.model\n"
        return (
            f"{thresholds}scores = classify(text, truncation=True, top_k=None)\n"
            f'[score["label"] for score in scores if score["score"] >= {threshold}]'
        )
