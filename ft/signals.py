"""The signals that ask a run to stop: noted by a handler, acted on after the current update."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
LAUNCHER_DIED = signal.SIGUSR2
# A launcher forwards a signal that its processes already got, when a terminal or Slurm sent it to all of
# them.
REPEAT_SECONDS = 1.0


class StopSignals:
    """What was received since `listen`: the first signal is kept in `received`, a second one ends the process
    at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.follows = "a checkpoint follows"  # what the first one leads to
        self._since = 0.0

    def listen(self) -> None:
        """Note signals from here on; what an earlier listener of this process noted counts, too. Before the
        first listener, they end the process as usual."""
        self.received, self._since = noted_signal(), time.monotonic()
        handle_stop(self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = "its launcher ended" if number == LAUNCHER_DIED else signal.Signals(number).name
        if self.received is None:
            self.received, self._since = name, time.monotonic()
            if os.environ.get("LOCAL_RANK", "0") == "0":
                # Not print: the signal may have come in the middle of one. It may have ended the reader, too.
                with contextlib.suppress(OSError):
                    os.write(2, f"\n{name}: {self.follows}; a second signal ends at once\n".encode())
        elif number != LAUNCHER_DIED and time.monotonic() - self._since > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def handle_stop(handler: Callable[[int, FrameType | None], object]) -> None:
    """Have the handler called for all signals that ask a run to stop, and when its launcher has died.

    SIGHUP (the terminal or the connection is gone) stays ignored under nohup. (Not under torchrun: it handles
    it itself, under nohup, too, and forwards the signal.)"""
    for number in (*STOP_SIGNALS, LAUNCHER_DIED):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """A handler for `handle_stop` if there is nothing to save but something to clean up; ignores further
    signals."""
    for other in (*STOP_SIGNALS, LAUNCHER_DIED):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def noted_signal() -> str | None:
    """The signal that the listener of this process has noted, if any."""
    listener = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return listener.received if isinstance(listener, StopSignals) else None


def follow_launcher(launcher: int) -> None:
    """Have the kernel tell this process when its launcher, the parent with this process id, has died.

    Otherwise `accelerate launch` with one process leaves it behind when the launcher is ended (seen with
    1.15), and so does every launcher that is killed. Only Linux has this call; elsewhere it does nothing.
    """
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of sys/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, int(LAUNCHER_DIED))
    if os.getppid() != launcher or _is_orphan():  # it had died before
        os.kill(os.getpid(), LAUNCHER_DIED)


def _is_orphan() -> bool:
    """Whether torchrun or Accelerate started this process and was gone before it could look.

    It would wait for the others' rendezvous for half an hour. An orphan's parent is process 1, which may be a
    launcher itself, in a container."""
    if os.getppid() != 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        words = Path("/proc/1/cmdline").read_bytes()
    except OSError:
        return False
    return not any(name in words for name in (b"python", b"torchrun", b"accelerate"))
