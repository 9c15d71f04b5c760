"""A number for each text."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ft.data.audit import describe_rows, describe_values
from ft.data.tables import is_mixed
from ft.errors import UserError
from ft.metrics import REGRESSION_METRICS, regression_metrics
from ft.tasks.text_classification.kind import Kind, output_layer
from ft.tasks.text_classification.labels import DECIMAL, REGRESSION, SINGLE

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from ft.analysis.predictions import Predictions

BINS = 10  # of the targets, to split in proportion
# Magnitude of a target. float32 ends at 3.4e38, and an exported head has the targets' scale in its weights.
LARGEST = 1e36


class Regression(Kind):
    """Squared error of one number per row, standardised internally.

    The head learns (target - mean) / scale, with the mean of the training rows and the power of two nearest
    to their standard deviation. An exported head outputs the target itself: its weights are multiplied by the
    scale (by a power of two, without rounding, so that it can be undone) and the mean is added to its bias.
    The loss is in units of the training rows' variance: 1 is that of always predicting their mean."""

    problem_type: ClassVar[str] = REGRESSION
    headline: ClassVar[tuple[str, ...]] = ("spearmanr", "pearsonr", "mse")
    default_metric: ClassVar[str] = "spearmanr"
    metric_style: ClassVar[str] = "numbers"

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.std = 0.0, 1.0  # of the training rows
        self._head, self._has_bias = "", True  # the linear layer that outputs the number
        self._bias: float | None = None  # of the last exported head, in the unit in which it learns

    @property
    def offset(self) -> float:
        """What is subtracted from a target before it is learned."""
        return self.mean if self._has_bias else 0.0

    @property
    def scale(self) -> float:
        """What a target is then divided by: the power of two nearest to its standard deviation."""
        return 2.0 ** round(math.log2(self.std if self._has_bias else math.hypot(self.std, self.mean)))

    # --- targets

    def learn(
        self, values: pa.ChunkedArray, field: pa.Field, rows: np.ndarray, names: list[str] | None
    ) -> list[str]:
        """The name of the column; mean and standard deviation come with `fit`."""
        self.label_names = [field.name]
        return []

    def encode(
        self, values: pa.ChunkedArray, field: pa.Field, rows: np.ndarray, split: str, names: list[str] | None
    ) -> pa.Array:
        """(rows,) float64, in their original unit."""
        import pyarrow as pa

        return pa.array(_numbers(values, field, rows, split, names))

    def fit(self, labels: np.ndarray) -> None:
        """Mean and standard deviation; the same number in every row is an error."""
        self.mean, self.std = float(labels.mean()), float(labels.std())
        if not self.std > 1e-12 * abs(self.mean):
            raise UserError(
                f"label_column_name: every training row has the target {self.mean:g} in "
                f"{self.label_names[0]!r}; there is nothing to learn."
            )

    def state(self) -> dict[str, Any]:
        """The name of the target, and how it is standardised."""
        return {**super().state(), "mean": self.mean, "std": self.std}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        super().load_state(state)
        self.mean, self.std = state["mean"], state["std"]

    def load_from_model(self, model_config: Any) -> None:
        """The name of the target, and how it was standardised; a model from elsewhere outputs it unscaled."""
        super().load_from_model(model_config)
        self.mean = getattr(model_config, "target_mean", None) or 0.0
        self.std = getattr(model_config, "target_std", None) or 1.0
        self._bias = getattr(model_config, "target_head_bias", None)

    def configure(self, model_config: Any) -> None:
        """Add the mean and the standard deviation; the bias of the head before the mean was added makes an
        import exact."""
        super().configure(model_config)
        model_config.target_mean, model_config.target_std = self.mean, self.std
        if self._bias is not None:
            model_config.target_head_bias = self._bias

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """Ten bins of equally many rows, by the target."""
        bins = max(1, min(BINS, len(labels) // 2))
        ranks = np.empty(len(labels), np.int64)
        ranks[np.argsort(labels, kind="stable")] = np.arange(len(labels))
        return ranks * bins // len(labels)

    def unlearned(self, learned: np.ndarray, labels: np.ndarray) -> dict[str, int]:
        """No number has to occur in training."""
        return {}

    def describe(self) -> str:
        """The target and its spread."""
        return (
            f"regression of {self.label_names[0]!r}, mean {self.mean:.4g}, standard deviation {self.std:.4g}"
        )

    def describe_target(self, label: Any) -> float:
        """The number."""
        return float(label)

    # --- loss

    def training_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Squared error in units of the training rows' variance."""
        targets = ((labels - self.offset) / self.scale).float()
        return (logits[:, 0] - targets).square() * (self.scale / self.std) ** 2

    def plain_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The same."""
        return self.training_losses(logits, labels)

    # --- weights of the model

    def head_loaded(self, model: torch.nn.Module, new: set[str]) -> None:
        """Find the head. A loaded one outputs the target itself. One without a bias cannot hold a mean: the
        target is then only scaled."""
        found = output_layer(model, 1)
        if found is None:
            raise UserError(
                f"model_name_or_path: {type(model).__name__} ends in no linear layer with one output, which "
                "regression needs; choose another model."
            )
        self._head, head = found
        self._has_bias = head.bias is not None
        if f"{self._head}.weight" not in new:
            own = model.state_dict()
            for name, value in self.import_weights(own, vars(model.config)).items():
                if value is not own[name]:
                    own[name].copy_(value)

    def export_weights(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The head in the target's original unit."""
        weight, bias = f"{self._head}.weight", f"{self._head}.bias"
        exported = {**state, weight: state[weight] * self.scale}
        if self._has_bias:
            self._bias = float(state[bias])
            exported[bias] = state[bias].new_full((1,), _exported(self._bias, self.scale, self.mean))
        return exported

    def import_weights(
        self, state: dict[str, torch.Tensor], model_config: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """The head in the unit in which it learns; exact to the bit if `export_weights` made it."""
        weight, bias = f"{self._head}.weight", f"{self._head}.bias"
        imported = {**state, weight: state[weight] / self.scale}
        if self._has_bias:
            exact, found = model_config.get("target_head_bias"), float(state[bias])
            if exact is None or found != _exported(exact, self.scale, self.mean):
                exact = (found - self.mean) / self.scale
            imported[bias] = state[bias].new_full((1,), exact)
        return imported

    # --- results

    def in_own_unit(self, scores: np.ndarray) -> np.ndarray:
        """(rows,) float64 of scores (rows, 1)."""
        return scores[:, 0].astype(np.float64) * self.scale + self.offset

    def metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """See `regression_metrics`; in the target's original unit."""
        return regression_metrics(self.in_own_unit(scores), labels)

    def judge(self, scores: np.ndarray, labels: np.ndarray) -> Predictions:
        """A number per row, in its original unit."""
        from ft.analysis import predictions

        return predictions.regression(self.in_own_unit(scores), labels)

    def metric_names(self) -> list[str]:
        """See `REGRESSION_METRICS`."""
        return list(REGRESSION_METRICS)

    def predictions(self, scores: np.ndarray) -> np.ndarray:
        """(rows,) float64 in the target's original unit."""
        return self.in_own_unit(scores)

    def describe_prediction(self, scores: np.ndarray) -> dict[str, Any]:
        """The number."""
        return {"prediction": float(self.in_own_unit(scores[None])[0])}

    def card_labels(self) -> str:
        """The name of the number, and its spread."""
        spread = f"of the training rows: mean {self.mean:.6g}, standard deviation {self.std:.6g}"
        return f"{super().card_labels()}\n\nOne number, in its own unit ({spread})."

    def card_usage(self) -> str:
        """One call."""
        return 'classify([text], truncation=True)[0]["score"]'


def _exported(bias: float, scale: float, mean: float) -> float:
    """The bias of the head in the target's original unit, as the float32 that is stored."""
    return float(np.float32(bias * scale + mean))


def _numbers(
    values: pa.ChunkedArray, field: pa.Field, rows: np.ndarray, split: str, names: list[str] | None
) -> np.ndarray:
    """A column of any type as float64. Raises `UserError` for a value that is not a finite number, or that no
    head in float32 can output."""
    import pyarrow as pa

    where = f"{split} data: the label column {field.name!r}"
    # The training rows decide what is learned.
    remedy = f"; or, for labels, set problem_type: {SINGLE}." if split == "train" else "."
    numeric = pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
    if names is None and (numeric or pa.types.is_decimal(values.type)):
        numbers = np.asarray(values.cast(pa.float64(), safe=False), np.float64)
        broken = np.flatnonzero(~(np.abs(numbers) <= LARGEST))  # NaN, too
        found = numbers[broken].tolist()
    elif names is None and (is_mixed(field) or pa.types.is_large_string(values.type)):
        read = json.loads if is_mixed(field) else _read
        plain = [read(value) for value in values.to_pylist()]
        good = [isinstance(v, int | float) and not isinstance(v, bool) and abs(v) <= LARGEST for v in plain]
        broken = np.flatnonzero(~np.array(good))
        found = [plain[place] for place in broken]
        numbers = np.array(plain if not len(broken) else [], np.float64)
    else:
        kind = "classes" if names else values.type
        raise UserError(f"{where} holds {kind}; regression expects numbers. Name another column{remedy}")
    if len(broken):
        expected, mend = "a finite number", f"Fix what is wrong{remedy}"
        if any(isinstance(value, int | float) and LARGEST < abs(value) < math.inf for value in found):
            expected = f"a number of at most {LARGEST:g} in size"
            mend = "Where it marks a missing value, take the row out; else give the targets in a larger unit."
        raise UserError(
            f"{where}: {describe_rows(rows[broken])}: found {describe_values(found)}, expected {expected}; "
            f"rows count from 0. {mend}"
        )
    return numbers


def _read(text: str) -> float | str:
    """The number that a text is, or the text."""
    text = text.strip()
    return float(text) if DECIMAL.fullmatch(text) else text
