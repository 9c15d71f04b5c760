"""What W&B shows and stores of a finished run: charts of the contents of results.json, the data set and the
model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ft.analysis.curves import precision_recall, roc
from ft.config import Config
from ft.data.prepare import Data
from ft.durable import digest
from ft.evaluation import Evaluation, found_of, prefix_of
from ft.metrics import sigmoid, softmax
from ft.wandb_run import Artifact, Chart

MOST_CURVES = 10  # classes, the most frequent ones
MOST_CELLS = 10_000  # of a confusion matrix: the most rows of a table that W&B takes


def charts(config: Config, results: Mapping[str, Any], scored: Mapping[str, Evaluation]) -> dict[str, Chart]:
    """The charts of each scored split, under names such as test/roc_curve, as far as its kind of label has
    them.

    `results` is the content of results.json. Texts of the data are only in worst_errors, which is left out
    without `log_texts`."""
    found: dict[str, Chart] = {}
    for split, evaluation in scored.items():
        of, scores, labels = found_of(results, split), evaluation.scores, evaluation.labels
        drawn: dict[str, Chart] = {}
        if "confusion_matrix" in of:
            drawn["confusion_matrix"] = _confusion(of["confusion_matrix"], list(of["per_class"]), split)
        if each := of.get("per_class", of.get("per_label")):
            assert scores is not None and labels is not None
            probabilities = softmax(scores) if "per_class" in of else sigmoid(scores)
            drawn |= _curves(probabilities, labels, list(each), split)
        if "reliability" in of:
            drawn["calibration"] = _calibration(of["reliability"], split)
        if config.log_texts and of.get("worst_errors"):
            drawn["worst_errors"] = _errors(of["worst_errors"], split)
        found |= {f"{prefix_of(split)}/{name}": chart for name, chart in drawn.items()}
    return found


def _confusion(matrix: list[list[int]], names: list[str], split: str) -> Chart:
    """All cells if they are not too many, else the largest."""
    cells = [
        (names[true], names[guess], count)
        for true, counts in enumerate(matrix)
        for guess, count in enumerate(counts)
    ]
    if len(cells) > MOST_CELLS:
        cells = sorted((cell for cell in cells if cell[2]), key=lambda cell: -cell[2])[:MOST_CELLS]
    return Chart("matrix", f"confusion matrix, {split}", ["label", "prediction", "rows"], cells)


def _curves(probabilities: np.ndarray, labels: np.ndarray, names: list[str], split: str) -> dict[str, Chart]:
    """Precision and recall, and the ROC, of each class against the rest, where there are both."""
    has = labels[:, None] == np.arange(len(names)) if labels.ndim == 1 else labels != 0
    counts = has.sum(axis=0)
    both = np.flatnonzero((counts > 0) & (counts < len(labels)))
    shown = both[np.argsort(-counts[both], kind="stable")][:MOST_CURVES]
    drawn = {}
    for key, title, curve, axes in (
        ("pr_curve", "precision and recall", precision_recall, ["recall", "precision"]),
        ("roc_curve", "ROC", roc, ["false positive rate", "true positive rate"]),
    ):
        rows = [
            (names[n], float(x), float(y))
            for n in shown
            for x, y in zip(*curve(probabilities[:, n], has[:, n]), strict=True)
        ]
        if rows:
            drawn[key] = Chart("curves", f"{title}, {split}", ["class", *axes], rows)
    return drawn


def _calibration(table: list[dict[str, Any]], split: str) -> Chart:
    """How often what was given a probability was right, against the diagonal."""
    rows = [("the model", part["probability"], part["share"]) for part in table]
    rows += [("perfect", 0.0, 0.0), ("perfect", 1.0, 1.0)]
    return Chart("curves", f"calibration, {split}", ["curve", "probability", "share that happened"], rows)


def _errors(lines: list[dict[str, Any]], split: str) -> Chart:
    """The lines of worst_errors, which are few and have truncated texts."""
    columns = list(dict.fromkeys(name for line in lines for name in line))
    rows = [[_cell(line.get(name)) for name in columns] for line in lines]
    return Chart("table", f"worst errors, {split}", columns, rows)


def _cell(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def artifacts(config: Config, data: Data, results: Mapping[str, Any], output_dir: Path) -> list[Artifact]:
    """What `log_artifacts` asks for: statistics of the data, with the fingerprints in environment.json and
    those of the sources' bytes; the model in best/, with the SHA-256 of its weights and its headline
    metrics."""
    source = config.dataset_name or config.train_file or ""
    kept = []
    if config.log_artifacts in ("dataset", "all"):
        rows = {name: len(split) for name, split in data.splits.items()}
        about = {"fingerprint": data.fingerprint, "sources": data.sources, "rows": rows}
        known = {**about, "columns": vars(data.columns), "splits": data.facts}
        kept.append(Artifact("dataset", Path(source).name, about, known))
    if config.log_artifacts in ("model", "all"):
        best = output_dir / "best"
        about = {
            "fingerprint": digest(best / "model.safetensors")["sha256"],
            "data_fingerprint": data.fingerprint,
            "model_name_or_path": config.model_name_or_path,
        }
        shown = [f"{prefix}/{name}" for prefix in ("best", "test") for name in (*results["headline"], "step")]
        about |= {name: results[name] for name in shown if results.get(name) is not None}
        kept.append(Artifact("model", config.run_name or output_dir.resolve().name, about, best))
    return kept
