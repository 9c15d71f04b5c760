"""Detects non-finite losses and gradients, and loss spikes, without waiting for the device."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ft.errors import UserError

MAX_NONFINITE = 3  # updates in a row
SPIKE_DEVIATIONS = 7.0
SPIKE_DECAY = 0.99  # of the running mean and variance: about the last hundred updates
SPIKE_AFTER = 20  # updates; before that, mean and variance say little


@dataclass
class Health:
    """What went wrong so far; part of a run's progress.

    A spike is a loss more than seven standard deviations above its running mean, much as OLMo 2's report
    counts them (Walsh et al., 2024). The last update of an epoch may have few rows, whose mean strays
    further: its variance is that of the others by its share of their rows."""

    nonfinite: int = 0  # updates without effect, because their gradient or loss was not finite
    nonfinite_in_a_row: int = 0
    spikes: int = 0
    seen: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def note(self, loss: float, finite: bool, share: float = 1.0) -> None:
        """Count one update: the mean loss over its rows, whether it and the gradient were finite, and how
        many rows it has, as a share of those of a whole update."""
        if not (finite and math.isfinite(loss)):
            self.nonfinite += 1
            self.nonfinite_in_a_row += 1
            return
        self.nonfinite_in_a_row = 0
        above = loss - self.mean
        if self.seen >= SPIKE_AFTER and above > SPIKE_DEVIATIONS * math.sqrt(self.variance / share):
            self.spikes += 1
        decay = min(SPIKE_DECAY, self.seen / (self.seen + 1))  # a plain mean at first
        self.variance = decay * (self.variance + (1 - decay) * share * above * above)
        self.mean += (1 - decay) * above
        self.seen += 1


def spread_nonfinite(loss: torch.Tensor) -> None:
    """Make the gradient of a loss NaN if the loss is not finite, although its own gradient may be.

    Through the gradients that the processes exchange, all of them then know, and `ft.optim.clip_in_step` has
    the update skipped on all alike. A finite loss keeps its gradient, to the bit."""
    value = loss.detach()
    loss.register_hook(lambda gradient: gradient * (1 + 0 * value))


class LateReader:
    """Passes numbers from the device to the host one update late: the host may wait for the previous update,
    never for the one that it has just launched, so the device is kept busy."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Any, torch.Tensor, Any]] = deque()

    def push(self, key: Any, losses: Sequence[torch.Tensor], grad_norm: torch.Tensor) -> None:
        """Start copying an update's summed loss and gradient norm; `key` is returned with them."""
        values = torch.stack([torch.stack([loss.float() for loss in losses]).sum(), grad_norm.float()])
        if values.device.type == "cpu":
            self._pending.append((key, values, None))
            return
        host = torch.empty(2, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.Event(values.device)
        event.record()
        self._pending.append((key, host, event))

    def pop(self, keep: int = 1) -> list[tuple[Any, float, float]]:
        """(key, loss, gradient norm) of all updates but the last `keep`."""
        ready = []
        while len(self._pending) > keep:
            key, values, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            ready.append((key, *values.tolist()))
        return ready


class HealthWatch:
    """Counts non-finite updates and loss spikes, one update late, and ends a run after too many of the
    former."""

    def __init__(
        self,
        health: Health,
        sum_over_processes: Callable[..., list[float]],
        rows_of: Callable[[int], str],
        say: Callable[[str], None],
        on_nonfinite: str,
        alert: Callable[[str, str], object],
    ) -> None:
        self.health, self.on_nonfinite = health, on_nonfinite
        self._sum, self._rows_of = sum_over_processes, rows_of
        self._say, self._alert = say, alert
        self._late = LateReader()

    def push(
        self, step: int, weight: float, share: float, losses: Sequence[torch.Tensor], grad_norm: torch.Tensor
    ) -> None:
        """Note an update: the true weight of its rows, their share of a whole update's, the summed losses of
        its micro-batches on this process."""
        self._late.push((step, weight, share), losses, grad_norm)

    def late(self, keep: int = 1) -> list[Any]:
        """What has not been checked yet of all updates but the last `keep`, each with its summed loss on this
        process as the second value."""
        return self._late.pop(keep)

    def check(self) -> None:
        """Check all updates. All processes call it; `UserError` is raised on all."""
        if late := self.late(keep=0):
            self.note(late, self._sum(*(loss for _, loss, _ in late)))

    def note(self, late: list[Any], totals: Sequence[float]) -> None:
        """Check these updates; `totals` are their losses, summed over the processes."""
        for ((step, weight, share), _, grad_norm), total in zip(late, totals, strict=True):
            before = self.health.nonfinite
            self.health.note(total / weight, math.isfinite(grad_norm), share)
            if self.health.nonfinite > before:
                self._complain(step, f"loss {total / weight:g}, gradient norm {grad_norm:g}")

    def _complain(self, step: int, found: str) -> None:
        in_a_row = self.health.nonfinite_in_a_row
        if in_a_row == 1:
            said = f"update {step:,} is skipped: its loss or gradient is not finite ({found})"
            self._say(f"warning: {said}; its {self._rows_of(step)}")
            self._alert("The loss or gradient is not finite", said)
        if self.on_nonfinite == "error" and in_a_row >= MAX_NONFINITE:
            self._alert("The run ended: the loss or gradient is not finite", f"{in_a_row} updates in a row")
            first = self._rows_of(step - in_a_row + 1)
            raise UserError(
                f"{in_a_row} updates in a row, {step:,} the last, had a loss or gradient that is not finite; "
                f"of the first, the {first}. None of them changed the weights. Look at these rows, "
                "lower learning_rate or add warm-up; on_nonfinite: skip continues anyway."
            )
