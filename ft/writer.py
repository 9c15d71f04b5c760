"""Writes one thing at a time to disk in the background, and counts failed writes."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable

from ft.errors import tell

NAME = "writer"


def finish_writing() -> None:
    """Return when no writer is writing any more."""
    for thread in threading.enumerate():
        if thread.name == NAME:
            thread.join()


class BackgroundWriter:
    """At most one write is in progress: `submit` waits for the one before. A failed write is reported, and
    counted in `failures` until one succeeds."""

    def __init__(self) -> None:
        self.failures = 0
        self.last_error = ""
        self._thread: threading.Thread | None = None

    def submit(self, what: str, write: Callable[[], object]) -> None:
        """Run `write` on a thread. `what` names what it writes, in case it fails."""
        self.wait()
        # Not a daemon: Python then waits for it on exit, after an error in the loop, too; where that is
        # bypassed, `finish_writing` does.
        self._thread = threading.Thread(target=self._run, args=(what, write), name=NAME)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether something is being written now."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, what: str, write: Callable[[], object]) -> None:
        if sys.platform == "linux":
            # For this thread only: training on the same cores goes first, but does not starve it. Never below
            # what `nice` has set, which the kernel forbids.
            thread = threading.get_native_id()
            with contextlib.suppress(OSError):  # a container may forbid it
                os.setpriority(os.PRIO_PROCESS, thread, max(10, os.getpriority(os.PRIO_PROCESS, thread)))
        try:
            write()
            self.failures, self.last_error = 0, ""
        except Exception as error:  # torch and safetensors raise types of their own for a full disk
            self.failures += 1
            self.last_error = f"{what} cannot be written: {str(error) or type(error).__name__}"
            tell(f"warning: {self.last_error}", sys.stderr)
