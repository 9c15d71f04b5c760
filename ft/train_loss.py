"""The mean loss of the training rows since the last log, summed on the device: no update waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ft.checkpoint import Progress


class TrainLoss:
    """Sums the losses of each process; `progress` holds the weight of these rows and, for a checkpoint, the
    sum. `take_mean` and `fold` are to be called by all processes."""

    def __init__(self, accelerator: Accelerator, progress: Progress) -> None:
        self._accelerator, self._progress = accelerator, progress
        self._restart()

    def _restart(self) -> None:
        """Continue from the sum in `progress`, all of which the main process keeps."""
        self._sum = torch.zeros((), dtype=torch.float64, device=self._accelerator.device)
        if self._accelerator.is_main_process:
            self._sum += self._progress.log_loss

    def add(self, losses: Sequence[torch.Tensor], weight: float) -> None:
        """Count an update: the summed losses of its micro-batches on this process, and its true weight."""
        for loss in losses:
            self._sum += loss
        self._progress.log_weight += weight

    def fold(self) -> float:
        """Store the sum over all processes in `progress`."""
        self._progress.log_loss = float(self._accelerator.reduce(self._sum, reduction="sum"))
        self._restart()
        return self._progress.log_loss

    def take_mean(self) -> float:
        """Return the mean, and start a new one."""
        mean = self.fold() / self._progress.log_weight
        self._progress.log_loss = self._progress.log_weight = 0.0
        self._restart()
        return mean
