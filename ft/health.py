"""Losses and gradients that are not finite, and loss spikes: found without waiting for the device."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

SPIKE_DEVIATIONS = 7.0
SPIKE_DECAY = 0.99  # of the running mean and variance: about the last hundred updates
SPIKE_AFTER = 20  # updates; before, they say little


@dataclass
class Health:
    """What went wrong so far; a part of a run's progress.

    A spike is a loss more than seven standard deviations above its running mean, much as OLMo 2's report
    counts them (Walsh et al., 2024)."""

    nonfinite: int = 0  # updates without effect, because their gradient or loss was not finite
    nonfinite_in_a_row: int = 0
    spikes: int = 0
    seen: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def note(self, loss: float, finite: bool) -> None:
        """Count one update: the mean loss over its rows, and whether it and the gradient were finite."""
        if not (finite and math.isfinite(loss)):
            self.nonfinite += 1
            self.nonfinite_in_a_row += 1
            return
        self.nonfinite_in_a_row = 0
        above = loss - self.mean
        if self.seen >= SPIKE_AFTER and above > SPIKE_DEVIATIONS * math.sqrt(self.variance):
            self.spikes += 1
        decay = min(SPIKE_DECAY, self.seen / (self.seen + 1))  # a plain mean at first
        self.variance = decay * (self.variance + (1 - decay) * above * above)
        self.mean += (1 - decay) * above
        self.seen += 1


def skip_if_nonfinite(optimizer: Any, grad_norm: torch.Tensor) -> None:
    """Have the next step of a prepared, fused optimizer change nothing if `grad_norm` is not finite.

    The optimizer decides on the device, so that the host need not wait: `found_inf` is what torch's fused
    optimizers read for `torch.amp.GradScaler`, which does this itself in fp16."""
    if optimizer.scaler is None:
        optimizer.optimizer.found_inf = grad_norm.isfinite().logical_not().float()


class LateReader:
    """Hands numbers of the device to the host one update late, when they lie there without a wait."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Any, torch.Tensor, Any]] = deque()

    def push(self, key: Any, losses: Sequence[torch.Tensor], grad_norm: torch.Tensor) -> None:
        """Begin to copy an update's summed loss and gradient norm; `key` comes back with them."""
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
