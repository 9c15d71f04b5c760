"""Where a model fails: slices, lengths, confused classes, most confident errors, suspected labels."""

import itertools
import sys

import numpy as np
import pytest

from ft.analysis import predictions
from ft.analysis.errors import MOST_SLICES, OTHERS, confused_pairs, length_slices, slices, surest_errors
from ft.analysis.label_errors import suspects
from ft.errors import UserError


def rows_of(rows):
    return {"numbers": rows.tolist()}


def test_slices_come_by_frequency_with_their_rows():
    found = slices(["b", "a", None, "b", "", "a", "b"], rows_of)
    assert found == [
        {"value": "b", "rows": 3, "numbers": [0, 3, 6]},
        {"value": "a", "rows": 2, "numbers": [1, 5]},
        {"value": "", "rows": 1, "numbers": [4]},
        {"value": None, "rows": 1, "numbers": [2]},
    ]


def test_many_values_end_in_one_slice_of_the_others():
    values = [f"v{i % 50}" for i in range(120)]  # the first 20 come three times, 30 twice
    found = slices(values, rows_of)
    assert len(found) == MOST_SLICES and found[-1]["value"] == OTHERS
    assert sorted(n for one in found for n in one["numbers"]) == list(range(120))
    assert [one["rows"] for one in found[:21]] == [3] * 20 + [2]


def test_numbers_are_values_too():
    assert [(s["value"], s["rows"]) for s in slices([1, 2, 1, 1.5], rows_of)] == [
        ("1", 2),
        ("1.5", 1),
        ("2", 1),
    ]


def test_lengths_in_about_equal_groups():
    lengths = np.random.default_rng(0).permutation(np.arange(1, 101))
    found = length_slices(lengths, rows_of)
    assert [(s["value"], s["rows"]) for s in found] == [
        ("1-20", 20), ("21-40", 20), ("41-60", 20), ("61-80", 20), ("81-100", 20),
    ]  # fmt: skip
    for one in found:
        low, high = map(int, one["value"].split("-"))
        assert sorted(lengths[one["numbers"]]) == list(range(low, high + 1))


@pytest.mark.parametrize("lengths", [[7] * 9, [1], [3] * 90 + [4, 5], [1, 2]])
def test_lengths_that_are_alike_stand_together(lengths):
    found = length_slices(np.array(lengths), rows_of)
    assert sum(s["rows"] for s in found) == len(lengths)
    ranges = [tuple(map(int, s["value"].split("-"))) for s in found]
    assert all(high < low for (_, high), (low, _) in itertools.pairwise(ranges))


def of_matrix(counts):
    """True and predicted classes with this confusion matrix."""
    true, predicted = np.indices(np.shape(counts))
    return np.repeat(true, np.ravel(counts)), np.repeat(predicted, np.ravel(counts))


def test_the_most_confused_pairs():
    labels, predicted = of_matrix([[50, 3, 0], [7, 10, 3], [0, 0, 4]])
    found = confused_pairs(labels, predicted, ["a", "b", "c"])
    assert [(p["label"], p["prediction"], p["rows"], p["share"]) for p in found] == [
        ("b", "a", 7, 0.35), ("a", "b", 3, 3 / 53), ("b", "c", 3, 0.15),
    ]  # fmt: skip
    assert len(confused_pairs(*of_matrix(np.ones((9, 9), int)), list("abcdefghi"), most=5)) == 5
    assert confused_pairs(labels, labels, ["a", "b", "c"]) == []


def test_the_surest_errors_come_first():
    confidence = np.array([0.9, 0.99, 0.5, 0.7, 0.99])
    right = np.array([True, False, False, False, False])
    assert surest_errors(confidence, right, 3).tolist() == [1, 4, 3]


# --- suspected labels


def flipped_rows(generator, rows, share=0.05):
    return generator.choice(rows, int(share * rows), replace=False)


def test_flipped_labels_are_suspected():
    pytest.importorskip("cleanlab")
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 1_000)
    scores = generator.normal(size=(1_000, 4)) + 5 * np.eye(4)[labels]
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    flipped = flipped_rows(generator, 1_000)
    given = labels.copy()
    given[flipped] = (labels[flipped] + 1) % 4
    found, quality = suspects(predictions.single_label(probabilities, given))
    assert np.isin(found, flipped).mean() > 0.9 and np.isin(flipped, found).mean() > 0.9
    assert (np.diff(quality[found]) >= 0).all() and quality.shape == (1_000,)


def test_a_class_that_no_row_has_is_no_obstacle():
    pytest.importorskip("cleanlab")
    probabilities = np.full((40, 3), 0.05) + 0.85 * np.eye(3)[np.arange(40) % 2]
    given = np.arange(40) % 2
    given[7] = 0
    assert suspects(predictions.single_label(probabilities, given))[0].tolist() == [7]


def test_flipped_labels_of_several_and_numbers_far_off_are_suspected(monkeypatch):
    pytest.importorskip("cleanlab")
    generator = np.random.default_rng(1)
    truth = generator.random((600, 5)) < 0.3
    probabilities = np.clip(
        np.where(truth, 0.9, 0.1) + 0.05 * generator.normal(size=truth.shape), 0.001, 0.999
    )
    flipped = flipped_rows(generator, 600)
    given = truth.copy()
    given[flipped, 0] ^= True
    found, _ = suspects(predictions.multi_label(probabilities, given))
    assert np.isin(found, flipped).mean() > 0.9 and len(found) > 20
    numbers = generator.normal(size=600)
    given = numbers.copy()
    given[flipped] += 4
    for most in (10_000, 100):  # for more rows, a method without memory for pairs of them
        monkeypatch.setattr("ft.analysis.label_errors.OUTRE_ROWS", most)
        found, _ = suspects(predictions.regression(numbers + 0.1 * generator.normal(size=600), given))
        assert set(found) == set(flipped)


@pytest.mark.parametrize("truth", [[1] * 9, [0] * 9])
def test_of_a_single_class_nothing_can_be_told(truth):
    pytest.importorskip("cleanlab")
    assert suspects(predictions.single_label(np.full((9, 2), 0.5), np.array(truth))) is None


def test_a_label_that_all_rows_have_is_no_obstacle():
    pytest.importorskip("cleanlab")
    truth = np.random.default_rng(0).random((200, 2)) < 0.4
    wrong = truth.copy()
    wrong[5, 1] ^= True
    probabilities = np.where(truth, 0.95, 0.05)
    always = np.ones((200, 1), bool)
    found, _ = suspects(
        predictions.multi_label(np.hstack([probabilities, 0.9 * always]), np.hstack([wrong, always]))
    )
    assert 5 in found.tolist()
    for rows in (np.zeros((9, 3), bool), np.ones((9, 3), bool), np.tile([True, False, True], (9, 1))):
        assert suspects(predictions.multi_label(np.full((9, 3), 0.5), rows)) is None


def test_one_number_tells_nothing():
    pytest.importorskip("cleanlab")
    assert suspects(predictions.regression(np.array([1.0]), np.array([2.0]))) is None


def test_without_cleanlab_one_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    with pytest.raises(UserError, match=r"suspected_label_errors: cleanlab is not installed; pip install"):
        suspects(predictions.single_label(np.eye(2), np.arange(2)))
