"""The losses against torch's and against arithmetic; thresholds against exhaustive search."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch.nn import functional

from ft.errors import UserError
from ft.tasks.text_classification.losses import binary_cross_entropy, cross_entropy
from ft.tasks.text_classification.multi_label import MultiLabel
from ft.tasks.text_classification.regression import Regression
from ft.tasks.text_classification.single_label import SingleLabel
from ft.tasks.text_classification.thresholds import best_threshold, choose_thresholds


@pytest.fixture
def logits():
    return torch.randn(7, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)


LABELS = torch.tensor([0, 1, 2, 3, 3, 3, 1])
MATRIX = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], *[[0, 0, 0, 1]] * 4], dtype=torch.uint8)


@pytest.mark.parametrize("weights", ["none", "balanced", {"a": 3.0, "d": 0.25}])
def test_the_weighted_sum_over_the_sum_of_weights_is_torchs_weighted_mean(logits, weights):
    kind = SingleLabel(class_weights=weights)
    kind.label_names = list("abcd")
    rows = torch.from_numpy(kind.row_weights(LABELS.numpy()))
    ours = (kind.training_losses(logits, LABELS) * rows).sum() / rows.sum()
    expected = {"none": [1, 1, 1, 1], "balanced": [7 / 4, 7 / 8, 7 / 4, 7 / 12]}
    by_class = expected[weights] if isinstance(weights, str) else [3, 1, 1, 0.25]
    torchs = torch.nn.CrossEntropyLoss(weight=torch.tensor(by_class, dtype=torch.float32))(logits, LABELS)
    assert ours.item() == pytest.approx(torchs.item(), rel=1e-6)


def test_focal_loss_by_hand():
    # p = (0.8, 0.2): the right class's term is (1 - 0.8) ** 2 * -ln 0.8, the wrong one's 0.8 ** 2 * -ln 0.2.
    logits = torch.tensor([[np.log(4.0), 0.0]])
    right = cross_entropy(logits, torch.tensor([0]), gamma=2.0).item()
    wrong = cross_entropy(logits, torch.tensor([1]), gamma=2.0).item()
    assert right == pytest.approx(0.04 * -np.log(0.8), rel=1e-5)
    assert wrong == pytest.approx(0.64 * -np.log(0.2), rel=1e-5)
    both = torch.tensor([[np.log(4.0), -np.log(4.0)]])  # two independent labels, each right with 0.8
    assert binary_cross_entropy(both, torch.tensor([[1, 0]]), gamma=2.0).item() == pytest.approx(
        right, rel=1e-5
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_focusing_the_focal_loss_is_the_cross_entropy(logits, smoothing):
    expected = functional.cross_entropy(logits, LABELS, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(logits, LABELS, smoothing), expected)
    nearly = cross_entropy(logits, LABELS, smoothing, gamma=1e-9)
    torch.testing.assert_close(nearly, expected)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_a_focal_loss_that_is_sure_has_a_finite_gradient(gamma):
    logits = torch.tensor([[60.0, -60.0], [-60.0, 60.0]], requires_grad=True)
    cross_entropy(logits, torch.tensor([0, 0]), gamma=gamma).sum().backward()
    assert torch.isfinite(logits.grad).all()
    logits.grad = None
    binary_cross_entropy(logits, torch.tensor([[1, 0], [1, 0]]), gamma=gamma).sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("weights", ["none", "balanced", {"b": 5.0}])
def test_multi_label_is_torchs_loss_with_pos_weight(logits, weights):
    kind = MultiLabel(pos_weight=weights)
    kind.label_names = list("abcd")
    assert kind.row_weights(MATRIX.numpy()).tolist() == [1] * 7
    expected = {"none": [1, 1, 1, 1], "balanced": [6 / 1, 5 / 2, 5 / 2, 2 / 5]}
    by_label = expected[weights] if isinstance(weights, str) else [1, 5, 1, 1]
    torchs = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(by_label, dtype=torch.float32))
    ours = kind.training_losses(logits, MATRIX).mean()
    assert ours.item() == pytest.approx(torchs(logits, MATRIX.float()).item(), rel=1e-6)
    plain = kind.plain_losses(logits, MATRIX).mean()
    assert plain.item() == pytest.approx(
        torch.nn.BCEWithLogitsLoss()(logits, MATRIX.float()).item(), rel=1e-6
    )


def test_the_loss_of_a_regression_is_in_units_of_the_variance():
    kind, targets = Regression(), np.array([10.0, 20.0, 60.0])
    kind.fit(targets)
    labels = torch.from_numpy(targets)
    always_the_mean = torch.zeros(3, 1)
    assert kind.training_losses(always_the_mean, labels).mean().item() == pytest.approx(1, rel=1e-6)
    right = torch.tensor((targets - kind.offset) / kind.scale, dtype=torch.float32)[:, None]
    assert kind.training_losses(right, labels).abs().max() < 1e-12
    assert kind.predictions(right.numpy()).tolist() == pytest.approx(targets.tolist())


def test_large_targets_that_are_near_each_other_are_told_apart():
    """Seconds since 1970: float32 resolves them to two minutes."""
    kind, targets = Regression(), 1.7e9 + np.array([0.0, 7.0, 20.0, 60.0, 61.5])
    kind.fit(targets)
    right = torch.tensor((targets - kind.offset) / kind.scale, dtype=torch.float32)[:, None]
    assert kind.training_losses(right, torch.from_numpy(targets)).abs().max() < 1e-12


# --- thresholds


def by_trying(scores, truth):
    """The highest F1 over all thresholds."""
    return max(f1_score(truth, scores >= t, zero_division=0) for t in [*scores, 2.0])


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=40))
def test_no_threshold_has_a_higher_f1(rows):
    scores, truth = np.array([s / 10 + 0.001 for s, _ in rows]), np.array([t for _, t in rows])
    chosen = best_threshold(scores, truth.astype(np.uint8))
    assert f1_score(truth, scores >= chosen, zero_division=0) == pytest.approx(by_trying(scores, truth))


def test_a_threshold_lies_midway_between_two_scores():
    assert best_threshold(np.array([0.9, 0.8, 0.4, 0.1]), np.array([1, 1, 0, 0])) == pytest.approx(
        0.6, abs=1e-3
    )
    assert best_threshold(np.array([0.9, 0.8]), np.array([1, 1])) == pytest.approx(0.4, abs=1e-3)
    assert best_threshold(np.array([0.3, 0.4]), np.array([0, 0])) == 0.5


def test_rounding_changes_no_threshold():
    """A model that has hardly learned gives nearly the same score to all rows; which one is highest may
    differ between launches."""
    generator = np.random.default_rng(0)
    scores, truth = 0.3 + 1e-7 * generator.normal(size=200), generator.integers(0, 2, 200)
    assert best_threshold(scores, truth) == best_threshold(scores[::-1], truth)


def test_one_threshold_for_all_or_one_a_label():
    scores = np.array([[0.9, 0.30, 0.6], [0.8, 0.20, 0.5], [0.2, 0.05, 0.1]])
    truth = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    common = choose_thresholds(scores, truth, per_label=False)
    assert common.tolist() == [best_threshold(scores.ravel(), truth.ravel())] * 3
    each = choose_thresholds(scores, truth, per_label=True)
    assert 0.2 < each[0] < 0.8 and 0.2 < each[1] < 0.3
    assert each[2] == common[2]  # a label that no row has


def holding(first, second, **mode):
    """The config of a model with two thresholds; in earlier versions, it has no `threshold_mode`."""
    names = {0: "a", 1: "b"}
    return SimpleNamespace(num_labels=2, id2label=names, thresholds={"a": first, "b": second}, **mode)


@pytest.mark.parametrize(
    "asked, held",
    [
        ("global", holding(0.4, 0.3, threshold_mode="per_label")),
        ("global", holding(0.4, 0.4, threshold_mode="per_label")),
        ("per_label", holding(0.4, 0.4, threshold_mode="global")),
        ("global", holding(0.4, 0.3)),
    ],
)
def test_thresholds_of_another_mode_than_was_asked_for_are_refused(asked, held):
    mode = {"global": "per_label", "per_label": "global"}[asked]
    with pytest.raises(UserError, match=f"found {asked}, but the thresholds that the model holds are {mode}"):
        MultiLabel(threshold_mode=asked).load_from_model(held)


@pytest.mark.parametrize(
    "asked, held",
    [
        (None, holding(0.4, 0.3, threshold_mode="per_label")),
        ("per_label", holding(0.4, 0.4, threshold_mode="per_label")),
        ("global", holding(0.4, 0.4, threshold_mode="global")),
        (None, holding(0.4, 0.3)),
        ("per_label", holding(0.4, 0.3)),
        ("per_label", holding(0.4, 0.4)),
        ("global", holding(0.4, 0.4)),
    ],
)
def test_thresholds_of_the_mode_that_was_asked_for_or_of_any_are_taken(asked, held):
    kind = MultiLabel(threshold_mode=asked)
    kind.load_from_model(held)
    assert kind.thresholds.tolist() == list(held.thresholds.values())


@pytest.mark.parametrize("names", [{1: "a", 2: "b"}, {0: "a", 1: "a"}])
def test_outputs_of_a_model_made_elsewhere_that_cannot_be_told_apart_are_said(names):
    """One without a name caused a traceback; for two with one name, predictions had one probability."""
    with pytest.raises(UserError, match=r"id2label in the model's config\.json is \{.*'a'"):
        SingleLabel().load_from_model(SimpleNamespace(num_labels=2, id2label=names))
