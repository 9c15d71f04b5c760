"""What an update or a batch costs in time, as a function of its rows and tokens, fitted to a few of them.

The model is seconds = a x micro-batches + b x tokens + c x tokens x length, including padding: the matrix
products of the layers grow with the tokens, those of the attention also with the length."""

from __future__ import annotations

import numpy as np

from ft.data.plan import Plan, shares


def update_costs(
    lengths: np.ndarray, plan: Plan, num_processes: int, micro_batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(updates, 3): micro-batches, tokens, tokens x length of each update of an epoch, for the process that
    has most of them; and (updates,) tokens x length of the largest micro-batch, which needs most memory.
    `lengths` (rows,) is in tokens."""
    costs, largest = np.zeros((len(plan), 3)), np.zeros(len(plan))
    for update in range(len(plan)):
        in_update = lengths[plan.rows(update)]
        cut = shares(in_update, in_update, num_processes, micro_batch_size)
        for parts in zip(*cut, strict=True):
            sizes = [(len(part), float(part[-1])) for part in parts if len(part)]
            tokens = sum(rows * longest for rows, longest in sizes)
            if tokens > costs[update, 1]:
                costs[update] = len(sizes), tokens, sum(rows * longest**2 for rows, longest in sizes)
            largest[update] = max([largest[update], *(rows * longest**2 for rows, longest in sizes)])
    return costs, largest


def batch_costs(batches: list[np.ndarray], lengths: np.ndarray, num_processes: int) -> np.ndarray:
    """(rounds, 3): the same for an evaluation, in which every process scores one batch at a time; they are
    sorted from long to short, so that the first of a round is the slowest."""
    rounds = batches[::num_processes]
    longest = np.array([lengths[batch].max() for batch in rounds])
    tokens = np.array([len(batch) for batch in rounds], np.float64) * longest  # in int32 they would overflow
    return np.stack([np.ones_like(tokens), tokens, tokens * longest], axis=-1)


def fit(costs: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """(3,) seconds for each of the three costs, by least squares; none is negative.

    `costs` is (measured, 3), `seconds` (measured,)."""
    scale = costs.max(axis=0)
    scale[scale == 0] = 1.0
    used = np.ones(costs.shape[1], bool)
    while used.any():
        solution = np.linalg.lstsq(costs[:, used] / scale[used], seconds, rcond=None)[0]
        if (solution >= 0).all():
            found = np.zeros(costs.shape[1])
            found[used] = solution / scale[used]
            return found
        used[np.flatnonzero(used)[solution.argmin()]] = False
    return np.zeros(costs.shape[1])


def spread(costs: np.ndarray, count: int) -> np.ndarray:
    """The places of `count` of the `costs` (all, 3), from few to many tokens, evenly spaced by rank."""
    order = np.argsort(costs[:, 1], kind="stable")
    return order[evenly(len(order), count)]


def evenly(length: int, count: int) -> np.ndarray:
    """`count` of `length` places (all, if there are fewer), evenly spaced from the first to the last."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int))
