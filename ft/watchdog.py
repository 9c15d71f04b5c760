"""Ends a hung run, and shows where it hangs."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

from ft.errors import tell

LINGER_SECONDS = 5.0  # for the other processes to print theirs, before the launcher ends them
TICK_SECONDS = 1.0  # between two checks


class Watchdog:
    """A thread that prints the stacks of this process and ends it with 1 if `alive` was not called for
    `seconds`.

    None turns it off. Every process has its own, so that each shows where it is. Time in which the process
    did not run, as in a suspended job, does not count.
    """

    def __init__(self, seconds: float | None, rank: int) -> None:
        self.seconds, self.rank = seconds, rank
        self.what, self._count = "start", 0
        self._ended = threading.Event()
        if seconds is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def alive(self, what: str) -> None:
        """Something has finished; `what` names it, for the message."""
        self.what, self._count = what, self._count + 1

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()

    def _watch(self) -> None:
        assert self.seconds is not None
        tick = min(TICK_SECONDS, self.seconds / 10)
        idle, count, now = 0.0, self._count, time.monotonic()
        while not self._ended.wait(tick):
            before, now = now, time.monotonic()
            # A longer wait is one in which this thread did not run either.
            idle += min(now - before, 2 * tick)
            if self._count != count:
                idle, count = 0.0, self._count
            if idle < self.seconds:
                continue
            tell(
                f"error: hang_timeout: process {self.rank}: nothing finished for {self.seconds:g} s; "
                f"the last was: {self.what}. The stacks of its threads:",
                sys.stderr,
            )
            faulthandler.dump_traceback(all_threads=True)
            if self._ended.wait(LINGER_SECONDS):
                return
            if self._count == count:
                os._exit(1)
            after_all = f"{self.what} finished after all; the run continues"
            tell(f"warning: hang_timeout: process {self.rank}: {after_all}", sys.stderr)
