"""The heap of a run on a CPU: freed memory stays in the process, and free neighbours are merged."""

from __future__ import annotations

import os
import platform
import re
import stat
import sys

from ft.launch import asks_for

TUNABLES = "GLIBC_TUNABLES"
SETTINGS = {
    # Large blocks are in the heap, and their pages are not returned to the kernel after every step: a run
    # would pay for the same pages again in every update (up to 1.2 times the updates per second).
    "glibc.malloc.mmap_max": 0,
    "glibc.malloc.trim_threshold": 2**31 - 1,
    "glibc.malloc.top_pad": 256 * 2**20,
    # The fragments left by aligning a tensor are not cached, but merged with their neighbours at once.
    # Cached, they would split the space that activations leave, and those of the next update, whose texts
    # have another length, would need new space: 3.1 GB after 60 updates of 80 tokens per row, and growing,
    # instead of 2.3.
    "glibc.malloc.tcache_count": 0,
    "glibc.malloc.mxfast": 0,
    # Pages of 2 MB, if the kernel gives them on request: 1.013 to 1.018 times the updates per second at 24
    # tokens, and no more memory. (From glibc 2.35 on; older ones ignore this.)
    "glibc.malloc.hugetlb": 1,
}


def settle_heap() -> None:
    """Start this script again, as it was started, with the heap's `SETTINGS`: glibc reads them when a process
    starts.

    Does nothing if that has happened already, for a run on a GPU, or with another C library; nor if something
    must not be restarted: a notebook, a debugger, a program that has imported torch already; nor with a
    config from a pipe, which can be read only once."""
    options, script = sys.orig_argv[1 : -len(sys.argv)], sys.orig_argv[-len(sys.argv) :]
    runs_another = any(re.match(r"-(?![XW])\w*[mc]", option) for option in options)  # -m pdb, -um pdb, -c
    is_script = script == sys.argv and not runs_another
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == "" or asks_for("CPU")
    on_cpu = hidden or not os.path.exists("/dev/nvidiactl")
    piped = any(stat.S_ISFIFO(_mode(word.rpartition("=")[2])) for word in script[1:])
    if (
        is_script
        and not piped
        and on_cpu
        and platform.libc_ver()[0] == "glibc"
        and "torch" not in sys.modules
        and sys.gettrace() is None
    ):
        start_again()


def _mode(path: str) -> int:
    try:
        return os.stat(path).st_mode
    except (OSError, ValueError):
        return 0


def start_again() -> None:
    """Start this program again with those of the heap's `SETTINGS` that it lacks. The user's own settings are
    kept."""
    there = [word for word in os.environ.get(TUNABLES, "").split(":") if word]
    names = {word.partition("=")[0] for word in there}
    missing = [f"{name}={value}" for name, value in SETTINGS.items() if name not in names]
    if missing:
        os.environ[TUNABLES] = ":".join(there + missing)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def plain_environment() -> dict[str, str]:
    """The environment for a process whose heap is to be as the C library and the user set it."""
    ours = {f"{name}={value}" for name, value in SETTINGS.items()}
    words = [word for word in os.environ.get(TUNABLES, "").split(":") if word and word not in ours]
    others = {name: value for name, value in os.environ.items() if name != TUNABLES}
    return others | ({TUNABLES: ":".join(words)} if words else {})
