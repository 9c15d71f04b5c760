"""Metrics: a hand-worked example, scikit-learn's own numbers, and the metrics that a user names."""

import numpy as np
import pytest
from sklearn import metrics as sk

from ft.errors import UserError
from ft.metrics import CLASSIFICATION_METRICS, NamedMetrics, classification_metrics
from ft.tasks.text_classification import TextClassification, softmax


def certain(predicted, classes):
    """Probabilities that leave no doubt of the predicted classes."""
    return np.eye(classes)[predicted] * 0.9 + 0.1 / classes


def test_a_hand_worked_example():
    #            a  a  a  b  b  c
    labels = np.array([0, 0, 0, 1, 1, 2])
    predicted = np.array([0, 0, 1, 1, 2, 2])
    found = classification_metrics(certain(predicted, 3), labels, ["a", "b", "c"])
    # a: 2 of 2 predicted right, 2 of 3 found; b: 1 of 2, 1 of 2; c: 1 of 2, 1 of 1.
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["precision_macro"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert found["recall_macro"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    f1 = [4 / 5, 1 / 2, 2 / 3]
    assert found["f1_macro"] == pytest.approx(sum(f1) / 3)
    assert found["f1_weighted"] == pytest.approx((3 * f1[0] + 2 * f1[1] + f1[2]) / 6)
    # Matthews: (c s - sum p t) / sqrt((s^2 - sum p^2) (s^2 - sum t^2)), with c = 4 right of s = 6 rows,
    # p = (2, 2, 2) predicted and t = (3, 2, 1) true.
    assert found["matthews_correlation"] == pytest.approx((24 - 12) / np.sqrt((36 - 12) * (36 - 14)))
    assert found["confusion_matrix"] == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert found["per_class"]["a"] == {
        "precision": 1.0, "recall": pytest.approx(2 / 3), "f1": pytest.approx(0.8), "support": 3,
    }  # fmt: skip


def test_auroc_by_hand():
    # Of the 4 pairs (a row of the second class, a row of the first) 3 are in the right order.
    second = np.array([0.1, 0.4, 0.35, 0.8])
    found = classification_metrics(np.stack([1 - second, second], 1), np.array([0, 0, 1, 1]), ["no", "yes"])
    assert found["auroc"] == pytest.approx(0.75)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_equal_to_scikit_learn(classes):
    generator = np.random.default_rng(classes)
    labels = np.concatenate([np.arange(classes), generator.integers(0, classes, 200)])
    scores = generator.normal(size=(len(labels), classes)) + 1.5 * np.eye(classes)[labels]
    probabilities = softmax(scores)
    predicted = probabilities.argmax(1)
    found = classification_metrics(probabilities, labels, [f"class {i}" for i in range(classes)])
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "f1_macro": sk.f1_score(labels, predicted, average="macro"),
        "f1_weighted": sk.f1_score(labels, predicted, average="weighted"),
        "precision_macro": sk.precision_score(labels, predicted, average="macro"),
        "recall_macro": sk.recall_score(labels, predicted, average="macro"),
        "matthews_correlation": sk.matthews_corrcoef(labels, predicted),
        "auroc": np.mean([sk.roc_auc_score(labels == c, probabilities[:, c]) for c in range(classes)]),
    }
    assert set(expected) == set(CLASSIFICATION_METRICS)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    assert found["confusion_matrix"] == sk.confusion_matrix(labels, predicted).tolist()


def test_a_class_that_no_row_has():
    """Macro means are over the classes that occur, as in scikit-learn; AUROC is not defined."""
    labels, predicted = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    found = classification_metrics(certain(predicted, 4), labels, ["a", "b", "c", "d"])
    assert found["f1_macro"] == pytest.approx(sk.f1_score(labels, predicted, average="macro"))
    assert found["auroc"] is None
    assert found["per_class"]["d"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert np.shape(found["confusion_matrix"]) == (4, 4)


def test_a_class_that_is_only_predicted_counts_as_a_failure():
    labels, predicted = np.array([0, 0, 1, 1]), np.array([0, 2, 1, 1])
    found = classification_metrics(certain(predicted, 3), labels, ["a", "b", "c"])
    assert found["f1_macro"] == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_rows_of_one_class_alone():
    found = classification_metrics(certain(np.array([1, 1, 1]), 2), np.array([1, 1, 1]), ["a", "b"])
    assert (found["accuracy"], found["f1_macro"], found["matthews_correlation"]) == (1.0, 1.0, 0.0)
    assert found["auroc"] is None


def test_logits_far_apart_are_no_nan():
    found = softmax(np.array([[1e4, -1e4], [-3e38, 0.0]], np.float32))
    assert np.array_equal(found, [[1, 0], [0, 1]])


# --- the metrics that a user names


OURS = list(CLASSIFICATION_METRICS)
LABELS, PREDICTED = np.array([0, 1, 2, 2, 1]), np.array([0, 1, 2, 1, 1])


def test_without_a_network_a_known_name_is_computed_here_and_that_is_said():
    named = NamedMetrics(["accuracy", "f1", "roc_auc", "recall_macro"], OURS)
    assert named.keys() == ["accuracy", "f1", "roc_auc", "recall_macro"] and len(named.notes) == 4
    assert "'accuracy': computed here" in named.notes[0]
    ours = classification_metrics(certain(PREDICTED, 3), LABELS, ["a", "b", "c"])
    assert named.compute(PREDICTED, LABELS, ours, 3) == {
        "accuracy": ours["accuracy"], "f1": ours["f1_macro"], "roc_auc": ours["auroc"],
        "recall_macro": ours["recall_macro"],
    }  # fmt: skip


def test_an_unknown_name_is_refused_with_those_that_are_known():
    with pytest.raises(UserError, match=r"metrics: 'acuracy'.*accuracy, f1_macro.*folder") as error:
        NamedMetrics(["acuracy"], OURS)
    assert "\n" not in str(error.value)


METRIC = """
import datasets
import evaluate


class Errors(evaluate.Metric):
    def _info(self):
        number = datasets.Value("int32")
        features = datasets.Features({"predictions": number, "references": number})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"errors": sum(p != r for p, r in zip(predictions, references))}
"""


def test_a_metric_of_evaluate_in_a_folder(tmp_path):
    (tmp_path / "errors").mkdir()
    (tmp_path / "errors" / "errors.py").write_text(METRIC)
    named = NamedMetrics([str(tmp_path / "errors")], OURS)
    assert named.keys() == ["errors"] and named.notes == []
    assert named.compute(PREDICTED, LABELS, {}, 3) == {"errors": 1}
    assert named.compute(LABELS, LABELS, {}, 3) == {"errors": 0}  # and again


def test_the_task_gives_the_metrics_that_it_names():
    task = TextClassification()
    task.load_state({"label_names": ["a", "b", "c"]})
    found = task.metrics(certain(PREDICTED, 3).astype(np.float32), LABELS)
    assert set(task.metric_names()) == {
        key for key, value in found.items() if not isinstance(value, dict | list)
    }
    assert task.predictions(certain(PREDICTED, 3)).tolist() == PREDICTED.tolist()
