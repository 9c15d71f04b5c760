"""The errors that a user can mend, said once for all processes, and the exit codes that scripts outside rely
on."""

import hashlib
import os
import signal
import sys
import time
from datetime import timedelta

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: a checkpoint stands, start me again
OTHERS_SECONDS = 5.0  # for the other processes to come upon the same error


def printable(text: str) -> str:
    """The text for a terminal: control characters and those that turn the writing direction are escaped, so
    that a user's data cannot give the terminal orders."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text
    )


class UserError(Exception):
    """The config, the data or the launch is wrong. The message names the key or the row, what was found,
    what was expected and what to do; the scripts print it without a traceback and exit with 2."""


class Stopped(Exception):
    """The run was told to stop, and has saved a checkpoint; the scripts exit with 75."""


def print_error(message: str) -> None:
    """Print a `UserError` once, whichever processes raise it; where not all of them do, it says which.

    The processes that raise it meet in the store through which torch.distributed brought them together: the
    others may wait in a collective for ever, so none can be used here."""
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
        if store.add(key, 1) > 1:  # another process was first, and says it
            store.wait([f"{key}/said"], timedelta(seconds=2 * OTHERS_SECONDS))
            return
        end = time.monotonic() + OTHERS_SECONDS
        while not store.check(raised) and time.monotonic() < end:
            time.sleep(0.05)
        ranks = [other for other in range(size) if store.check([raised[other]])]
    except Exception:  # who kept the store, or was to say it, is gone
        store = None
    named = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of {size}: "
    _print(message if len(ranks) == size else named + message)
    if store is not None:
        store.set(f"{key}/said", "")


def _print(message: str) -> None:
    print(printable(f"error: {message}"), file=sys.stderr, flush=True)
