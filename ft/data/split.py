"""Draws rows: a stratified split, and a sample. Both depend only on the rows, so that runs with different
seeds are compared on the same rows."""

import numpy as np

DRAW_SEED = 42  # not the run's seed


def sample(count: int, most: int | None) -> np.ndarray:
    """`most` of the row numbers below `count`, at random, in the order drawn; all of them, in order, for
    None.

    These are the rows that `datasets.Dataset.shuffle(seed=42).select(range(most))` takes.
    """
    if most is None or most >= count:
        return np.arange(count)
    return np.random.default_rng(DRAW_SEED).permutation(count)[:most]


def stratified(strata: np.ndarray, percentages: dict[str, float]) -> dict[str, np.ndarray]:
    """Row numbers of each named part, and under "train" of the rest, with every class split in the same
    proportions. `strata` is (rows,) of class numbers, or what a task gives instead.

    The parts of a class are rounded so that the sizes of the parts add up, except for classes with one row,
    which stay in training. Row numbers are in ascending order."""
    generator = np.random.default_rng(DRAW_SEED)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*percentages, "train")}
    owed = dict.fromkeys(percentages, 0.0)  # what rounding has withheld so far, carried from class to class
    order = np.argsort(strata, kind="stable")
    begins = np.unique(strata[order], return_index=True)[1]
    for members in np.split(order, begins[1:]):
        rows = generator.permutation(members)
        for name, percentage in percentages.items():
            owed[name] += len(members) * percentage / 100
            take = min(round(owed[name]), len(rows) - 1)
            # No class makes up for another: hundreds of one row each would use up a large one.
            owed[name] = min(owed[name] - take, 0.5)
            parts[name].append(rows[:take])
            rows = rows[take:]
        parts["train"].append(rows)
    return {name: np.sort(np.concatenate(pieces)) for name, pieces in parts.items()}
