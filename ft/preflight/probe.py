"""A run of a few updates through the loop of train.py itself, in a folder of its own, that measures what a
run costs: `Probe` replaces `Run`.

It makes the longest update of the plan, then updates from the shortest to the longest of an epoch, scores
some batches of each split, exports, saves, and reads the checkpoint back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ft import checkpoint
from ft.analysis.resampling import RESAMPLES
from ft.data.encode import EncodedRows
from ft.data.plan import Plan, evaluation_batches
from ft.evaluation import Evaluation
from ft.preflight.costs import batch_costs, evenly, spread, update_costs
from ft.preflight.memory import peak_device_bytes, peak_host_bytes
from ft.run import Run
from ft.sharded import shard
from ft.signals import handle_stop, leave

UPDATES = 10  # of different lengths, in a pass
SECONDS = 20.0  # of passes, at least (the speed of a shared machine varies), and
MOST_PASSES = 6
ROUNDS = 8  # of batches, in an evaluation
FEW, MORE = 50, 350  # resamples of an assessment, from which the time of all of them is extrapolated


class NothingLeft(Exception):
    """The run to be resumed has made all its updates."""


@dataclass
class Measured:
    """What the main process has measured, in seconds and bytes. Costs are those of `ft.preflight.costs`.

    `planned` sums the costs of all updates to come, `planned_rounds` those of one evaluation of a split."""

    planned: np.ndarray = field(default_factory=lambda: np.zeros(3))
    updates: int = 0  # to come
    update_costs: list[np.ndarray] = field(default_factory=list)
    update_seconds: list[float] = field(default_factory=list)
    longest: dict[str, Any] = field(default_factory=dict)
    longest_cost: np.ndarray = field(default_factory=lambda: np.zeros(3))
    planned_rounds: dict[str, np.ndarray] = field(default_factory=dict)
    round_costs: list[np.ndarray] = field(default_factory=list)
    round_seconds: list[float] = field(default_factory=list)
    started: float = 0.0  # on the clock: when the model was ready
    first_evaluation_rest: float = 0.0  # metrics and export of an evaluation, with one-time costs,
    evaluation_rest: float = 0.0  # and without them
    save: float = 0.0  # the loop waits for it
    write: float = 0.0  # in the background
    end: float = 0.0  # after the last update, without the batches of evaluations
    reload: float = 0.0
    reloaded_same: bool = True
    checkpoint_bytes: int = 0
    export_bytes: int = 0
    peak_host: list[float] = field(default_factory=list)  # of every process
    before_saving: int = 0  # the same for the main one, which copies what is to be saved
    peak_device: list[float] = field(default_factory=list)
    most_host_bytes: int = 0  # that a process may have
    said: list[str] = field(default_factory=list)


class Probe(Run):
    """See the module. Methods are those of `Run`, called by the loop of train.py and by `finish`."""

    takes_best = False  # the run has it in its own folder

    def __init__(self, *args: Any) -> None:
        self.measured, self.done = Measured(), 0
        self._kept: dict[str, EncodedRows] = {}  # the rows of a split that are scored
        self._round_costs: dict[str, list[np.ndarray]] = {}  # of these
        self._last_mark = 0.0
        self._beyond = 0.0  # seconds by which the run's assessments take longer than the probe's
        self._grad_norm = torch.zeros(())
        super().__init__(*args)
        self.say = self.measured.said.append  # type: ignore[assignment]  # a run's messages are kept

    # --- before the loop

    def start(self, *args: Any, **options: Any) -> Any:
        """Start in the ordinary way, then choose the updates and the rows of the evaluations. Raises
        `NothingLeft` on all processes if there are no updates."""
        progress = super().start(*args, **options)
        handle_stop(leave)
        self.measured.started, self.done = time.monotonic(), progress.step
        if self.done >= self.total:
            super().close({})
            raise NothingLeft
        self._choose_updates()
        for split in [name for name in ("validation", "test") if name in self.data.splits]:
            self._choose_rows(split)
        return progress

    def _choose_updates(self) -> None:
        sampler, measured = self.sampler, self.measured
        lengths = sampler.dataset.rows.lengths
        first_epoch, longest = self.done // sampler.updates_per_epoch, -1.0
        for epoch in range(first_epoch, -(-self.total // sampler.updates_per_epoch)):
            plan = sampler.plan(epoch)
            begin = epoch * sampler.updates_per_epoch
            made, end = max(self.done - begin, 0), self.total - begin
            costs, largest = update_costs(lengths, plan, sampler.num_processes, sampler.micro_batch_size)
            costs, largest = costs[made:end], largest[made:end]
            measured.planned += costs.sum(axis=0)
            measured.updates += len(costs)
            if largest.max() > longest:
                longest = float(largest.max())
                update = int(largest.argmax()) + made
                self._longest = [plan.rows(update)]
                measured.longest = {
                    "epoch": epoch, "update": begin + update + 1, "rows": len(plan.rows(update)),
                    "tokens": int(lengths[plan.rows(update)].max()),
                }  # fmt: skip
            if epoch == first_epoch:
                places = spread(costs, UPDATES) + made
                self._spread = [plan.rows(int(update)) for update in places]
        # A plan has its short update at the end.
        self._spread.sort(key=len, reverse=True)

    def _choose_rows(self, split: str) -> None:
        """Keep the rows of some batches of a split, the first and longest among them."""
        rows, processes = self.data.splits[split], self.accelerator.num_processes
        most = self.config.per_device_eval_batch_size
        batches = evaluation_batches(rows.lengths, most, rows.pieces)
        costs = batch_costs(batches, rows.lengths, processes)
        self.measured.planned_rounds[split] = costs.sum(axis=0)
        chosen = evenly(len(costs), ROUNDS)
        kept = [batch for place in chosen for batch in batches[place * processes : (place + 1) * processes]]
        rows = self._kept[split] = rows.take(np.concatenate(kept))
        # With windows, the kept rows may fall into other batches than before.
        batches = evaluation_batches(rows.lengths, most, rows.pieces)
        self._round_costs[split] = list(batch_costs(batches, rows.lengths, processes))

    # --- the loop

    def epochs(self) -> Iterator[int]:
        """The passes over the chosen updates, then what a run does between updates."""
        yield self._pass(self._longest)
        self.measured.longest["seconds"] = self.measured.update_seconds.pop()  # including one-time costs
        self.measured.longest_cost = self.measured.update_costs.pop()
        begin = time.monotonic()
        for _ in range(MOST_PASSES):
            yield self._pass(self._spread)
            if any(self.hosts.sum(time.monotonic() - begin > SECONDS)):  # on all processes, or none
                break
        self.log(self._grad_norm, self.scheduler.get_last_lr())
        self._between_updates()

    def _pass(self, updates: list[np.ndarray]) -> int:
        """Have the sampler yield these updates next."""
        sampler = self.sampler
        # Every update of a plan except the last has the same number of rows.
        planned = Plan(np.concatenate(updates), len(updates[0]))
        sampler.plan = lambda epoch: planned  # type: ignore[method-assign]
        sampler.start(0, len(updates))
        costs, _ = update_costs(
            sampler.dataset.rows.lengths, planned, sampler.num_processes, sampler.micro_batch_size
        )
        self.measured.update_costs += list(costs)
        self._last_mark = self._now()
        return 0

    def count(self, losses: list[torch.Tensor], grad_norm: torch.Tensor, slot: Any) -> None:
        """Note a finished update, and the time that it took."""
        super().count(losses, grad_norm, slot)
        self._grad_norm = grad_norm
        self.measured.update_seconds.append(self._lap())

    def finished(self) -> bool:
        """The passes end by themselves."""
        return False

    def due(self, strategy: str, every: int | None) -> bool:
        """What is due comes after the passes."""
        return False

    # --- between updates, and at the end

    def _between_updates(self) -> None:
        measured = self.measured
        if self.config.eval_strategy != "no":
            measured.first_evaluation_rest = self._rest()
            first = sum(measured.round_seconds)  # including one-time costs, such as compiling
            measured.round_seconds, measured.round_costs = [], []
            measured.evaluation_rest = self._rest()
            measured.first_evaluation_rest += max(0.0, first - sum(measured.round_seconds))
        measured.before_saving = peak_host_bytes()
        begin = self._now()
        self.save()
        saved = self._now()
        self.saver.wait_until_it_stands()
        measured.save, measured.write = saved - begin, self._now() - saved
        # A run whose last model is not its best loads that for the test rows.
        self.progress.best_step = -1 if self.progress.best_metric is not None else self.progress.best_step

    def _rest(self) -> float:
        """Evaluate and export; returns the seconds besides the batches."""
        self.progress.best_metric = None  # so that this one is the best
        begin, rounds = self._now(), len(self.measured.round_seconds)
        self.evaluate()
        return self._now() - begin - sum(self.measured.round_seconds[rounds:])

    def score(self, split: str, before_stop: Callable[[], object] | None = None) -> Evaluation:
        """Score the kept rows of a split, and note the time of each round of batches. Their scores, repeated,
        then stand for those of all rows: what follows takes as long as in the run.

        The metrics of all rows are computed only for timing. What the processes have agreed on is kept."""
        self.measured.round_costs += self._round_costs[split]
        whole = self.data.splits[split]
        self.data.splits[split] = self._kept[split]
        self._last_mark = self._now()
        scored = super().score(split, before_stop)
        self.data.splits[split] = whole
        if scored.scores is None or whole.labels is None:
            return scored
        scores = np.resize(scored.scores, (len(whole), scored.scores.shape[1]))
        if split == "validation":
            self.task.calibrate(scores, whole.labels)
        found = self.task.metrics(scores, whole.labels)
        if self.named is not None:
            self.named.compute(self.task.predictions(scores), whole.labels, found)
        return Evaluation(scored.metrics, scores, whole.labels)

    def assess(self, split: str, result: Evaluation, resamples: int = RESAMPLES) -> dict[str, Any]:
        """With few resamples; then note how much longer all of them would take, each equally long."""
        found, seconds = super().assess(split, result, FEW), []  # including one-time costs
        for count in (FEW, MORE):
            begin = self._now()
            super().assess(split, result, count)
            seconds.append(self._now() - begin)
        each = max(seconds[1] - seconds[0], 0.0) / (MORE - FEW)
        self._beyond += (resamples - FEW) * each - sum(seconds)
        return found

    def _after_batch(self, bar: Any, count: int) -> None:
        super()._after_batch(bar, count)
        self.measured.round_seconds.append(self._lap())

    def settle(self) -> None:
        """The end begins."""
        super().settle()
        self._end_begun, self._rounds_before_end = self._now(), len(self.measured.round_seconds)

    def close(self, summary: dict[str, Any], *shown: Callable[[], Any]) -> None:
        """The end: note its time and the peak memory; then read the checkpoint back."""
        measured = self.measured
        rounds = sum(measured.round_seconds[self._rounds_before_end :])
        measured.end = self._now() - self._end_begun - rounds + self._beyond
        measured.peak_host = self._of_all(peak_host_bytes())
        measured.peak_device = self._of_all(peak_device_bytes(self.accelerator.device) or 0)
        super().close(summary, *shown)
        if self.accelerator.is_main_process:
            measured.export_bytes = _size(self.output_dir / "final")
            measured.checkpoint_bytes = _size(self._checkpoint)
        if self._checkpoint.exists():  # other hosts may not see it
            begin = self._now()
            measured.reloaded_same = self._reload()
            measured.reload = self._now() - begin

    @property
    def _checkpoint(self) -> Path:
        return self.output_dir / "checkpoints" / f"step-{self.progress.step:08d}"

    def _reload(self) -> bool:
        """Whether the weights in the checkpoint are those that it was made from, bit for bit."""
        plain = self.accelerator.unwrap_model(self.model)
        made_of = {name: shard(tensor).to("cpu", copy=True) for name, tensor in plain.state_dict().items()}
        self.optimizer.state.clear()  # as in a resumed run: the device need not hold it twice
        checkpoint.restore(self._checkpoint, self.accelerator, self.model, self.optimizer, self.scheduler)
        return all(
            torch.equal(shard(tensor).cpu(), made_of[name]) for name, tensor in plain.state_dict().items()
        )

    def _of_all(self, value: float) -> list[float]:
        """A number from every process."""
        return [number for (number,) in self.hosts.gather(value)]

    def _now(self) -> float:
        """The clock, after the device has finished its work."""
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def _lap(self) -> float:
        """Seconds since the last mark."""
        before, self._last_mark = self._last_mark, self._now()
        return self._last_mark - before


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
