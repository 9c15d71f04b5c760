"""How much a run's updates contain and how fast they are, from one log to the next, over all processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft.data.loader import MicroBatch, PlanSampler


class Clock:
    """Seconds of training, excluding evaluation and saving."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._paused, self._breaks = 0.0, 0  # breaks may be nested

    def __enter__(self) -> None:
        if not self._breaks:
            self._pause = time.perf_counter()
        self._breaks += 1

    def __exit__(self, *exc: object) -> None:
        self._breaks -= 1
        if not self._breaks:
            self._paused += time.perf_counter() - self._pause

    def seconds(self) -> float:
        """Seconds so far, excluding all breaks (`with clock:`)."""
        now = self._pause if self._breaks else time.perf_counter()
        return now - self._begin - self._paused


class Throughput:
    """Counts rows, tokens, padding and the wait for data on the host, without reading from the device.

    `rows` and `tokens` (without padding) are those of the updates that this process's run has made, over all
    processes. Times are from the run's `clock`."""

    def __init__(self, sampler: PlanSampler, step: int, clock: Clock) -> None:
        self.lengths, self.clock = sampler.dataset.rows.lengths, clock
        self.rows = self.tokens = 0
        self._before = sampler.seen(step)  # by the run that is resumed
        self._last = (0.0, 0, 0)  # seconds, rows and tokens at the last log
        self._own_tokens = self._positions = 0  # of this process, since the last log
        self._waited = 0.0

    def waited(self, updates: Iterable[list[MicroBatch]]) -> Iterator[list[MicroBatch]]:
        """Yields the same updates, noting how long each was waited for, and its padding."""
        remaining = iter(updates)
        while True:
            begin = time.perf_counter()
            micro_batches = next(remaining, None)
            self._waited += time.perf_counter() - begin
            if micro_batches is None:
                return
            for micro_batch in micro_batches:
                # What a filler slot computes has no weight, and so counts as padding.
                self._own_tokens += int(self.lengths[micro_batch.slot.rows].sum())
                self._positions += micro_batch.inputs["input_ids"].numel()
            yield micro_batches

    def count(self, slot: Any) -> None:
        """Note a finished update by the slot of one of its micro-batches."""
        self.rows += slot.update_rows
        self.tokens += slot.update_tokens

    def totals(self) -> tuple[int, int]:
        """Rows and tokens of all updates, including those before a resume."""
        return self._before[0] + self.rows, self._before[1] + self.tokens

    def since_last(self, gather: Callable[..., list[list[float]]]) -> dict[str, float]:
        """perf/* since the last call, and data/* since the beginning of the run. All processes call it;
        `gather` gives the numbers of each.

        Rates are of the whole launch. perf/rank_* are the minimum, mean and maximum over the processes, each
        by its own clock."""
        now = (self.clock.seconds(), self.rows, self.tokens)
        seconds, rows, tokens = (new - old for new, old in zip(now, self._last, strict=True))
        ours = gather(seconds, self._own_tokens, self._positions, self._waited)
        self._last = now
        self._own_tokens = self._positions = 0
        self._waited = 0.0
        by_rank = {
            "tokens_per_second": [real / taken for taken, real, _, _ in ours],
            "padding_share": [1 - real / max(positions, 1) for _, real, positions, _ in ours],
            "data_wait_share": [waited / taken for taken, _, _, waited in ours],
        }
        values = {
            "perf/examples_per_second": rows / seconds,
            "perf/tokens_per_second": tokens / seconds,
            "perf/padding_share": 1 - tokens / max(sum(positions for _, _, positions, _ in ours), 1),
            "perf/data_wait_share": sum(by_rank["data_wait_share"]) / len(ours),
        }
        for name, each in by_rank.items():
            values[f"perf/rank_{name}_min"] = min(each)
            values[f"perf/rank_{name}_mean"] = sum(each) / len(each)
            values[f"perf/rank_{name}_max"] = max(each)
        values["data/rows"], values["data/tokens"] = self.totals()
        return values
