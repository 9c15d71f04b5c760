"""What a task is: everything that differs between one kind of learning and another; the loop knows no more
than this."""

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

    pipeline_tag: ClassVar[str]  # what the Hub and `pipeline` call it

    def choose_kind(self, values: pa.ChunkedArray, field: pa.Field, names: list[str] | None) -> list[str]:
        """Look at the whole training column, bad rows and all, before anything is learned from it, where that
        decides what is to be learned; returns what to tell the user."""
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
        ClassLabel. Returns what to tell the user."""

    @abstractmethod
    def encode_targets(
        self, values: pa.ChunkedArray, field: pa.Field, rows: np.ndarray, split: str, names: list[str] | None
    ) -> pa.Array:
        """The targets of a split as the numbers that `loss` takes; `UserError` names the row of an unknown
        one."""

    def fit(self, labels: np.ndarray) -> None:  # noqa: B027
        """Learn what depends on the rows that are trained on alone, from their encoded targets: no row of
        another split, set aside from the training data, is among them. Nothing, here."""

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """(rows,) what to hold in proportion when rows are set aside, from encoded targets. The targets,
        here."""
        return labels

    def unlearned(self, learned: np.ndarray, labels: np.ndarray) -> dict[str, int]:
        """Of `labels`, the targets that are not among those that are `learned`, all of them encoded: what
        each is called, and in how many rows it is. Nothing, here."""
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
        """Take what `state` gave."""

    @abstractmethod
    def load_from_model(self, model_config: Any) -> None:
        """Take the targets from the config of a model that was trained for this task."""

    @abstractmethod
    def build_model(
        self, path: str, model_config: Any, notes: list[str], **options: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The pretrained model with a head for the targets, and what was missing in its files
        (`output_loading_info` of `from_pretrained`, to which `options` go); adds to `notes` what the user
        should know of the head."""

    @abstractmethod
    def describe(self) -> str:
        """The targets in a few words, for the summary."""

    def row_weights(self, labels: np.ndarray) -> np.ndarray:
        """(rows,) float64 above 0: what each training row counts in the mean loss of an update. Called once,
        before training, with the encoded targets of all training rows. One for each, here."""
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
        """The weights of a model as others use it, from those that are trained; `model_config`, that of the
        model, gets what goes along. The same, here."""
        return state

    def import_weights(
        self, state: dict[str, torch.Tensor], model_config: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Undo `export_weights`; `state` may hold the trained weights alone. The same, here."""
        return state

    calibration: dict[str, Any] = {}  # noqa: RUF012  (replaced whole, never changed)

    def calibrate(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """What is chosen on validation rows beside the weights, such as thresholds, as JSON. The main process
        calls it at every evaluation of the validation rows, and all take the result as `calibration`: a model
        that is exported then carries what was chosen for its own weights. Nothing, here."""
        return {}

    @property
    @abstractmethod
    def headline(self) -> tuple[str, ...]:
        """The metrics that a summary shows."""

    @property
    @abstractmethod
    def default_metric(self) -> str:
        """The metric that chooses the best model where the user names none."""

    @property
    def metric_style(self) -> str:
        """How a metric that the user names takes predictions, see `ft.metrics.NamedMetrics`."""
        return "classes"

    @property
    def metric_count(self) -> int:
        """Of how many classes or labels such a metric sees predictions."""
        return 2

    @abstractmethod
    def metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Metrics over all rows of a split: numbers under flat keys, and tables under other keys."""

    @abstractmethod
    def judge(self, scores: np.ndarray, labels: np.ndarray) -> Predictions:
        """The predictions for scores (rows, targets), held against the targets, for intervals and tables of
        errors."""

    @abstractmethod
    def metric_names(self) -> list[str]:
        """The numbers that `metrics` gives. `metric_for_best_model` is one of them, or loss, or one that the
        option `metrics` names."""

    @abstractmethod
    def predictions(self, scores: np.ndarray) -> np.ndarray:
        """The predicted targets, as the numbers that `encode_targets` gives."""

    @abstractmethod
    def describe_prediction(self, scores: np.ndarray) -> dict[str, Any]:
        """One row's prediction, and probabilities where there are some, for predictions.jsonl; `scores` is
        (targets,)."""

    @abstractmethod
    def describe_target(self, label: Any) -> Any:
        """An encoded target as it stands in the user's data."""

    @abstractmethod
    def card_labels(self) -> str:
        """The targets in Markdown, for the model card."""

    @abstractmethod
    def card_usage(self, trust_remote_code: bool = False) -> str:
        """How to use an exported model, in Markdown, for the model card; one with code of its own has to be
        trusted."""
