"""Comparison of runs: paired intervals, tests with their nominal error rate, and seeds."""

import numpy as np
import pytest
from scipy.stats import permutation_test

from ft.analysis import predictions, resampling
from ft.analysis.comparison import differences, mcnemar, right_in_one, tests

tests.__test__ = False  # it is not a test for pytest


def with_accuracy(right):
    """Two classes; the first is always true."""
    confident = np.where(right, 0.9, 0.1)
    return predictions.single_label(np.stack([confident, 1 - confident], 1), np.zeros(len(right), int))


def test_mcnemar_by_hand():
    one = np.array([True] * 8 + [False] * 2 + [True] * 30)
    other = np.array([False] * 8 + [True] * 2 + [True] * 30)
    # 8 against 2 by a fair coin: twice the chance of 8, 9 or 10 heads of 10.
    assert mcnemar(one, other) == pytest.approx(2 * (45 + 10 + 1) / 1024)
    assert mcnemar(one, one) == 1


def test_the_interval_of_a_difference_is_paired():
    """Two runs that err on nearly the same rows surely differ by little; on different rows, by chance."""
    generator = np.random.default_rng(0)
    one = generator.random(500) < 0.8
    alike = one.copy()
    alike[np.flatnonzero(~one)[:10]] = True
    found = differences([with_accuracy(one)], [with_accuracy(alike)], 2_000)["accuracy"]
    assert found["difference"] == pytest.approx(10 / 500) == found["b"] - found["a"]
    assert 0 < found["low"] < 0.02 < found["high"] and found["p_value"] < 0.01
    assert found["test"] == "McNemar, exact"
    unlike = np.roll(alike, 250)
    found = differences([with_accuracy(one)], [with_accuracy(unlike)], 2_000)["accuracy"]
    assert found["low"] < 0 < found["high"] and found["p_value"] > 0.05


def test_the_paired_interval_is_that_of_resampled_differences():
    """Also in blocks: both runs get the same rows."""
    generator = np.random.default_rng(1)
    truth = generator.normal(size=400)
    noise = generator.normal(size=(3, 400))
    one, other = truth + noise[0] + 0.2 * noise[1], truth + noise[0] + 0.2 * noise[2]
    found = differences([predictions.regression(one, truth)], [predictions.regression(other, truth)], 4_000)
    change = (other - truth) ** 2 - (one - truth) ** 2
    resampled = change[generator.integers(0, 400, size=(4_000, 400))].mean(axis=1)
    width = np.quantile(resampled, 0.975) - np.quantile(resampled, 0.025)
    assert found["mse"]["high"] - found["mse"]["low"] == pytest.approx(width, rel=0.08)
    assert found["mse"]["difference"] == pytest.approx(change.mean())


def test_above_ten_thousand_rows_both_runs_are_given_the_same_blocks(monkeypatch):
    monkeypatch.setattr(resampling, "BLOCKS", 100)
    right = np.random.default_rng(2).random(1_000) < 0.8
    same = differences([with_accuracy(right)], [with_accuracy(right)], 500)["accuracy"]
    assert (same["low"], same["high"], same["p_value"]) == (0, 0, 1)


def test_the_permutation_test_is_scipys():
    generator = np.random.default_rng(3)
    truth = generator.normal(size=60)
    one, other = truth + generator.normal(size=60), truth + 1.4 * generator.normal(size=60)
    found = tests(predictions.regression(one, truth), predictions.regression(other, truth), 10_000)

    def gap(a, b, axis):
        return (a**2).mean(axis=axis) - (b**2).mean(axis=axis)

    theirs = permutation_test(
        (one - truth, other - truth),
        gap,
        permutation_type="samples",
        vectorized=True,
        n_resamples=10_000,
        rng=1,
    )
    assert found["mse"] == (pytest.approx(theirs.pvalue, abs=0.015), "permutation")
    assert set(found) == {"mse", "mae", "r2", "pearsonr", "spearmanr"}


def test_the_test_of_a_correlation_knows_no_unit():
    """Rows of a run whose numbers are less spread would drown among those of the other one."""
    generator = np.random.default_rng(8)
    truth = generator.normal(size=100)
    one, other = truth + 0.4 * generator.normal(size=100), truth + 0.8 * generator.normal(size=100)
    for scale in (1, 0.3, 1000):
        runs = predictions.regression(scale * one + 5, truth), predictions.regression(other, truth)
        assert tests(*runs, 1_000)["pearsonr"][0] < 0.02


@pytest.mark.parametrize("blocks", [10_000, 30])
def test_where_the_runs_are_equally_good_the_tests_find_a_difference_in_5_of_100(monkeypatch, blocks):
    monkeypatch.setattr(resampling, "BLOCKS", blocks)
    low = {"mse": 0, "spearmanr": 0, "f1_micro": 0}
    for seed in range(300):
        generator = np.random.default_rng(seed)
        truth = generator.normal(size=90)
        noise = generator.normal(size=(2, 90))
        found = tests(*(predictions.regression(truth + part, truth) for part in noise), 400)
        labels = generator.random((90, 3)) < 0.4
        guesses = (np.where(generator.random((90, 3)) < 0.2, ~labels, labels) for _ in range(2))
        found |= tests(*(predictions.multi_label(guess * 0.8 + 0.1, labels) for guess in guesses), 400)
        for name in low:
            low[name] += found[name][0] <= 0.05
    assert all(0.02 <= count / 300 <= 0.085 for count in low.values()), low


def test_a_clear_difference_is_found_and_none_is_not():
    generator = np.random.default_rng(4)
    labels = generator.random((300, 4)) < 0.3
    good, bad = (np.where(generator.random(labels.shape) < p, ~labels, labels) for p in (0.05, 0.2))
    found = tests(*(predictions.multi_label(p * 0.8 + 0.1, labels) for p in (good, bad)), 1_000)
    assert found["f1_micro"][0] == found["subset_accuracy"][0] == pytest.approx(1 / 1001)
    found = tests(*(predictions.multi_label(good * 0.8 + 0.1, labels) for _ in range(2)), 1_000)
    assert found["f1_micro"][0] == 1


def test_rows_that_only_one_gets_right():
    one, other = np.array([1, 1, 0, 0, 1], bool), np.array([1, 0, 1, 0, 0], bool)
    only_one, only_other = right_in_one([one], [other])
    assert (only_one.tolist(), only_other.tolist()) == ([1, 4], [2])
    # Two of three runs are the majority.
    only_one, only_other = right_in_one([one, one, other], [other])
    assert (only_one.tolist(), only_other.tolist()) == ([1, 4], [2])


def runs(generator, rows, count, spread):
    """Some seeds of one recipe, whose quality differs by `spread` (in logits)."""
    hardness = generator.normal(1.5, 1.5, size=rows)
    return [
        with_accuracy(generator.random(rows) < 1 / (1 + np.exp(-(hardness + spread * generator.normal()))))
        for _ in range(count)
    ]


def test_with_seeds_the_interval_holds_both_sources_of_variance():
    generator = np.random.default_rng(5)
    one, other = (runs(generator, 2_000, 3, 0.5) for _ in range(2))
    both = differences(one, other, 500)["accuracy"]
    rows_alone = differences(one[:1], other[:1], 500)["accuracy"]
    assert both["high"] - both["low"] > 2 * (rows_alone["high"] - rows_alone["low"])
    assert len(both["a_runs"]) == 3 and both["a"] == pytest.approx(np.mean(both["a_runs"]))
    assert both["test"] == "Welch's t over seeds and rows"


@pytest.mark.parametrize(("rows", "spread"), [(300, 0.0), (300, 0.3), (1_500, 0.5)])
def test_with_three_seeds_it_holds_the_truth_in_about_95_of_100(rows, spread):
    """A bootstrap over three seeds holds it in 86 of 100."""
    hits = 0
    for seed in range(150):
        generator = np.random.default_rng([seed, rows])
        one, other = (runs(generator, rows, 3, spread) for _ in range(2))
        found = differences(one, other, 200)["accuracy"]
        hits += found["low"] <= 0 <= found["high"]
    assert hits / 150 >= 0.91


def test_a_side_with_one_run_is_given_the_other_sides_spread():
    generator = np.random.default_rng(6)
    one, other = runs(generator, 1_000, 1, 0.5), runs(generator, 1_000, 4, 0.5)
    found = differences(one, other, 300)["accuracy"]
    spread = np.std(found["b_runs"], ddof=1)
    assert found["high"] - found["low"] > 2 * spread
    assert found["low"] <= found["difference"] <= found["high"]


def test_two_seeds_say_little_but_nothing_impossible():
    right = [np.arange(60) < count for count in (20, 40, 30, 59)]
    one, other = [with_accuracy(right[0]), with_accuracy(right[1])], [with_accuracy(r) for r in right[2:]]
    found = differences(one, other, 200)["accuracy"]
    assert found["low"] == -1 and found["high"] == 1


def one_row_a_class(rows=20, classes=6):
    """All rows are of the first class, except one for each of the others: most resamples lack a class, and
    have no AUROC."""
    labels = np.zeros(rows, int)
    labels[1:classes] = np.arange(1, classes)
    return predictions.single_label(np.full((rows, classes), 1 / classes), labels)


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.filterwarnings("error")
def test_what_most_resamples_do_not_define_has_no_interval_and_no_p_value(runs):
    found = differences([one_row_a_class()] * runs, [one_row_a_class()] * runs, 100)["auroc"]
    assert (found["a"], found["b"], found["difference"]) == (0.5, 0.5, 0)
    assert found["low"] is found["high"] is found["p_value"] is found["test"] is None


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.filterwarnings("error")
def test_what_one_run_does_not_define_has_no_number(runs):
    """A correlation with a model that always predicts the same."""
    truth = np.arange(30.0)
    one = [predictions.regression(truth[::-1].copy(), truth)] * (runs - 1)
    one.append(predictions.regression(np.ones(30), truth))
    found = differences(one, [predictions.regression(truth, truth)] * runs, 100)
    for name in ("pearsonr", "spearmanr"):
        entry = found[name]
        assert entry["b"] == pytest.approx(1) and entry["a"] is entry["difference"] is None
        assert entry["low"] is entry["high"] is entry["p_value"] is entry["test"] is None
    assert found["mse"]["low"] < found["mse"]["difference"] < found["mse"]["high"]
    if runs > 1:
        assert found["pearsonr"]["a_runs"] == [pytest.approx(-1), None]


def test_runs_that_are_the_same_differ_by_nothing():
    right = np.ones(50, bool)
    found = differences([with_accuracy(right)] * 2, [with_accuracy(right)] * 2, 100)["accuracy"]
    assert (found["difference"], found["low"], found["high"], found["p_value"]) == (0, 0, 0, None)
