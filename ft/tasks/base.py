"""What a task is: everything that differs from one kind of learning to another; the loop knows only this
interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from ft.analysis.predictions import Predictions
    from ft.data.loader import MicroBatch


class Task(ABC):
    """Targets, loss, weights and metrics of one kind of learning.

    A task first learns what the targets are from the training rows (`choose_kind`, `learn_targets`, `fit`),
    or takes it from an earlier run (`load_state`) or a model (`load_from_model`); from then on it turns
    targets into numbers, (rows,) or (rows, targets), and rows into a loss."""

    pipeline_tag: ClassVar[str]  # its name on the Hub and in `pipeline`

    def choose_kind(self, values: pa.ChunkedArray, field: pa.Field, names: list[str] | None) -> list[str]:
        """Look at the whole training column, including bad rows, before anything is learned from it, if that
        decides what is to be learned; returns notes for the user."""
        return []

    @property
    def blank_is_a_target(self) -> bool:
        """Whether an empty text is a target, not a missing one."""
        return False

    @abstractmethod
    def learn_targets(
        self, values: pa.ChunkedArray, field: pa.Field, rows: np.ndarray, names: list[str] | None
    ) -> list[str]:
        """Learn the targets from the training column; `rows` are its row numbers, `names` those of a
        ClassLabel. Returns notes for the user."""

    @abstractmethod
    def encode_targets(
        self, values: pa.ChunkedArray, field: pa.Field, rows: np.ndarray, split: str, names: list[str] | None
    ) -> pa.Array:
        """The targets of a split as the numbers that `loss` takes; `UserError` names the row of an unknown
        one."""

    def fit(self, labels: np.ndarray) -> None:  # noqa: B027
        """Learn what depends only on the rows that are trained on, from their encoded targets: no row of
        another split, set aside from the training data, is among them. Nothing by default."""

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """(rows,) what to stratify by when rows are set aside, from encoded targets. By default, the
        targets."""
        return labels

    def unlearned(self, learned: np.ndarray, labels: np.ndarray) -> dict[str, int]:
        """The targets in `labels` that are not in `learned`, both encoded: the name of each, and how many
        rows have it. None by default."""
        return {}

    @property
    @abstractmethod
    def has_targets(self) -> bool:
        """Whether the targets are known already: learned, or taken from a model or an earlier run."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What was learned, as JSON."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""

    @abstractmethod
    def load_from_model(self, model_config: Any) -> None:
        """Take the targets from the config of a model that was trained for this task."""

    @abstractmethod
    def build_model(
        self, path: str, model_config: Any, notes: list[str], **options: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The pretrained model with a head for the targets, and what was missing in its files
        (`output_loading_info` of `from_pretrained`, to which `options` go); adds to `notes` what the user
        should know about the head."""

    @abstractmethod
    def describe(self) -> str:
        """The targets in a few words, for the summary."""

    def row_weights(self, labels: np.ndarray) -> np.ndarray:
        """(rows,) float64 above 0: the weight of each training row in the mean loss of an update. Called
        once, before training, with the encoded targets of all training rows. Ones by default."""
        return np.ones(len(labels))

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        """The sum (not the mean) of the rows' losses times their weights: a scalar on the device."""

    @abstractmethod
    def score(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        """Scores (rows, targets) float32 on the device, from the texts alone: `batch` may have no labels."""

    @abstractmethod
    def predict(self, model: torch.nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (rows, targets) and the unsmoothed loss of each row (rows,), both float32 on the device."""

    def export_weights(self, state: dict[str, torch.Tensor], model_config: Any) -> dict[str, torch.Tensor]:
        """The weights of a model as others use it, from those that are trained; what belongs to them is added
        to `model_config`, the model's. Unchanged by default."""
        return state

    def import_weights(
        self, state: dict[str, torch.Tensor], model_config: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Undo `export_weights`; `state` may hold only the trained weights. Unchanged by default."""
        return state

    calibration: dict[str, Any] = {}  # noqa: RUF012  (replaced whole, never changed)

    def calibrate(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """What is chosen on validation rows beside the weights, such as thresholds, as JSON. The main process
        calls it at every evaluation of the validation rows, and all take the result as `calibration`: an
        exported model then carries what was chosen for its own weights. Nothing by default."""
        return {}

    @property
    @abstractmethod
    def headline(self) -> tuple[str, ...]:
        """The metrics that a summary shows."""

    @property
    @abstractmethod
    def default_metric(self) -> str:
        """The metric that selects the best model if the user names none."""

    @property
    def metric_style(self) -> str:
        """The style of predictions that a user's metric takes, see `ft.metrics.NamedMetrics`."""
        return "classes"

    @property
    def metric_count(self) -> int:
        """The number of classes or labels in these predictions."""
        return 2

    @abstractmethod
    def metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Metrics over all rows of a split: numbers under flat keys, and tables under other keys."""

    @abstractmethod
    def judge(self, scores: np.ndarray, labels: np.ndarray) -> Predictions:
        """The predictions for scores (rows, targets), compared with the targets, for intervals and tables of
        errors."""

    @abstractmethod
    def metric_names(self) -> list[str]:
        """The numbers that `metrics` returns. `metric_for_best_model` is one of them, or loss, or one that
        the option `metrics` names."""

    @abstractmethod
    def predictions(self, scores: np.ndarray) -> np.ndarray:
        """The predicted targets, as the numbers that `encode_targets` gives."""

    @abstractmethod
    def describe_prediction(self, scores: np.ndarray) -> dict[str, Any]:
        """One row's prediction, and probabilities where there are some, for predictions.jsonl; `scores` is
        (targets,)."""

    @abstractmethod
    def describe_target(self, label: Any) -> Any:
        """An encoded target as in the user's data."""

    @abstractmethod
    def card_labels(self) -> str:
        """The targets in Markdown, for the model card."""

    @abstractmethod
    def card_usage(self, trust_remote_code: bool = False) -> str:
        """How to use an exported model, in Markdown, for the model card; one with custom code has to be
        trusted."""
