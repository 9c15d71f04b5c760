"""What an update or a batch costs in time, as a function of its rows and tokens, fitted to a few of them.

The model is seconds = a x micro-batches + b x tokens + c x tokens x length, with padding counted: the matrix
products of the layers grow with the tokens, those of the attention with the length, too."""

from __future__ import annotations

import numpy as np

from ft.data.plan import Plan, shares


def update_costs(lengths: np.ndarray, plan: Plan, num_processes: int, micro_batch_size: int) -> np.ndarray:
    """(updates, 3): micro-batches, tokens, tokens x length of each update of an epoch, of the process that
    has most of them. `lengths` (rows,) is in tokens."""
    full, rest = divmod(len(plan.order), plan.global_batch_size)
    in_full = lengths[plan.order[: full * plan.global_batch_size]].reshape(full, plan.global_batch_size)
    parts = [_share_costs(in_full, num_processes, micro_batch_size)] if full else []
    if rest:
        in_last = lengths[plan.order[-rest:]][None]
        parts.append(_share_costs(in_last, num_processes, micro_batch_size))
    return np.concatenate(parts)


def _share_costs(lengths: np.ndarray, num_processes: int, micro_batch_size: int) -> np.ndarray:
    """The same for updates of the same number of rows; `lengths` is (updates, rows)."""
    cuts = shares(np.arange(lengths.shape[1]), num_processes, micro_batch_size)
    costs = np.zeros((num_processes, len(lengths), 3))
    for parts in cuts:
        for rank, columns in enumerate(parts):
            if len(columns):
                costs[rank] += _costs(len(columns), lengths[:, columns].max(axis=1))
    slowest = costs[:, :, 1].argmax(axis=0)
    return costs[slowest, np.arange(len(lengths))]


def batch_costs(batches: list[np.ndarray], lengths: np.ndarray, num_processes: int) -> np.ndarray:
    """(rounds, 3): the same of an evaluation, in which every process scores one batch at a time; they are
    sorted from long to short, so that the first of a round is the slowest."""
    rounds = batches[::num_processes]
    longest = np.array([lengths[rows].max() for rows in rounds])
    return _costs(np.array([len(rows) for rows in rounds]), longest)


def _costs(rows: np.ndarray | int, longest: np.ndarray) -> np.ndarray:
    tokens = np.asarray(rows, np.float64) * longest
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
    """The places of `count` of the `costs` (all, 3), from few to many tokens, at even distances of rank."""
    order = np.argsort(costs[:, 1], kind="stable")
    return order[np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))]
