"""Intervals: on a resample, every metric equals scikit-learn's; the interval is the plain bootstrap's."""

import tracemalloc
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from ft.analysis import predictions, ranks, resampling, statistics
from ft.analysis.intervals import intervals, percentiles, proportion
from ft.analysis.resampling import row_weights, swapped_sums
from ft.analysis.summary import interval_numbers, slice_tables
from ft.metrics import classification_metrics


def classes_of(rows, classes, seed=0, signal=1.5):
    """Probabilities and labels from a model that is often right."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, rows)
    scores = generator.normal(size=(rows, classes)) + signal * np.eye(classes)[labels]
    return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True), labels


def several_of(rows, labels, seed=0):
    generator = np.random.default_rng(seed)
    truth = generator.random((rows, labels)) < np.linspace(0.05, 0.5, labels)
    scores = np.clip(0.25 + 0.4 * truth + 0.2 * generator.normal(size=truth.shape), 0, 1)
    return scores, truth.astype(np.uint8)


def numbers_of(rows, seed=0, ties=False):
    generator = np.random.default_rng(seed)
    truth = generator.normal(size=rows) * 2 + 3
    predicted = truth + generator.normal(size=rows)
    return (np.round(predicted), np.round(truth)) if ties else (predicted, truth)


def one_label_by_sklearn(probabilities, labels):
    guess, classes = probabilities.argmax(axis=1), probabilities.shape[1]
    if len(np.unique(labels)) < classes:
        area = np.nan
    elif classes == 2:
        area = sk.roc_auc_score(labels, probabilities[:, 1])
    else:
        area = sk.roc_auc_score(labels, probabilities, multi_class="ovr")
    return {
        "accuracy": sk.accuracy_score(labels, guess),
        "f1_macro": sk.f1_score(labels, guess, average="macro", zero_division=0),
        "f1_weighted": sk.f1_score(labels, guess, average="weighted", zero_division=0),
        "precision_macro": sk.precision_score(labels, guess, average="macro", zero_division=0),
        "recall_macro": sk.recall_score(labels, guess, average="macro", zero_division=0),
        "matthews_correlation": sk.matthews_corrcoef(labels, guess),
        "auroc": area,
    }


BY_SKLEARN = {"f1": sk.f1_score, "precision": sk.precision_score, "recall": sk.recall_score}


def several_by_sklearn(probabilities, truth):
    guess = probabilities >= 0.5
    seen = np.flatnonzero(truth.any(axis=0) | guess.any(axis=0))
    both = np.flatnonzero(truth.any(axis=0) & ~truth.all(axis=0))
    found = {
        f"{name}_{average}": function(
            truth, guess, average=average, zero_division=0, **({"labels": seen} if average == "macro" else {})
        )
        for average in ("micro", "macro")
        for name, function in BY_SKLEARN.items()
    }  # fmt: skip
    return found | {
        "f1_samples": sk.f1_score(truth, guess, average="samples", zero_division=1),
        "subset_accuracy": sk.accuracy_score(truth, guess),
        "auroc": np.mean([sk.roc_auc_score(truth[:, c], probabilities[:, c]) for c in both]),
    }


def numbers_by_sklearn(predicted, truth):
    return {
        "mse": sk.mean_squared_error(truth, predicted),
        "mae": sk.mean_absolute_error(truth, predicted),
        "r2": sk.r2_score(truth, predicted),
        "pearsonr": stats.pearsonr(truth, predicted).statistic,
        "spearmanr": stats.spearmanr(truth, predicted).statistic,
    }


KINDS = {
    "two classes": (predictions.single_label, one_label_by_sklearn, lambda n, s: classes_of(n, 2, s)),
    "five classes": (predictions.single_label, one_label_by_sklearn, lambda n, s: classes_of(n, 5, s)),
    "labels": (predictions.multi_label, several_by_sklearn, lambda n, s: several_of(n, 6, s)),
    "numbers": (predictions.regression, numbers_by_sklearn, numbers_of),
    "numbers with ties": (predictions.regression, numbers_by_sklearn, lambda n, s: numbers_of(n, s, True)),
}  # fmt: skip


def values_of(found):
    return {name: value for statistic in found.statistics for name, value in statistic.values().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_rows_as_they_are_each_metric_is_scikit_learns(kind):
    ours, theirs, make = KINDS[kind]
    for rows in (60, 200):
        data = make(rows, rows)
        found, expected = values_of(ours(*data)), theirs(*data)
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_up_to_ten_thousand_rows_every_resample_is_the_plain_bootstraps(kind):
    """For each resample: rows repeated as often as they were drawn, scored by scikit-learn."""
    ours, theirs, make = KINDS[kind]
    data = make(40, 3)
    drawn = {}
    for statistic in ours(*data).statistics:
        drawn |= statistic.resampled(25, seed=5)
    (weights,) = row_weights(40, 25, seed=5)
    for number in range(25):
        rows = np.repeat(np.arange(40), weights[:, number].astype(int))
        assert len(rows) == 40
        expected = theirs(*(part[rows] for part in data))
        assert {name: values[number] for name, values in drawn.items()} == pytest.approx(
            expected, abs=1e-9, nan_ok=True
        )


@pytest.mark.parametrize("kind", KINDS)
def test_above_it_the_interval_is_the_plain_bootstraps_but_for_a_few_percent_of_its_width(kind, monkeypatch):
    """The three ways to avoid a draw for each row: cells, blocks, and a first-order expansion for ranks."""
    ours, _, make = KINDS[kind]
    data = make(3_000, 7)
    plain = intervals(ours(*data).statistics, resamples=4_000, seed=1)
    monkeypatch.setattr(resampling, "BLOCKS", 1_500)
    monkeypatch.setattr(ranks, "BLOCKS", 1_500)
    fast = intervals(ours(*data).statistics, resamples=4_000, seed=2)
    assert plain.keys() == fast.keys()
    for name, (low, high) in plain.items():
        assert fast[name] == pytest.approx((low, high), abs=0.08 * (high - low)), name


def test_the_cells_of_a_confusion_matrix_are_drawn_as_such_and_many_kinds_in_blocks(monkeypatch):
    monkeypatch.setattr(resampling, "BLOCKS", 100)
    _, labels = classes_of(1_000, 3)
    statistic = statistics.single_label(labels, labels, 3)
    always_right = statistic.resampled(50, seed=0)["accuracy"]
    assert (always_right == 1).all()
    drawn = partial(resampling.resampled_sums, statistic.features, statistic.kind, 50, 0, row_by_row=False)
    sums = np.concatenate([*drawn()])
    assert (sums[:, :3].sum(axis=1) == 1_000).all()  # as many rows in every resample
    monkeypatch.setattr(resampling, "CELLS", 2)
    blocks = np.concatenate([*drawn()])
    assert (blocks[:, :3].sum(axis=1) == 1_000).all() and not np.array_equal(sums, blocks)


def test_of_many_classes_no_row_of_zeros_is_held():
    """As dense arrays, the contributions of 20,000 rows of 10,000 classes would take gigabytes."""
    generator = np.random.default_rng(0)
    labels, predicted = generator.integers(0, 10_000, (2, 20_000))
    tracemalloc.start()
    statistic = statistics.single_label(predicted, labels, 10_000)
    found = statistic.values() | {"low": statistic.resampled(20, seed=0)["accuracy"].min()}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60e6 and 0 <= found["low"] <= found["accuracy"] == (predicted == labels).mean()


@pytest.mark.parametrize("rows", [50, 20_000])
def test_sparse_sums_are_the_dense_ones(rows, monkeypatch):
    probabilities, labels = classes_of(rows, 5)
    predicted = probabilities.argmax(axis=1)
    dense = statistics.single_label(predicted, labels, 5)
    scores, truth = several_of(rows, 4)
    several = statistics.multi_label(scores > 0.5, truth)
    monkeypatch.setattr(statistics, "MOST_DENSE", 1)
    sparse = statistics.single_label(predicted, labels, 5)
    sparse_several = statistics.multi_label(scores > 0.5, truth)
    assert sparse_several.values() == pytest.approx(several.values(), rel=1e-12)
    assert isinstance(dense.features, np.ndarray) and not isinstance(sparse.features, np.ndarray)
    assert sparse.values() == dense.values()
    for row_by_row in (False, True):
        ours, theirs = (one.resampled(300, 0, row_by_row) for one in (sparse, dense))
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (
        swapped_sums((one.features, one.kind), (one.features, one.kind[::-1]), 50, seed=0)
        for one in (sparse, dense)
    )
    for mine, its in zip(ours, theirs, strict=True):
        assert all(map(np.array_equal, mine, its))


@pytest.mark.parametrize("rows", [50, 6_000, 20_000])
def test_resamples_of_many_classes_are_not_held_all_at_once(rows):
    """10,000 resamples of 2,000 classes would take half a gigabyte for each of some ten arrays."""
    labels = np.zeros(rows, int) if rows > resampling.BLOCKS else np.arange(rows) % 2_000
    statistic = statistics.single_label(labels, labels, 2_000)
    sizes = []

    def metrics(sums):
        sizes.append(sums.size)
        return {"rows": sums[:, :2_000].sum(axis=1)}

    drawn = replace(statistic, metrics=metrics).resampled(200, seed=0)["rows"]
    assert len(sizes) > 1 and max(sizes) <= resampling.CHUNK
    assert (drawn == rows).all() and len(drawn) == 200


def test_the_interval_holds_the_truth_in_about_95_of_100_samples():
    hits = 0
    for seed in range(300):
        generator = np.random.default_rng(seed)
        right = generator.random(200) < 0.8
        low, high = intervals([statistics.single_label(right.astype(int), np.ones(200, int), 2)], 500)[
            "accuracy"
        ]
        hits += low <= 0.8 <= high
    assert 0.91 <= hits / 300 <= 0.98


def test_the_same_predictions_have_the_same_interval_and_the_seed_matters():
    data = classes_of(100, 3)
    one, again = (intervals(predictions.single_label(*data).statistics, 200) for _ in range(2))
    assert one == again
    assert one != intervals(predictions.single_label(*data).statistics, 200, seed=1)


def test_above_ten_thousand_rows_the_area_of_a_rare_class_is_that_of_the_plain_bootstrap():
    """Of 20 positives, 18 rank above all negatives and two in the middle: on resamples without these two the
    area is 1, and never more."""
    rows, rare = 12_000, 20
    score, labels = np.linspace(0, 0.5, rows), np.zeros(rows, int)
    labels[-rare:] = 1
    score[-2:] = score[rows // 2]
    both = np.stack([1 - score, score], axis=1)
    for probabilities, truth in (
        (both, labels),
        (both[:, ::-1], 1 - labels),  # the other class is rare
        (both[:, 1:], labels[:, None]),  # a single label that a row may have
    ):
        found = ranks.auroc(probabilities, truth)
        assert found.values()["auroc"] == pytest.approx(sk.roc_auc_score(labels, score))
        low, high = intervals([found], 4_000)["auroc"]
        area = ranks._weighted_area(score, labels == 1)
        drawn = np.random.default_rng(1).multinomial(rows, np.full(rows, 1 / rows), size=1_000).T
        plain = np.quantile(area(drawn.astype(float)), [0.025, 0.975])
        assert (low, high) == pytest.approx(plain, abs=0.01) and high <= 1


def test_few_rows_have_a_wide_interval():
    def width(rows):
        low, high = intervals(predictions.single_label(*classes_of(rows, 2)).statistics, 1_000)["accuracy"]
        return high - low

    assert width(30) > 2.5 * width(300)


def test_the_values_are_those_that_the_evaluation_reports():
    probabilities, labels = classes_of(150, 4)
    reported = classification_metrics(probabilities, labels, list("abcd"))
    for name, value in values_of(predictions.single_label(probabilities, labels)).items():
        assert value == pytest.approx(reported[name]), name


def test_what_is_not_defined_has_no_interval():
    probabilities, labels = classes_of(50, 3)
    found = intervals(predictions.single_label(probabilities, np.minimum(labels, 1)).statistics, 100)
    assert "auroc" not in found and found["accuracy"]
    found = intervals(predictions.regression(np.arange(9.0), np.ones(9)).statistics, 100)
    assert found["r2"] is found["pearsonr"] is found["spearmanr"] is None and found["mse"]


def test_resamples_on_which_a_metric_is_not_defined_are_left_out_unless_they_are_most():
    assert percentiles(np.array([np.nan] * 40 + [1.0] * 60)) == (1, 1)
    assert percentiles(np.array([np.nan] * 60 + [1.0] * 40)) is None


def test_a_mean_over_many_classes_of_few_rows_lies_within_its_interval():
    """Resamples lack a third of the rows: on average, they have another macro F1."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(150), 3)
    guess = np.where(generator.random(450) < 0.8, labels, generator.integers(0, 150, 450))
    statistic = statistics.single_label(guess, labels, 150)
    values, found, drawn = statistic.values(), intervals([statistic], 1_000), statistic.resampled(1_000, 0)
    for name in ("f1_macro", "precision_macro"):
        low, high = found[name]
        assert (low + high) / 2 == pytest.approx(values[name], abs=0.2 * (high - low)) and high <= 1
        assert percentiles(drawn[name])[1] < values[name] + 0.25 * (high - low)  # not moved
    assert found["accuracy"] == percentiles(drawn["accuracy"])
    assert percentiles(np.array([0.9, 0.91, 0.92, 0.93]), 0.999)[1] == 1


def test_the_interval_of_a_difference_of_biased_metrics_is_that_of_the_other_order_mirrored():
    drawn = np.linspace(-0.5, -0.3, 101)
    low, high = percentiles(drawn, -0.7, -1)
    assert low < -0.7 < high and np.allclose(percentiles(-drawn, 0.7, -1), (-high, -low))


def test_wilsons_interval_has_width_where_every_row_is_right():
    assert proportion(277, 277) == pytest.approx((0.98632, 1), abs=1e-5)
    assert proportion(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)


def test_swapping_leaves_the_sum_of_both_runs_and_moves_each(monkeypatch):
    monkeypatch.setattr(resampling, "BLOCKS", 64)
    for rows in (50, 500):
        one, other = (numbers_of(rows, seed)[0][:, None] for seed in (1, 2))
        kind = np.arange(rows)
        parts = list(swapped_sums((one, kind), (other, kind), 200, seed=0))
        first, second = (np.concatenate(side) for side in zip(*parts, strict=True))
        assert first + second == pytest.approx(one.sum() + other.sum())
        assert len(np.unique(first.round(6))) > 150


def test_of_many_swaps_of_many_classes_some_are_held_at_a_time():
    labels = np.arange(40) % 2_000
    one, other = (statistics.single_label(given, labels, 2_000) for given in (labels, labels[::-1]))
    sizes = [
        first.size
        for first, _ in swapped_sums((one.features, one.kind), (other.features, other.kind), 200, 0)
    ]
    assert len(sizes) > 1 and max(sizes) <= resampling.CHUNK


@pytest.mark.parametrize("rows", [200, 1_500])
def test_slices_of_numbers_have_their_rank_correlation(rows):
    """Its expansion is resampled in slices of many rows."""
    predicted, truth = numbers_of(2 * rows + 1)
    places = [*([0, 1] * rows), 2]
    judged, lengths = predictions.regression(predicted, truth), np.arange(len(truth))
    headline = ("spearmanr", "pearsonr", "mse")
    found = slice_tables(judged, headline, lengths, {"place": places}, 2_000)
    *halves, alone = found["slices"]["place"]
    for place, half in enumerate(halves):
        own = predicted[place:-1:2], truth[place:-1:2]
        assert half["rows"] == rows and half["spearmanr"] == pytest.approx(stats.spearmanr(*own).statistic)
        exact = intervals(predictions.regression(*own).statistics, 2_000)
        for name in headline:
            ends = half[f"{name}_low"], half[f"{name}_high"]
            low, high = exact[name]
            assert ends == pytest.approx((low, high), abs=0.1 * (high - low)), name
    assert alone["spearmanr"] is alone["spearmanr_low"] is alone["spearmanr_high"] is None
    assert all(part["spearmanr_low"] < part["spearmanr"] for part in found["length_slices"])


def test_no_row_right_at_a_half_is_no_interval_without_width():
    scores, truth = np.full((30, 2), 0.2), np.ones((30, 2), np.uint8)
    found = interval_numbers(predictions.multi_label(scores, truth, predicted=scores > 0.1))
    low, high = proportion(0, 30)
    assert (found["subset_accuracy_at_0.5_low"], found["subset_accuracy_at_0.5_high"]) == (low, high)
    assert found["subset_accuracy_low"] == pytest.approx(proportion(30, 30)[0])


@pytest.mark.parametrize("is_right", [True, False])
def test_where_all_rows_are_right_or_none_the_interval_of_the_accuracy_is_not_a_point(is_right):
    labels = np.array([0, 1] * 10)
    given = labels if is_right else 1 - labels
    judged = predictions.single_label(np.eye(2)[given] * 0.8 + 0.1, labels)
    found = interval_numbers(judged)
    low, high = stats.binomtest(20 * is_right, 20).proportion_ci(0.95, method="wilson")
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx((low, high))
