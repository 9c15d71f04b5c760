"""Errors that a user can fix, reported once for all processes, and the exit codes that outside scripts rely
on."""

import contextlib
import hashlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TextIO

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: there is a checkpoint, start me again
OTHERS_SECONDS = 5.0  # for the other processes to hit the same error


def printable(text: str) -> str:
    """The text, safe for a terminal: control characters and those that change the writing direction are
    escaped, so that a user's data cannot control the terminal."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text
    )


def tell(text: str, stream: TextIO | None = None) -> None:
    """Print text for the user, by default on standard output. If nobody reads it any more (Ctrl-C also ends a
    `tee`) or the disk of a log is full, the run still continues and saves."""
    with contextlib.suppress(OSError):
        print(printable(text), file=stream or sys.stdout, flush=True)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class UserError(Exception):
    """The config, the data or the launch is wrong. The message names the key or the row, what was found,
    what was expected and what to do; the scripts print it without a traceback and exit with 2."""


def unwritten(path: Path, error: OSError) -> UserError:
    """The error for a file in output_dir that cannot be written."""
    return UserError(f"output_dir: {str(path)!r} cannot be written: {error.strerror or error}.")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An `OSError` inside becomes the `UserError` of `unwritten`."""
    try:
        yield
    except OSError as error:
        raise unwritten(path, error) from None


class Stopped(Exception):
    """The run was told to stop, and has saved a checkpoint; the scripts exit with 75."""


def print_error(message: str) -> None:
    """Print a `UserError` once, whichever processes raise it; if not all do, it says which.

    The processes that raise it synchronise through the store with which torch.distributed brought them
    together: the others may be waiting in a collective for ever, so none can be used here."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _print(message)
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher sends it as soon as another process is gone
    rank, size = distributed.get_rank(), distributed.get_world_size()
    key = f"error/{hashlib.sha256(message.encode()).hexdigest()}"
    raised = [f"{key}/{other}" for other in range(size)]
    ranks = [rank]
    try:
        store = distributed.distributed_c10d._get_default_store()
        store.set(raised[rank], "")
        if store.add(key, 1) > 1:  # another process was first, and prints it
            store.wait([f"{key}/said"], timedelta(seconds=2 * OTHERS_SECONDS))
            return
        end = time.monotonic() + OTHERS_SECONDS
        while not store.check(raised) and time.monotonic() < end:
            time.sleep(0.05)
        ranks = [other for other in range(size) if store.check([raised[other]])]
    except Exception:  # the process that kept the store, or was to print it, is gone
        store = None
    named = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of {size}: "
    _print(message if len(ranks) == size else named + message)
    if store is not None:
        store.set(f"{key}/said", "")


def _print(message: str) -> None:
    tell(f"error: {message}", sys.stderr)
