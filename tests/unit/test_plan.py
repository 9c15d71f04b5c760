"""The plan: every row once an epoch, the same for any launch, almost no padding, fast."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft.data.plan import evaluation_batches, plan, shares

lengths_of_rows = st.lists(st.integers(1, 60), min_size=1, max_size=400).map(lambda v: np.array(v, np.int32))
batch = st.integers(1, 50)
seed = st.integers(0, 2**31)


@given(lengths_of_rows, batch, seed, st.integers(0, 5))
def test_every_row_stands_exactly_once_in_an_epoch(lengths, size, seed, epoch):
    made = plan(lengths, size, seed, epoch)
    assert sorted(made.order) == list(range(len(lengths)))
    assert len(made) == -(-len(lengths) // size)
    assert [len(made.rows(u)) for u in range(len(made) - 1)] == [size] * (len(made) - 1)


@given(lengths_of_rows, batch, seed, st.integers(1, 8), st.integers(1, 9))
def test_the_union_over_processes_and_micro_batches_is_the_plans_update(
    lengths, size, seed, processes, micro
):
    made = plan(lengths, size, seed, 0)
    for update in range(len(made)):
        cut = shares(made.rows(update), processes, micro)
        assert all(len(parts) == processes for parts in cut)
        assert all(len(part) <= micro for parts in cut for part in parts)
        assert sorted(np.concatenate([p for parts in cut for p in parts])) == sorted(made.rows(update))
        sizes = [sum(len(parts[rank]) for parts in cut) for rank in range(processes)]
        assert max(sizes) - min(sizes) <= 1


@given(lengths_of_rows, st.integers(1, 70))
def test_evaluation_scores_every_row_once(lengths, size):
    batches = evaluation_batches(lengths, size)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert max(map(len, batches)) <= size


@settings(max_examples=20)
@given(seed)
def test_the_plan_is_a_pure_function_and_differs_from_epoch_to_epoch_and_seed_to_seed(seed):
    lengths = np.random.default_rng(0).integers(3, 50, 500)
    again, same = plan(lengths, 32, seed, 1), plan(lengths, 32, seed, 1)
    assert np.array_equal(again.order, same.order)
    for other in (plan(lengths, 32, seed, 2), plan(lengths, 32, seed + 1, 1)):
        batches = {frozenset(other.rows(u)) for u in range(len(other))}
        shared = batches & {frozenset(again.rows(u)) for u in range(len(again))}
        assert len(shared) <= 2  # the shortest and the longest rows may meet again, where no tie parts them


def test_the_pinned_plan_of_a_small_epoch():
    """A change here changes every run's trajectory: raise the version and say so in the CHANGELOG."""
    lengths = np.array([5, 9, 2, 7, 7, 3, 8, 1, 6, 4])
    assert plan(lengths, 4, seed=42, epoch=0).order.tolist() == PINNED


PINNED = [7, 2, 9, 0, 8, 3, 4, 1, 5, 6]


def test_short_reviews_are_padded_by_less_than_four_percent():
    generator = np.random.default_rng(7)
    lengths = np.clip(generator.lognormal(2.9, 0.6, 7000).astype(int), 3, 70)  # like movie-review sentences
    made = plan(lengths, 32, 42, 0)
    real, padded = (
        lengths.sum(),
        sum(lengths[made.rows(u)].max() * len(made.rows(u)) for u in range(len(made))),
    )
    assert 1 - real / padded < 0.04
    shuffled = generator.permutation(lengths)[: 7000 // 32 * 32].reshape(-1, 32)
    assert 1 - shuffled.sum() / (shuffled.max(axis=1) * 32).sum() > 0.3  # what is saved


def test_the_length_of_an_update_does_not_drift_over_the_epoch():
    lengths = np.random.default_rng(3).integers(5, 100, 20_000)
    made = plan(lengths, 32, 42, 0)
    means = [lengths[made.rows(u)].mean() for u in range(len(made))]
    quarter = len(means) // 4
    assert abs(np.mean(means[:quarter]) - np.mean(means[-quarter:])) < 8


def test_the_short_last_update_is_a_random_draw_not_the_longest_rows():
    lengths = np.arange(1, 1001)
    means = [lengths[plan(lengths, 32, 42, epoch).rows(31)].mean() for epoch in range(40)]
    assert 400 < np.mean(means) < 600


def test_ten_million_rows_are_planned_in_seconds_with_four_bytes_a_row():
    lengths = np.random.default_rng(0).integers(5, 200, 10_000_000).astype(np.int32)
    begin = time.perf_counter()
    made = plan(lengths, 32, 42, 0)
    assert time.perf_counter() - begin < 60  # generous: 3 s where nothing else runs
    assert made.order.nbytes == 4 * len(lengths)


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_shares_hold_about_the_same_number_of_tokens(processes):
    lengths = np.clip(np.random.default_rng(1).lognormal(3.5, 0.7, 20_000).astype(int), 4, 256)
    made = plan(lengths, 256, 42, 0)
    for update in range(len(made) - 1):
        cut = shares(made.rows(update), processes, 256)
        tokens = np.array([lengths[part].sum() for part in cut[0]])
        assert tokens.max() / tokens.mean() < 1.05
