"""Metrics: a hand-worked example, scikit-learn's own numbers, and the metrics that a user names."""

import json
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import METRIC, metric_in
from sklearn import metrics as sk

from ft.errors import UserError
from ft.metrics import (
    AT_HALF,
    CLASSIFICATION_METRICS,
    MATRIX_CLASSES,
    MULTILABEL_METRICS,
    REGRESSION_METRICS,
    NamedMetrics,
    classification_metrics,
    multilabel_metrics,
    regression_metrics,
    sigmoid,
    softmax,
)  # fmt: skip
from ft.tasks.text_classification import TextClassification


def test_f1_of_a_single_label_is_that_of_its_rows():
    """For a matrix of one column, scikit-learn's micro F1 is the accuracy."""
    from datasets import Features, Sequence, Value

    rows = Sequence(Value("int32"))  # as `evaluate` expects them

    def compute(average, **given):
        given = Features(predictions=rows, references=rows).encode_batch(given)
        return {"f1": sk.f1_score(given["references"], given["predictions"], average=average)}

    named, metric = NamedMetrics([], [], "labels"), Mock(compute=compute)
    truth, predicted = np.array([[1], [1], [0], [0]]), np.array([[1], [0], [0], [0]])
    two = np.hstack([predicted] * 2), np.hstack([truth] * 2)
    for given in ((predicted, truth), two):
        assert named._of_evaluate("f1", metric, *given)["f1"] == pytest.approx(2 / 3)


def certain(predicted, classes):
    """Probabilities that leave no doubt about the predicted classes."""
    return np.eye(classes)[predicted] * 0.9 + 0.1 / classes


def test_a_hand_worked_example():
    #            a  a  a  b  b  c
    labels = np.array([0, 0, 0, 1, 1, 2])
    predicted = np.array([0, 0, 1, 1, 2, 2])
    found = classification_metrics(certain(predicted, 3), labels, ["a", "b", "c"])
    # a: 2 of 2 predicted correctly, 2 of 3 found; b: 1 of 2, 1 of 2; c: 1 of 2, 1 of 1.
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
    """Macro means are over the classes that occur, as in scikit-learn; AUROC is undefined."""
    labels, predicted = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    found = classification_metrics(certain(predicted, 4), labels, ["a", "b", "c", "d"])
    assert found["f1_macro"] == pytest.approx(sk.f1_score(labels, predicted, average="macro"))
    assert found["auroc"] is None
    assert found["per_class"]["d"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert np.shape(found["confusion_matrix"]) == (4, 4)


def test_thousands_of_classes_have_no_matrix(monkeypatch):
    """It is computed in every evaluation, and grows with their square."""
    within = "sklearn.metrics._classification.confusion_matrix"
    monkeypatch.setattr(within, lambda *_, **__: pytest.fail("scikit-learn makes one for another metric"))
    for classes in (MATRIX_CLASSES, MATRIX_CLASSES + 1):
        labels = np.arange(classes) // 2
        found = classification_metrics(certain(labels, classes), labels, list(map(str, range(classes))))
        assert found["accuracy"] == 1 and len(found["per_class"]) == classes
        assert ("confusion_matrix" in found) == (classes == MATRIX_CLASSES)


def test_a_class_that_is_only_predicted_counts_as_a_failure():
    labels, predicted = np.array([0, 0, 1, 1]), np.array([0, 2, 1, 1])
    found = classification_metrics(certain(predicted, 3), labels, ["a", "b", "c"])
    assert found["f1_macro"] == pytest.approx((2 / 3 + 1 + 0) / 3)


@pytest.mark.filterwarnings("error")
def test_rows_of_one_class_alone():
    found = classification_metrics(certain(np.array([1, 1, 1]), 2), np.array([1, 1, 1]), ["a", "b"])
    assert (found["accuracy"], found["f1_macro"], found["matthews_correlation"]) == (1.0, 1.0, 0.0)
    assert found["auroc"] is None


def test_logits_far_apart_are_no_nan():
    found = softmax(np.array([[1e4, -1e4], [-3e38, 0.0]], np.float32))
    assert np.array_equal(found, [[1, 0], [0, 1]])


# --- several labels


def test_several_labels_by_hand():
    labels = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]])
    scores = np.array([[0.9, 0.2, 0.1], [0.6, 0.7, 0.1], [0.1, 0.2, 0.3], [0.1, 0.1, 0.5]])
    found = multilabel_metrics(scores, labels, ["a", "b", "c"])
    # Predicted: a in rows 0 and 1, b in row 1, c in row 3. Right: a in row 0, b in row 1. True: a, b, b.
    assert found["precision_micro"] == 2 / 4 and found["recall_micro"] == 2 / 3
    assert found["f1_micro"] == pytest.approx(4 / 7)
    assert found["f1_macro"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    # Rows: one predicted, two true; two predicted, one true; none of either; a wrong one predicted.
    assert found["f1_samples"] == pytest.approx((2 / 3 + 2 / 3 + 1 + 0) / 4)
    assert found["subset_accuracy"] == 1 / 4
    assert found["per_label"]["c"] == {"threshold": 0.5, "precision": 0, "recall": 0, "f1": 0, "support": 0}
    assert found["auroc"] == pytest.approx(
        (1 + 3.5 / 4) / 2
    )  # of a, and of b, where one pair in four is a tie
    assert set(found) == {*MULTILABEL_METRICS, "per_label"}


@pytest.mark.parametrize("width", [2, 5])
def test_several_labels_equal_scikit_learn(width):
    generator = np.random.default_rng(width)
    labels = generator.integers(0, 2, (200, width))
    probabilities = sigmoid(generator.normal(size=labels.shape) + labels)
    limits = generator.uniform(0.3, 0.7, width)
    found = multilabel_metrics(probabilities, labels, [f"label {i}" for i in range(width)], limits)
    for ending, used in (("", limits), (AT_HALF, np.full(width, 0.5))):
        predicted = (probabilities >= used).astype(int)
        for average in ("micro", "macro", "samples"):
            expected = sk.f1_score(labels, predicted, average=average, zero_division=1)
            assert found[f"f1_{average}{ending}"] == pytest.approx(expected)
        for average in ("micro", "macro"):
            for name, score in (("precision", sk.precision_score), ("recall", sk.recall_score)):
                assert found[f"{name}_{average}{ending}"] == pytest.approx(
                    score(labels, predicted, average=average)
                )
        assert found[f"subset_accuracy{ending}"] == sk.accuracy_score(labels, predicted)
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(labels, probabilities, average="macro"))
    assert [row["threshold"] for row in found["per_label"].values()] == limits.tolist()


def test_one_label_of_several_is_no_pair_of_classes():
    labels, scores = np.array([[1], [0], [0]]), np.array([[0.9], [0.8], [0.1]])
    found = multilabel_metrics(scores, labels, ["spam"])
    assert found["f1_micro"] == found["f1_macro"] == pytest.approx(2 / 3) and found["auroc"] == 1


def test_a_label_without_rows_or_without_other_rows_has_no_auroc():
    labels = np.array([[1, 0, 1], [1, 0, 0]])
    assert multilabel_metrics(np.full((2, 3), 0.4), labels, list("abc"))["auroc"] == 0.5
    assert multilabel_metrics(np.full((2, 2), 0.4), labels[:, :2], list("ab"))["auroc"] is None


# --- numbers


def test_numbers_by_hand():
    found = regression_metrics(np.array([1.0, 2.0, 6.0]), np.array([1.0, 3.0, 5.0]))
    assert found["mse"] == pytest.approx(2 / 3) and found["mae"] == pytest.approx(2 / 3)
    assert found["r2"] == pytest.approx(1 - 2 / 8) and found["spearmanr"] == 1
    assert found["pearsonr"] == pytest.approx(np.corrcoef([1, 2, 6], [1, 3, 5])[0, 1])
    assert set(found) == set(REGRESSION_METRICS)


def test_without_spread_there_is_no_correlation():
    found = regression_metrics(np.array([1.0, 2.0]), np.array([3.0, 3.0]))
    assert found["r2"] is found["pearsonr"] is found["spearmanr"] is None and found["mae"] == 1.5
    found = regression_metrics(np.array([3.0, 3.0]), np.array([1.0, 2.0]))
    assert found["pearsonr"] is found["spearmanr"] is None and found["r2"] == -9


# --- the metrics that a user names


OURS = list(CLASSIFICATION_METRICS)
LABELS, PREDICTED = np.array([0, 1, 2, 2, 1]), np.array([0, 1, 2, 1, 1])


def test_without_a_network_a_known_name_is_computed_here_and_that_is_said():
    named = NamedMetrics(["accuracy", "f1", "roc_auc", "recall_macro"], OURS)
    assert named.keys() == ["accuracy", "f1", "roc_auc", "recall_macro"] and len(named.notes) == 3
    assert named.notes[0].startswith("metric accuracy: accuracy, computed here (`evaluate` cannot load it: ")
    assert named.notes[2] == "metric roc_auc: auroc, computed here"
    ours = classification_metrics(certain(PREDICTED, 3), LABELS, ["a", "b", "c"])
    assert named.compute(PREDICTED, LABELS, ours) == {
        "accuracy": ours["accuracy"], "f1": ours["f1_macro"], "roc_auc": ours["auroc"],
        "recall_macro": ours["recall_macro"],
    }  # fmt: skip


def test_a_name_means_the_same_with_a_network(monkeypatch):
    """F1 of two classes is binary in `evaluate` unless told how to average."""

    class F1(Mock):
        def compute(self, predictions, references, average="binary"):
            return {"f1": sk.f1_score(references, predictions, average=average)}

    monkeypatch.setattr("evaluate.load", lambda *_, **__: F1())
    named = NamedMetrics(["f1"], OURS)
    labels, predicted = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    ours = classification_metrics(certain(predicted, 2), labels, ["a", "b"])
    assert named.notes == [] and named.compute(predicted, labels, {}) == {"f1": ours["f1_macro"]}


def test_an_unknown_name_is_refused_with_those_that_are_known():
    with pytest.raises(UserError, match=r"metrics: 'acuracy'.*accuracy, f1_macro.*folder") as error:
        NamedMetrics(["acuracy"], OURS)
    assert "\n" not in str(error.value)


def test_a_metric_of_evaluate_in_a_folder(tmp_path):
    (tmp_path / "errors").mkdir()
    (tmp_path / "errors" / "errors.py").write_text(METRIC)
    named = NamedMetrics([str(tmp_path / "errors")], OURS)
    assert named.keys() == ["errors"] and named.notes == []
    assert named.compute(PREDICTED, LABELS, {}) == {"errors": 1}
    assert named.compute(LABELS, LABELS, {}) == {"errors": 0}  # and again


@pytest.mark.parametrize(
    "values, found, keys",
    [
        ('{"error_rate": np.float32(0.5)}', {"error_rate": 0.5}, ["error_rate"]),
        ('{"count": np.int64(3), "each": np.arange(2)}', {"count": 3, "each": [0, 1]}, ["count"]),
        ("np.array(2.5)", {"odd": 2.5}, ["odd"]),
    ],
)
def test_a_metric_of_a_folder_names_its_own_numbers_of_any_type(tmp_path, values, found, keys):
    named = NamedMetrics([metric_in(tmp_path / "odd", values)], OURS)
    assert named.keys() == keys
    got = named.compute(PREDICTED, LABELS, {})
    assert got == found and json.loads(json.dumps(got)) == found


def test_a_metric_of_a_folder_that_takes_the_place_of_ours_is_said(tmp_path):
    folder = metric_in(tmp_path / "mine", '{"accuracy": 0.5, "loss": 1.0, "own": 2.0}')
    named = NamedMetrics([folder], OURS)
    assert named.notes == [f"metric {folder}: gives accuracy, loss, replacing what is computed here"]


@pytest.mark.parametrize("values", ["1 / 0", '{"odd": {1, 2}}', "[][3]"])
def test_a_metric_that_fails_or_gives_no_numbers_is_refused_before_training(tmp_path, values):
    with pytest.raises(UserError, match=r"metrics: 'odd' fails .*Error: .*leave it out") as error:
        NamedMetrics([metric_in(tmp_path / "odd", values)], OURS)
    assert "\n" not in str(error.value)


def test_a_metric_that_takes_two_classes_alone_is_refused_before_training_on_three(tmp_path):
    from_sklearn = "{'f1': __import__('sklearn.metrics').metrics.f1_score(references, predictions)}"
    folder = metric_in(tmp_path / "binary", from_sklearn)
    assert NamedMetrics([folder], OURS, count=2).keys() == ["f1"]
    with pytest.raises(UserError, match=r"metrics: 'binary' fails .*multiclass"):
        NamedMetrics([folder], OURS, count=3)


def test_the_names_of_evaluate_stand_for_ours_of_the_kind():
    labels, scores = np.eye(3, dtype=int), np.full((3, 3), 0.6)
    ours = multilabel_metrics(scores, labels, list("abc"))
    named = NamedMetrics(["f1", "accuracy", "roc_auc"], list(MULTILABEL_METRICS), "labels")
    assert named.compute(scores > 0.5, labels, ours) == {
        "f1": ours["f1_micro"], "accuracy": ours["subset_accuracy"], "roc_auc": ours["auroc"],
    }  # fmt: skip
    ours = regression_metrics(np.arange(3.0), np.arange(3.0) + 1)
    named = NamedMetrics(["mse", "r_squared", "spearmanr"], list(REGRESSION_METRICS), "numbers")
    found = named.compute(np.arange(3.0), np.arange(3.0) + 1, ours)
    assert found == {"mse": ours["mse"], "r_squared": ours["r2"], "spearmanr": ours["spearmanr"]}


@pytest.mark.parametrize(
    "name, style", [("f1", "numbers"), ("accuracy", "numbers"), ("mse", "labels"), ("spearmanr", "classes")]
)
def test_a_metric_of_another_kind_of_label_is_refused(name, style):
    with pytest.raises(UserError, match=f"metrics: '{name}' is not for this kind of label; expected one of"):
        NamedMetrics([name], [], style)


def test_a_folder_whose_metric_cannot_take_the_labels_is_refused_before_training(tmp_path):
    (tmp_path / "errors").mkdir()
    (tmp_path / "errors" / "errors.py").write_text(METRIC)
    with pytest.raises(UserError, match=r"metrics: 'errors' fails on the predictions of this kind"):
        NamedMetrics([str(tmp_path / "errors")], [], "labels")
    floats = METRIC.replace('"int32"', '"float32"').replace(
        '{"errors": sum(p != r for p, r in zip(', "abs(sum("
    )
    floats = floats.replace("predictions, references))}", "predictions) - sum(references))")
    (tmp_path / "bias").mkdir()
    (tmp_path / "bias" / "bias.py").write_text(floats)  # returns a bare number, as r_squared does
    named = NamedMetrics([str(tmp_path / "bias")], [], "numbers")
    assert named.compute(np.array([1.5, 2.0]), np.array([1.0, 1.0]), {}) == {"bias": 1.5}


STATES = {
    "single_label_classification": (certain(PREDICTED, 3), LABELS, {}),
    "multi_label_classification": (
        np.eye(3)[PREDICTED] * 4 - 2, np.eye(3, dtype=np.uint8)[LABELS], {"counts": [9, 9, 9], "rows": 27},
    ),
    "regression": (PREDICTED[:, None] - 1.0, LABELS * 0.5, {"mean": 1.0, "std": 2.0}),
}  # fmt: skip


@pytest.mark.parametrize("kind", STATES)
def test_the_task_gives_the_metrics_that_it_names(kind):
    scores, labels, learned = STATES[kind]
    task = TextClassification()
    task.load_state({"problem_type": kind, "label_names": ["a", "b", "c"], **learned})
    task.calibration = task.calibrate(scores, labels)
    found = task.metrics(scores.astype(np.float32), labels)
    assert set(task.metric_names()) == {
        key for key, value in found.items() if not isinstance(value, dict | list)
    }
    assert task.default_metric in found and set(task.headline) <= set(found)
    undecided = TextClassification().metric_names()  # before the kind is known
    assert set(task.metric_names()) <= set(undecided)


def test_predictions_are_in_the_form_of_the_labels():
    for kind, (scores, _, learned) in STATES.items():
        task = TextClassification()
        task.load_state({"problem_type": kind, "label_names": ["a", "b", "c"], **learned})
        expected = {
            "single_label_classification": PREDICTED.tolist(),
            "multi_label_classification": np.eye(3)[PREDICTED].tolist(),
            "regression": (scores[:, 0] * 2 + 1).tolist(),
        }
        assert task.predictions(scores).tolist() == expected[kind]
