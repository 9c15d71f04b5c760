"""Text classification, in Transformers' sense: a label, any number of labels, or a number, for a text or a
pair of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ft.errors import UserError
from ft.tasks.base import Task
from ft.tasks.text_classification.kind import Kind, settle_head, thrown_away
from ft.tasks.text_classification.labels import MULTI, REGRESSION, SINGLE, choose_problem_type
from ft.tasks.text_classification.multi_label import MultiLabel
from ft.tasks.text_classification.regression import Regression
from ft.tasks.text_classification.single_label import SingleLabel
from ft.tasks.text_classification.weights import Weights

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from ft.analysis.predictions import Predictions
    from ft.data.loader import MicroBatch

KINDS: dict[str, type[Kind]] = {kind.problem_type: kind for kind in (SingleLabel, MultiLabel, Regression)}


class TextClassification(Task):
    """A sequence classifier of Transformers, and the kind of classification that its rows call for.

    The kind is `problem_type`, or is chosen from the training column. The other options are for some kinds
    only, and an error for the rest: label_delimiter, pos_weight and threshold_mode for multi-label,
    class_weights and label_smoothing for a single label, focal_gamma for both."""

    pipeline_tag: ClassVar[str] = "text-classification"

    def __init__(
        self, problem_type: str | None = None, label_delimiter: str | None = None,
        class_weights: Weights = "none", pos_weight: Weights = "none", focal_gamma: float = 0.0,
        label_smoothing: float = 0.0, threshold_mode: str | None = None,
    ) -> None:  # fmt: skip
        self.label_delimiter, self.threshold_mode = label_delimiter, threshold_mode
        self.class_weights, self.pos_weight = class_weights, pos_weight
        self.focal_gamma, self.label_smoothing = focal_gamma, label_smoothing
        self.problem_type = problem_type
        self._kind = self._make(problem_type) if problem_type else None

    @property
    def kind(self) -> Kind:
        """The kind; there is none before the training column has been seen."""
        assert self._kind is not None, "choose_kind, load_state or load_from_model comes first"
        return self._kind

    def _make(self, problem_type: str) -> Kind:
        """The kind of that name with its options. `UserError` for an option of another kind."""
        belongs = {
            "label_delimiter": (self.label_delimiter is not None, [MULTI]),
            "class_weights": (self.class_weights != "none", [SINGLE]),
            "pos_weight": (self.pos_weight != "none", [MULTI]),
            "focal_gamma": (self.focal_gamma != 0, [SINGLE, MULTI]),
            "label_smoothing_factor": (self.label_smoothing != 0, [SINGLE]),
            "threshold_mode": (self.threshold_mode is not None, [MULTI]),
        }
        for key, (is_set, kinds) in belongs.items():
            if is_set and problem_type not in kinds:
                raise UserError(
                    f"{key}: is for {' and '.join(kinds)}, but this is {problem_type}; leave it out"
                    f"{HINTS.get((key, problem_type), '')}."
                )
        if problem_type == SINGLE:
            is_said = self.problem_type == SINGLE
            return SingleLabel(self.class_weights, self.label_smoothing, self.focal_gamma, may_mix=is_said)
        if problem_type == MULTI:
            return MultiLabel(self.label_delimiter, self.pos_weight, self.focal_gamma, self.threshold_mode)
        return Regression()

    # --- targets

    def choose_kind(self, values: pa.ChunkedArray, field: pa.Field, names: list[str] | None) -> list[str]:
        """Choose the kind, unless it is known, and report it."""
        if self._kind is not None:
            return []
        problem_type, reason = choose_problem_type(values, field, names, self.label_delimiter)
        self._kind = self._make(problem_type)
        return [f"problem_type: {problem_type}, because {reason}"]

    @property
    def blank_is_a_target(self) -> bool:
        """For texts with several labels, it means none of them."""
        return self.kind.blank_is_a_target

    def learn_targets(
        self, values: pa.ChunkedArray, field: pa.Field, rows: np.ndarray, names: list[str] | None
    ) -> list[str]:
        """See the kinds."""
        return self.kind.learn(values, field, rows, names)

    def encode_targets(
        self, values: pa.ChunkedArray, field: pa.Field, rows: np.ndarray, split: str, names: list[str] | None
    ) -> pa.Array:
        """See the kinds."""
        return self.kind.encode(values, field, rows, split, names)

    def fit(self, labels: np.ndarray) -> None:
        """See the kinds."""
        self.kind.fit(labels)

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """See the kinds."""
        return self.kind.strata(labels)

    def unlearned(self, learned: np.ndarray, labels: np.ndarray) -> dict[str, int]:
        """See the kinds."""
        return self.kind.unlearned(learned, labels)

    @property
    def label_names(self) -> list[str]:
        """The names of the labels, in the order of the model's head; for a number, its own name."""
        return self._kind.label_names if self._kind else []

    @property
    def has_targets(self) -> bool:
        """Whether the names of the labels are known."""
        return bool(self.label_names)

    def state(self) -> dict[str, Any]:
        """The kind and what it learned."""
        return {"problem_type": self.kind.problem_type, **self.kind.state()} if self._kind else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        if self._kind is None or self._kind.problem_type != state["problem_type"]:
            self._kind = self._make(state["problem_type"])
        self._kind.load_state(state)

    def load_from_model(self, model_config: Any) -> None:
        """The kind is the model's `problem_type`; without one, a single number is a regression."""
        theirs = model_config.problem_type
        found = theirs or self.problem_type or (REGRESSION if model_config.num_labels == 1 else SINGLE)
        if self.problem_type not in (None, found):
            raise UserError(
                f"problem_type: found {self.problem_type}, but the model was trained for {found}; leave it "
                "out."
            )
        self._kind = self._make(found)
        self._kind.load_from_model(model_config)

    def describe(self) -> str:
        """See the kinds."""
        return self.kind.describe()

    def describe_target(self, label: Any) -> Any:
        """See the kinds."""
        return self.kind.describe_target(label)

    # --- model and loss

    def build_model(
        self, path: str, model_config: Any, notes: list[str], **options: Any
    ) -> tuple[Any, dict[str, Any]]:
        """A sequence classifier; its config has the names of the labels."""
        from transformers import AutoModelForSequenceClassification

        trained_for = model_config.id2label or {}
        self.kind.configure(model_config)
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            path, config=model_config, output_loading_info=True, **options
        )
        missing = {*loaded["missing_keys"]}
        mismatched = {name for name, *_ in loaded["mismatched_keys"]}
        self.kind.head_loaded(model, missing | mismatched)
        notes += thrown_away(model, trained_for, self.label_names, mismatched)
        if self.kind.problem_type != REGRESSION:
            notes += settle_head(model, trained_for, self.label_names, missing | mismatched)
        return model, loaded

    def row_weights(self, labels: np.ndarray) -> np.ndarray:
        """See the kinds."""
        return self.kind.row_weights(labels)

    def loss(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        """The kind's losses, weighted and summed over the rows."""
        logits = self.score(model, batch)
        return (self.kind.training_losses(logits, batch.labels) * batch.weights).sum()

    def score(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        """Logits (rows, labels)."""
        return batch.of_rows(model(**batch.inputs).logits.float())

    def predict(self, model: torch.nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (rows, labels), and the kind's plain loss of each row."""
        logits = self.score(model, batch)
        return logits, self.kind.plain_losses(logits, batch.labels)

    def export_weights(self, state: dict[str, torch.Tensor], model_config: Any) -> dict[str, torch.Tensor]:
        """See the kinds; what the kind has learned so far is written to the model's config."""
        exported = self.kind.export_weights(state)
        self.kind.configure(model_config)
        return exported

    def import_weights(
        self, state: dict[str, torch.Tensor], model_config: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """See the kinds."""
        return self.kind.import_weights(state, model_config)

    # --- results

    @property
    def headline(self) -> tuple[str, ...]:
        """See the kinds."""
        return self.kind.headline

    @property
    def default_metric(self) -> str:
        """See the kinds."""
        return self.kind.default_metric

    @property
    def metric_style(self) -> str:
        """See the kinds."""
        return self.kind.metric_style

    @property
    def metric_count(self) -> int:
        """See the base."""
        return len(self.label_names)

    def metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """See the kinds."""
        return self.kind.metrics(scores, labels)

    def judge(self, scores: np.ndarray, labels: np.ndarray) -> Predictions:
        """See the kinds."""
        return self.kind.judge(scores, labels)

    def metric_names(self) -> list[str]:
        """See the kinds; those of all kinds before it is known."""
        kinds = [self._kind] if self._kind else [SingleLabel(), MultiLabel(), Regression()]
        return list(dict.fromkeys(name for kind in kinds for name in kind.metric_names()))

    def calibrate(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """See the kinds."""
        return self.kind.calibrate(scores, labels)

    @property
    def calibration(self) -> dict[str, Any]:
        """What `calibrate` returned, and what metrics, predictions and exports use."""
        return self.kind.calibration

    @calibration.setter
    def calibration(self, found: dict[str, Any]) -> None:
        self.kind.calibration = found

    def predictions(self, scores: np.ndarray) -> np.ndarray:
        """See the kinds."""
        return self.kind.predictions(scores)

    def describe_prediction(self, scores: np.ndarray) -> dict[str, Any]:
        """See the kinds."""
        return self.kind.describe_prediction(scores)

    def card_labels(self) -> str:
        """See the kinds."""
        return self.kind.card_labels()

    def card_usage(self, trust_remote_code: bool = False) -> str:
        """With `pipeline`."""
        return USAGE.format(", trust_remote_code=True" * trust_remote_code, self.kind.card_usage())


USAGE = """```python
from transformers import pipeline

classify = pipeline("text-classification", model="path/of/this/folder"{})
text = "a text"  # of a pair: {{"text": "the first", "text_pair": "the second"}}
{}
```"""


HINTS = {
    ("class_weights", MULTI): "; its counterpart is pos_weight",
    ("pos_weight", SINGLE): "; its counterpart is class_weights",
    ("class_weights", REGRESSION): "; a number has no classes to weight",
}
