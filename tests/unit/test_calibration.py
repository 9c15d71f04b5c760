"""Calibration: hand-worked tables, scikit-learn's scores, and what coverage promises."""

import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn import metrics as sk

from ft.analysis.calibration import (
    coverage,
    fit_temperature,
    multi_label_scores,
    reliability,
    single_label_scores,
    surest_share,
    threshold_curve,
)


def test_the_calibration_error_by_hand():
    probability = np.array([0.55, 0.58, 0.91, 0.93, 0.95, 1.0])
    happened = np.array([1, 0, 1, 1, 1, 0])
    found = reliability(probability, happened, bins=10)
    # Between 0.5 and 0.6: two, mean 0.565, half of them. From 0.9: four, mean 0.9475, three of them.
    assert [(row["count"], row["probability"], row["share"]) for row in found["table"]] == [
        (2, pytest.approx(0.565), 0.5), (4, pytest.approx(0.9475), 0.75),
    ]  # fmt: skip
    assert found["ece"] == pytest.approx(2 / 6 * 0.065 + 4 / 6 * 0.1975)
    assert found["max_calibration_error"] == pytest.approx(0.1975)
    assert [(row["low"], row["high"]) for row in found["table"]] == [(0.5, 0.6), (0.9, 1.0)]


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_a_large_one():
    generator = np.random.default_rng(0)
    probability = generator.random(20_000)
    happened = generator.random(20_000) < probability
    assert reliability(probability, happened)["ece"] < 0.02
    assert reliability(np.where(probability > 0.5, 0.99, 0.01), happened)["ece"] > 0.2


def test_brier_and_log_loss_are_scikit_learns():
    generator = np.random.default_rng(1)
    logits, labels = generator.normal(size=(50, 3)) * 2, generator.integers(0, 3, 50)
    found = single_label_scores(logits, labels)
    assert found["log_loss"] == pytest.approx(sk.log_loss(labels, softmax(logits, axis=1), labels=[0, 1, 2]))
    assert found["brier"] == pytest.approx(((softmax(logits, axis=1) - np.eye(3)[labels]) ** 2).sum(1).mean())
    two, truth = logits[:, :2], labels > 0
    found = single_label_scores(two, truth.astype(int))
    assert found["brier"] == pytest.approx(2 * sk.brier_score_loss(truth, softmax(two, axis=1)[:, 1]))
    found = multi_label_scores(logits[:, :1], truth[:, None])
    assert found["brier"] == pytest.approx(sk.brier_score_loss(truth, expit(logits[:, 0])))
    assert found["log_loss"] == pytest.approx(sk.log_loss(truth, expit(logits[:, 0])))


def test_logits_far_apart_cost_much_but_not_infinity():
    assert single_label_scores(np.array([[900.0, -900.0]]), np.array([1]))["log_loss"] == pytest.approx(1800)
    assert multi_label_scores(np.array([[900.0]]), np.array([[0]]))["log_loss"] == pytest.approx(900)


@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_logits_is_found_again(true_temperature):
    generator = np.random.default_rng(2)
    honest = generator.normal(size=(20_000, 4)) * 2
    labels = (honest + generator.gumbel(size=honest.shape)).argmax(axis=1)  # drawn from softmax(honest)
    assert fit_temperature(honest * true_temperature, labels) == pytest.approx(true_temperature, rel=0.05)
    has = generator.random(honest.shape) < expit(honest)
    assert fit_temperature(honest * true_temperature, has) == pytest.approx(true_temperature, rel=0.05)


def test_it_never_makes_the_log_loss_of_its_rows_worse_and_stays_within_bounds():
    generator = np.random.default_rng(3)
    logits, labels = generator.normal(size=(40, 3)), generator.integers(0, 3, 40)
    temperature = fit_temperature(logits, labels)
    assert (
        single_label_scores(logits / temperature, labels)["log_loss"]
        <= single_label_scores(logits, labels)["log_loss"] + 1e-9
    )
    for margin in (1, 9, 80):  # nothing is wrong: the lowest loss is at temperature 0, and soon 0 itself
        assert fit_temperature(np.eye(3) * margin, np.arange(3)) == 1
    assert 10 < fit_temperature(np.eye(3) * 9, np.array([1, 2, 0])) <= 20  # everything is


def test_coverage_by_hand():
    confidence = np.array([0.9, 0.6, 0.8, 0.7])
    right = np.array([True, False, True, False])
    found = coverage(confidence, right)
    assert [(p["coverage"], p["accuracy"], p["confidence"]) for p in found["curve"]] == [
        (0.25, 1, 0.9), (0.5, 1, 0.8), (0.75, pytest.approx(2 / 3), 0.7), (1, 0.5, 0.6),
    ]  # fmt: skip
    assert found["area_under_risk"] == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4)


def test_rows_of_the_same_confidence_come_together():
    found = coverage(np.array([0.9, 0.5, 0.5, 0.5]), np.array([True, True, False, False]))
    assert [(p["coverage"], p["accuracy"]) for p in found["curve"]] == [(0.25, 1), (1, 0.5)]
    assert surest_share(np.array([0.9, 0.5, 0.5]), np.array([True, True, False]), 0.9)[
        "coverage"
    ] == pytest.approx(1 / 3)


def test_right_99_percent_of_the_time_on_the_surest_share():
    generator = np.random.default_rng(4)
    confidence = generator.random(5_000)
    right = generator.random(5_000) < np.where(confidence > 0.2, 0.998, 0.5)
    found = surest_share(confidence, right)
    surest = confidence >= found["confidence"]
    assert surest.mean() == pytest.approx(found["coverage"]) and found["coverage"] > 0.79
    assert right[surest].mean() == pytest.approx(found["accuracy"]) and found["accuracy"] >= 0.99
    assert surest_share(confidence, np.zeros(5_000, bool)) is None


def test_a_curve_of_many_rows_is_short_and_goes_to_all_of_them():
    generator = np.random.default_rng(5)
    curve = coverage(generator.random(30_000), generator.random(30_000) < 0.9)["curve"]
    assert len(curve) <= 100 and curve[-1]["coverage"] == 1
    assert curve[-1]["accuracy"] == pytest.approx(0.9, abs=0.01)


def test_a_threshold_curve_counts_what_is_given_at_least_the_threshold():
    generator = np.random.default_rng(3)
    probability = np.round(generator.random(400), 2)  # many are equal to a threshold
    happened = generator.random(400) < probability
    curve = threshold_curve(probability, happened)
    assert list(curve["threshold"][[0, -1]]) == [0, 1]
    for place in (0, 7, 50, 93):
        said = probability >= curve["threshold"][place]
        expected = sk.precision_recall_fscore_support(happened, said, average="binary")[:3]
        assert [curve[name][place] for name in ("precision", "recall", "f1")] == pytest.approx(expected)
    nothing = threshold_curve(probability / 2, np.zeros(400, bool))
    assert np.isnan(nothing["precision"][-1]) and np.isnan(nothing["recall"]).all()
