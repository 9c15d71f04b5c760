"""The bootstrap and the permutation test, for functions of sums over rows.

A bootstrap resample has each row a whole number of times, and a sum over it is a matrix product of these
counts with the contributions of the rows. Three ways to draw it, all seeded:

- up to `BLOCKS` rows: row by row. This is the plain bootstrap, exactly.
- more rows, of at most `CELLS` different kinds (the cells of a confusion matrix): the count of each kind is
  multinomial, and is drawn as such. This is also exactly the plain bootstrap.
- else: the rows are put in `BLOCKS` random blocks of equal size, which are drawn as units. The variance of
  every sum is right on average over the blocks; a width so obtained has a relative error of about
  1/sqrt(2 * BLOCKS), 0.7 percent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Features: TypeAlias = "np.ndarray | csr_array"
RESAMPLES = 10_000
BLOCKS = 10_000
CELLS = 1_000
MOST_DENSE = 1_000  # columns, such as three per class; those of 10,000 classes take 240 KB per cell
CHUNK = 250_000  # weights that are drawn at a time: they stay in the cache


def row_weights(blocks: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of `blocks` things is drawn in each resample: parts (blocks, some resamples) float64.

    A function of only its arguments, so that two runs on the same rows get the same resamples."""
    generator = np.random.default_rng(seed)
    for count in _parts(resamples, blocks):
        drawn = generator.integers(0, blocks, size=(count, blocks))
        places = drawn * count + np.arange(count)[:, None]
        yield np.bincount(places.ravel(), minlength=blocks * count).reshape(blocks, count).astype(np.float64)


def resampled_sums(
    features: Features, kind: np.ndarray, resamples: int, seed: int, row_by_row: bool
) -> Iterator[np.ndarray]:
    """Sums over bootstrap resamples of the rows: in parts (some resamples, columns), as all may be large.

    `features` (kinds, columns) is what a row of each kind adds, `kind` (rows,) which kind each row is.
    `row_by_row` uses the resamples of `row_weights`, which are the same for any other run on these rows."""
    rows = len(kind)
    if rows > BLOCKS and features.shape[0] <= CELLS and not row_by_row:
        generator, shares = np.random.default_rng(seed), np.bincount(kind, minlength=features.shape[0]) / rows
        for count in _parts(resamples, max(features.shape)):
            yield generator.multinomial(rows, shares, size=count) @ features
    else:
        blocks = _block_sums(features, kind, seed)
        for weights in row_weights(blocks.shape[0], resamples, seed):
            step = max(1, CHUNK // blocks.shape[1])
            for begin in range(0, weights.shape[1], step):
                yield weights[:, begin : begin + step].T @ blocks


def joined(parts: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The metrics (resamples,) of all resamples, from those of some at a time."""
    found = list(parts)
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def swapped_sums(
    one: tuple[Features, np.ndarray], other: tuple[Features, np.ndarray], resamples: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sums of two runs on the same rows after each row's two results were swapped, or not, by a fair coin: in
    parts, two of (some resamples, columns) each. Each run is its (features, kind), as in `resampled_sums`.

    Above `BLOCKS` rows, the coin is tossed for random blocks of rows. These are some of all swaps, and form a
    group, so that a permutation test on them is as exact as on all."""
    first, second = (_block_sums(features, kind, seed) for features, kind in (one, other))
    generator, moved = np.random.default_rng(seed), second - first
    begin, end = first.sum(axis=0), second.sum(axis=0)
    for count in _parts(resamples, max(moved.shape)):
        shift = generator.integers(0, 2, size=(count, moved.shape[0]), dtype=np.int8) @ moved
        yield begin + shift, end - shift


def _parts(resamples: int, width: int) -> Iterator[int]:
    """Resamples to hold in memory at a time."""
    step = max(1, CHUNK // max(width, 1))
    for begin in range(0, resamples, step):
        yield min(step, resamples - begin)


def _block_sums(features: Features, kind: np.ndarray, seed: int) -> Features:
    """What each block adds: (blocks, columns). Up to `BLOCKS` rows, a block is a row."""
    from scipy.sparse import csr_array

    rows = len(kind)
    blocks = min(rows, BLOCKS)
    place = np.arange(rows)
    if rows > blocks:
        place = np.random.default_rng([seed, 1]).permutation(rows) % blocks
    counts = csr_array((np.ones(rows), (place, kind)), shape=(blocks, features.shape[0]))
    sums = counts @ features
    is_small = isinstance(sums, csr_array) and sums.shape[1] <= MOST_DENSE
    return sums.toarray() if is_small else sums  # products of dense ones are faster
