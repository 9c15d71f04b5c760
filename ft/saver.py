"""The checkpoints of a running training: copied while it waits, written in the background; too many failures
end the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft.best import forget_bests
from ft.checkpoint import Progress, write_checkpoint
from ft.errors import UserError
from ft.writer import BackgroundWriter

if TYPE_CHECKING:
    from ft.hosts import HostGroup

MAX_FAILED_SAVES = 3  # in a row


class Saver:
    """The main process writes; methods are called on all. `step` is the update of the last checkpoint that
    was requested, -1 if there was none, and `best_step` the best one that it knows of."""

    def __init__(self, hosts: HostGroup, output_dir: Path, step: int, best_step: int) -> None:
        self.hosts, self.output_dir = hosts, output_dir
        self.step, self.best_step = step, best_step
        self._writer = BackgroundWriter()

    def save(
        self, progress: Progress, flush: Callable[[], object], copy: Callable[[], dict[str, Any]],
        identity: Callable[[], dict[str, Any]], total_updates: int, limit: int | None,
    ) -> None:  # fmt: skip
        """Copy the state and have it written. `copy`, called on all processes, gives the main one a copy of
        all tensors; `identity`, called on the main process, gives what a run that resumes it must share; see
        `write_checkpoint`. `flush` is the first step of writing: it flushes what the checkpoint relies on."""
        self.step, self.best_step = progress.step, progress.best_step
        self._writer.wait()  # before the copy, so that there is one at a time
        state = copy()
        if not self.hosts.is_main:
            return
        known, ours = asdict(progress), identity()  # now: the loop goes on while it is written

        def write() -> None:
            flush()
            write_checkpoint(self.output_dir / "checkpoints", state, known, ours, total_updates, limit)
            # Best models older than the one that it knows are no longer needed.
            forget_bests(self.output_dir, before=known["best_step"])

        self._writer.submit(f"output_dir: the checkpoint of update {self.step}", write)

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        self._writer.wait()

    def stands(self, step: int) -> bool:
        """Whether the last write has finished, was that of update `step`, and did not fail: the same on all
        processes."""
        self._writer.wait()
        return self.step == step and not self.hosts.sum(self.failures)[0]

    @property
    def failures(self) -> int:
        """How many writes of this process have failed since the last successful one."""
        return self._writer.failures

    def check(self, failures: float) -> None:
        """Raise `UserError` if so many `failures`, summed over all processes, are too many."""
        if failures >= MAX_FAILED_SAVES:
            raise UserError(
                f"{failures:g} checkpoints in a row failed; {self._why()}. Make room, or name another "
                "output_dir, and resume from the last complete one."
            )

    def wait_until_it_stands(self) -> None:
        """Wait until the last write has finished; raises `UserError` on all processes if it failed."""
        self._writer.wait()
        if self.hosts.sum(self.failures)[0]:
            raise UserError(
                f"{self._why()}. An earlier checkpoint, if any, is untouched: make room, then resume from it."
            )

    def _why(self) -> str:
        """The disk's error on the main process, the only one that writes: all processes raise the same."""
        return self.hosts.from_main(lambda: self._writer.last_error)
