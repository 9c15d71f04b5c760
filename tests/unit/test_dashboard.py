"""The charts of each kind of label: exact points, few of them, and no text that must not be shown."""

import numpy as np
import pytest
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score, roc_curve

from ft.analysis.curves import precision_recall, roc
from ft.config import Config
from ft.dashboard import MOST_CELLS, MOST_CURVES, charts
from ft.evaluation import Evaluation
from ft.metrics import classification_metrics, multilabel_metrics, sigmoid, softmax

TEXT = "a private text"


def charts_of(labels, scores, metrics, **options):
    """The charts of a validation split with these metrics."""
    results = {f"eval/{name}": value for name, value in metrics.items()}
    return charts(Config(**options), results, {"validation": Evaluation({}, scores, labels)})


@pytest.fixture
def generator():
    return np.random.default_rng(3)


@pytest.mark.parametrize("rows", [7, 50_000])
def test_curves_hold_points_of_the_exact_curve_evenly_and_both_ends(generator, rows):
    happened = generator.random(rows) < 0.3
    happened[:2] = True, False
    probability = np.clip(generator.normal(0.4 + 0.2 * happened, 0.2), 0, 1).round(4)
    x, y = roc(probability, happened)
    exact = {*zip(*roc_curve(happened, probability)[:2], strict=True)}
    assert {*zip(x, y, strict=True)} <= exact and len(x) <= 200
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert auc(x, y) == pytest.approx(roc_auc_score(happened, probability), abs=1e-3)

    recall, precision = precision_recall(probability, happened)
    exact = {*zip(*precision_recall_curve(happened, probability)[:2], strict=True)}
    assert {*zip(precision, recall, strict=True)} <= exact and len(recall) <= 200
    assert (recall[0], precision[0], recall[-1]) == (0, 1, 1)
    # No gaps except those of the exact curve.
    widest = max(1 / 199, np.diff(np.unique(precision_recall_curve(happened, probability)[1])).max())
    assert np.diff(recall).max() <= 2 * widest


def test_several_labels_have_a_curve_each_where_some_rows_have_them_and_some_not(generator):
    labels = (generator.random((80, 4)) < [0.5, 0.2, 0.0, 1.0]).astype(np.uint8)
    scores = generator.normal(size=(80, 4)) + labels
    metrics = multilabel_metrics(sigmoid(scores), labels, ["a", "b", "never", "always"])
    found = charts_of(labels, scores, metrics)
    assert found.keys() == {"eval/pr_curve", "eval/roc_curve"}  # no row has one label out of several
    for name, curve in (("eval/pr_curve", precision_recall), ("eval/roc_curve", roc)):
        for number, label in enumerate("ab"):
            points = [tuple(row[1:]) for row in found[name].rows if row[0] == label]
            expected = curve(sigmoid(scores)[:, number], labels[:, number] == 1)
            assert points == [tuple(point) for point in np.stack(expected, axis=1).tolist()]
        assert {row[0] for row in found[name].rows} == {"a", "b"}


def test_a_number_has_its_worst_errors_alone():
    errors = [{"row": 4, "text": TEXT, "label": 3.5, "prediction": 1.0, "error": 2.5}]
    found = charts_of(np.zeros(5, np.float32), np.zeros((5, 1)), {"mse": 1.0, "worst_errors": errors})
    assert found.keys() == {"eval/worst_errors"}
    table = found["eval/worst_errors"]
    assert [dict(zip(table.columns, row, strict=True)) for row in table.rows] == errors


def test_errors_of_several_labels_are_cells_and_all_of_them_go_with_log_texts():
    errors = [{"row": 4, "text": TEXT, "label": ["a", "b"], "prediction": [], "confidence": 0.5}]
    metrics = {"worst_errors": errors, "reliability": [{"probability": 0.4, "share": 0.5}]}
    scores = np.zeros((5, 2))
    found = charts_of(np.zeros((5, 2), np.uint8), scores, metrics)
    assert found["eval/worst_errors"].rows == [[4, TEXT, "a, b", "", 0.5]]
    found = charts_of(np.zeros((5, 2), np.uint8), scores, metrics, log_texts=False)
    assert found.keys() == {"eval/calibration"} and TEXT not in repr(found)


def test_many_classes_have_the_largest_cells_and_the_curves_of_the_most_frequent(generator):
    names = [f"c{number:03}" for number in range(150)]
    labels = np.concatenate([np.arange(150), generator.integers(0, 12, 400)])
    scores = generator.normal(size=(550, 150))
    scores[np.arange(550), labels] += 2
    metrics = classification_metrics(softmax(scores), labels, names)
    found = charts_of(labels, scores, metrics)
    cells = found["eval/confusion_matrix"].rows
    assert len(cells) <= MOST_CELLS and sum(count for *_, count in cells) == 550 and cells[0][2] > 10
    frequent = np.argsort(-np.bincount(labels), kind="stable")[:MOST_CURVES]
    assert {row[0] for row in found["eval/roc_curve"].rows} == {names[number] for number in frequent}
