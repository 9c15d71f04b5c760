"""Which rows make up which update, as a pure function of the config: the heart of "one config, one
result"."""

from dataclasses import dataclass
from heapq import heappop, heapreplace

import numpy as np

UPDATES_PER_WINDOW = 200  # of SST-2, 1.4 % of the positions are padding; in random order 51


@dataclass(frozen=True)
class Plan:
    """One epoch. `order` (rows,) holds every row number once; update u takes the u-th slice of
    `global_batch_size`."""

    order: np.ndarray
    global_batch_size: int

    def __len__(self) -> int:
        """Number of updates; the last may be short."""
        return -(-len(self.order) // self.global_batch_size)

    def rows(self, update: int) -> np.ndarray:
        """The rows of an update, from short to long."""
        return self.order[update * self.global_batch_size : (update + 1) * self.global_batch_size]


def plan(lengths: np.ndarray, global_batch_size: int, seed: int, epoch: int) -> Plan:
    """Group the rows of an epoch into updates of rows of similar length, so that there is almost no padding.

    The rows are shuffled, cut into windows of up to 200 updates, sorted by length within a window and sliced;
    then the updates are shuffled. So neighbours differ in every epoch, ties are broken at random, and lengths
    do not drift over the epoch. Rows that do not fill an update are drawn first, at random, and form a short
    update at the end.

    `lengths` is (rows,) in tokens. Nothing about the launch is an argument. Takes about 0.1 s per million
    rows, and 4 bytes per row (16 while it is made). Similar to Transformers' "group_by_length" and fairseq's
    token buckets."""
    count = len(lengths)
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(np.arange(count, dtype=np.int32 if count < 2**31 else np.int64))
    updates, rest = divmod(count, global_batch_size)
    last = order[:rest]
    last = last[np.argsort(lengths[last], kind="stable")]
    windows = max(1, -(-updates // UPDATES_PER_WINDOW))
    batches = []
    for window in np.array_split(order[rest:].reshape(updates, global_batch_size), windows):
        rows = window.ravel()
        batches.append(rows[np.argsort(lengths[rows], kind="stable")].reshape(window.shape))
    shuffled = generator.permutation(np.concatenate(batches), axis=0) if updates else order[:0]
    return Plan(np.concatenate([shuffled.ravel(), last]), global_batch_size)


def shares(
    rows: np.ndarray, lengths: np.ndarray, num_processes: int, micro_batch_size: int
) -> list[list[np.ndarray]]:
    """Divide the rows of one update into micro-batches: `[m][r]` is the m-th of process r.

    `lengths` (rows,) in tokens is of those rows, which are sorted by it. From the longest down, each row goes
    to the process with the fewest tokens so far (Graham's rule, 1969), so that no process waits long for
    another. Each share is cut into the same number of micro-batches of at most `micro_batch_size` rows, as
    few as equal shares would need: if that bound is tight, no share can have more rows than equal shares
    would, even if its rows are short. A micro-batch may be empty if there are fewer rows than slots."""
    count = max(1, -(-len(rows) // (num_processes * micro_batch_size)))
    if num_processes == 1:
        return [[part] for part in np.array_split(rows, count)]
    places: list[list[int]] = [[] for _ in range(num_processes)]
    loads = [(0, rank) for rank in range(num_processes)]  # a heap: the lightest comes first
    tokens = lengths.tolist()
    for place in reversed(range(len(rows))):
        load, rank = loads[0]
        places[rank].append(place)
        if len(places[rank]) < count * micro_batch_size:
            heapreplace(loads, (load + tokens[place], rank))
        else:
            heappop(loads)  # full
    cut = [np.array_split(rows[taken[::-1]], count) for taken in places]
    return [[cut[rank][m] for rank in range(num_processes)] for m in range(count)]


def evaluation_batches(
    lengths: np.ndarray, batch_size: int, pieces: np.ndarray | None = None
) -> list[np.ndarray]:
    """Every row once, sorted from long to short, in batches that are the same for any launch; so are the
    scores. `pieces` (rows,): how much each row counts towards the batch size, if not one.

    Measured (MiniLM, sst2, two CPU cores): 2.0 and 2.2 times as many rows per second as in random order."""
    order = np.argsort(-lengths, kind="stable")
    if pieces is None:
        return [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    ends, batches, begin = np.cumsum(pieces[order]), [], 0
    while begin < len(order):
        before = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + batch_size, side="right")))
        batches.append(order[begin:end])
        begin = end
    return batches
