"""The heap of a run on a CPU: what is freed stays in the process, and joins what is free beside it."""

from __future__ import annotations

import os
import sys

TUNABLES = "GLIBC_TUNABLES"
SETTINGS = {
    # Big blocks lie in the heap, and their pages are not given back to the kernel after every step: a run
    # would pay for the same pages again in every update (up to 1.2 times the updates a second).
    "glibc.malloc.mmap_max": 0,
    "glibc.malloc.trim_threshold": 2**31 - 1,
    "glibc.malloc.top_pad": 256 * 2**20,
    # The splinters that are left where a tensor is aligned are not cached, but join their neighbours at once.
    # Cached, they would part the room that activations leave, and those of the next update, whose texts have
    # another length, would need new room: 3.1 GB after 60 updates of 80 tokens a row, and more and more,
    # where this takes 2.3.
    "glibc.malloc.tcache_count": 0,
    "glibc.malloc.mxfast": 0,
}


def settle_heap() -> None:
    """Start this program again, as it was started, with the heap's `SETTINGS`, which glibc reads then.

    Does nothing where that has happened, for a run on a GPU, under a debugger, for a program that does not
    begin with this (torch is there already) and with another C library. A setting of the user stays."""
    if not (os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not os.path.exists("/dev/nvidiactl")):
        return
    if "torch" in sys.modules or sys.gettrace() is not None or not _is_glibc():
        return
    there = [word for word in os.environ.get(TUNABLES, "").split(":") if word]
    names = {word.partition("=")[0] for word in there}
    missing = [f"{name}={value}" for name, value in SETTINGS.items() if name not in names]
    is_file = getattr(sys.modules["__main__"], "__file__", None) is not None  # not the text of a pipe
    if not missing or not is_file:
        return
    os.environ[TUNABLES] = ":".join(there + missing)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False
