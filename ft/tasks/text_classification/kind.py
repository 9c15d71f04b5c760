"""What differs between the kinds of text classification: targets, losses of the rows, results."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ft.analysis.targets import count_labels
from ft.errors import UserError, printable

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from ft.analysis.predictions import Predictions

# In the config of an exported model; its own "temperature" is about generating texts.
TEMPERATURE = "calibration_temperature"
# Our entries in such a config.
OURS = (TEMPERATURE, "thresholds", "threshold_mode", "target_mean", "target_std", "target_head_bias")


def output_layer(model: Any, size: int) -> tuple[str, torch.nn.Linear] | None:
    """Name and module of the last linear layer of the head, if it has `size` outputs."""
    import torch

    body = f"{getattr(model, 'base_model_prefix', '')}."
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == size and not name.startswith(body)
    ]
    return found[-1] if found else None


def thrown_away(model: Any, trained_for: dict[int, str], names: list[str], mismatched: set[str]) -> list[str]:
    """A note for the user about a trained head that did not fit."""
    found = output_layer(model, len(names))
    if found is None or f"{found[0]}.weight" not in mismatched:
        return []
    return [
        f"the head is a new one: the model's own has other outputs ({len(trained_for)}, not {len(names)})"
    ]


def settle_head(model: Any, trained_for: dict[int, str], names: list[str], new: set[str]) -> list[str]:
    """In a head that was loaded, not newly made, move the outputs of labels that it was trained for, in
    whatever case, to where the data has them; the others become the remaining ones. Returns notes for the
    user.

    (roberta-large-mnli has CONTRADICTION first, GLUE's MNLI entailment.)"""
    import torch

    found, theirs = output_layer(model, len(names)), [trained_for.get(n, "") for n in range(len(names))]
    if found is None or f"{found[0]}.weight" in new or theirs == names:
        return []
    folded = [[name.casefold() for name in some] for some in (theirs, names)]
    if all(len(set(some)) == len(names) for some in folded):  # else labels differ only in case
        order = _places(*folded)
    else:
        order = _places(theirs, names)
    known = sum(place is not None for place in order)
    left = iter(sorted({*range(len(names))} - {*order}))
    order = [next(left) if place is None else place for place in order]
    if order != sorted(order):
        with torch.no_grad():
            for parameter in found[1].parameters():
                parameter.copy_(parameter[order].clone())
    if known == len(names):
        said = "the head was trained for these labels in another order: its outputs were put in the data's"
        return [] if order == sorted(order) else [said]
    before, now = (", ".join(some[:5]) + ", ..." * (len(some) > 5) for some in (theirs, names))
    kept = f"; {known} of them keep their outputs" if known else ""
    return [f"the head is not a new one: it was trained for {before} and continues as {now}{kept}"]


def _places(theirs: list[str], names: list[str]) -> list[Any]:
    """The position of each of some names among others, or None."""
    places = {name: place for place, name in enumerate(theirs)}
    return [places.get(name) for name in names]


class Kind(ABC):
    """One kind of text classification. It knows neither the model nor the run: rows come as columns and
    arrays, scores are the outputs of the model's head."""

    problem_type: ClassVar[str]  # Transformers' name
    headline: ClassVar[tuple[str, ...]]
    default_metric: ClassVar[str]
    metric_style: ClassVar[str]  # see `ft.metrics.NamedMetrics`
    blank_is_a_target: ClassVar[bool] = False

    def __init__(self) -> None:
        self.label_names: list[str] = []
        self.calibration: dict[str, Any] = {}

    # --- targets

    @abstractmethod
    def learn(
        self, values: pa.ChunkedArray, field: pa.Field, rows: np.ndarray, names: list[str] | None
    ) -> list[str]:
        """See `Task.learn_targets`."""

    @abstractmethod
    def encode(
        self, values: pa.ChunkedArray, field: pa.Field, rows: np.ndarray, split: str, names: list[str] | None
    ) -> pa.Array:
        """See `Task.encode_targets`."""

    def fit(self, labels: np.ndarray) -> None:  # noqa: B027
        """See `Task.fit`."""

    def state(self) -> dict[str, Any]:
        """See `Task.state`."""
        return {"label_names": self.label_names}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.label_names = state["label_names"]

    def load_from_model(self, model_config: Any) -> None:
        """Take the names of the labels from the model's `id2label`, and a temperature from its training."""
        names = dict(model_config.id2label)
        if sorted(names) != list(range(len(names))) or len({*names.values()}) < len(names):
            raise UserError(
                f"model_name_or_path: id2label in the model's config.json is {str(names)[:200]}; expected a "
                "name of its own for each output, from 0 on. Fix it (and label2id) in a copy of the model."
            )
        self.label_names = [names[number] for number in range(len(names))]
        temperature = getattr(model_config, TEMPERATURE, None)
        self.calibration = {} if temperature is None else {"temperature": temperature}

    def configure(self, model_config: Any) -> None:
        """Write into a model's config, and so its export, what `load_from_model` reads."""
        model_config.num_labels = len(self.label_names)
        model_config.id2label = dict(enumerate(self.label_names))
        model_config.label2id = {name: number for number, name in enumerate(self.label_names)}
        model_config.problem_type = self.problem_type
        for name in OURS:
            vars(model_config).pop(name, None)  # of the model that training started from
        if "temperature" in self.calibration:
            setattr(model_config, TEMPERATURE, self.calibration["temperature"])

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """See `Task.strata`."""
        return labels

    def unlearned(self, learned: np.ndarray, labels: np.ndarray) -> dict[str, int]:
        """See `Task.unlearned`: labels that no training row has."""
        taught, asked = (count_labels(some, len(self.label_names)) for some in (learned, labels))
        return {
            name: int(rows)
            for name, known, rows in zip(self.label_names, taught, asked, strict=True)
            if rows and not known
        }

    @abstractmethod
    def describe(self) -> str:
        """See `Task.describe`."""

    @abstractmethod
    def describe_target(self, label: Any) -> Any:
        """See `Task.describe_target`."""

    # --- loss

    def row_weights(self, labels: np.ndarray) -> np.ndarray:
        """See `Task.row_weights`."""
        return np.ones(len(labels))

    @abstractmethod
    def training_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(rows,) of logits (rows, head) float32: what is trained on, without the weights of rows."""

    @abstractmethod
    def plain_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(rows,) of logits (rows, head) float32: what an evaluation reports, the same for any weights,
        focusing or smoothing."""

    # --- weights of the model

    def head_loaded(self, model: torch.nn.Module, new: set[str]) -> None:  # noqa: B027
        """Look at a model that was just built; `new` are the names of the parameters that no file had."""

    def export_weights(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Task.export_weights`."""
        return state

    def import_weights(
        self, state: dict[str, torch.Tensor], model_config: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """See `Task.import_weights`."""
        return state

    # --- results

    @abstractmethod
    def metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """See `Task.metrics`."""

    @abstractmethod
    def metric_names(self) -> list[str]:
        """See `Task.metric_names`."""

    def calibrate(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """See `Task.calibrate`."""
        return {}

    @abstractmethod
    def judge(self, scores: np.ndarray, labels: np.ndarray) -> Predictions:
        """See `Task.judge`."""

    @abstractmethod
    def predictions(self, scores: np.ndarray) -> np.ndarray:
        """See `Task.predictions`."""

    @abstractmethod
    def describe_prediction(self, scores: np.ndarray) -> dict[str, Any]:
        """See `Task.describe_prediction`."""

    def card_labels(self) -> str:
        """One name per line, quoted, in a code block: shown verbatim, whatever it means in Markdown or
        HTML."""
        names = "\n".join(json.dumps(printable(name), ensure_ascii=False) for name in self.label_names)
        return f"```text\n{names}\n```"

    @abstractmethod
    def card_usage(self) -> str:
        """The lines of Python that follow `classify = pipeline(...)` and `text = ...` in the model card."""
