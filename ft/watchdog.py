"""Ends a run that hangs, and shows where."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

from ft.errors import tell

LINGER_SECONDS = 5.0  # for the other processes to print theirs, before the launcher ends them


class Watchdog:
    """A thread that prints the stacks of this process and ends it with 1 when `alive` was not called for
    `seconds`.

    None turns it off. Every process has its own, so that each says where it stands.
    """

    def __init__(self, seconds: float | None, rank: int) -> None:
        self.seconds, self.rank = seconds, rank
        self.what = "start"
        self.alive(self.what)
        self._ended = threading.Event()
        if seconds is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def alive(self, what: str) -> None:
        """Something came to its end; `what` says what, for the message."""
        self.what, self._last = what, time.monotonic()

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()

    def _watch(self) -> None:
        assert self.seconds is not None
        while not self._ended.wait(max(0.05, self._last + self.seconds - time.monotonic())):
            if time.monotonic() - self._last < self.seconds:
                continue
            tell(
                f"error: hang_timeout: process {self.rank}: nothing came to an end for {self.seconds:g} s; "
                f"the last was: {self.what}. The stacks of its threads:",
                sys.stderr,
            )
            faulthandler.dump_traceback(all_threads=True)
            if not self._ended.wait(LINGER_SECONDS):
                os._exit(1)
