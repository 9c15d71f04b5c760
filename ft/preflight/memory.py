"""Memory of this process, its host and its device: peak use, what is free, and an error instead of the
kernel's OOM killer if it does not suffice."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CGROUP = Path("/sys/fs/cgroup")
GROUPS = Path("/proc/self/cgroup")
LEAST = 2**28  # bytes below which nothing is tried: importing a library may end the process
LITTLE = 2**24  # bytes; not enough for the stacks of two threads
UNLIMITED = 2**60  # version 1 writes about 2**63 for "no limit"


def processes_here() -> int:
    """The processes of this launch that share this host's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_host_bytes() -> int:
    """The most memory (resident set) that this process has had. Of what processes now share, only its part
    counts."""
    if sys.platform == "linux":
        # Not getrusage, in which a process inherits the peak of the one that started it.
        peak = _status("VmHWM")
        with contextlib.suppress(OSError, StopIteration):  # a Linux that does not report the parts
            peak += _status("Pss_Shmem", "smaps_rollup") - _status("RssShmem")
        return peak
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def used_host_bytes() -> int:
    """The memory (resident set) of this process now."""
    import psutil

    return psutil.Process().memory_info().rss


def free_host_bytes() -> int:
    """What this process could still take: free memory of the host, or less if its container, Slurm job or
    other control group has a limit, towards which cached files count until others need the space."""
    import psutil

    free = psutil.virtual_memory().available
    for root, path in _groups():
        names = ("memory.max", "memory.current", "inactive_file")
        if root != CGROUP:  # version 1
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        inside = root / path
        for folder in (inside, *inside.parents[: len(inside.parts) - len(root.parts)]):
            with contextlib.suppress(OSError, ValueError):  # "max" is no number
                most = int((folder / names[0]).read_text())
                if most < UNLIMITED:
                    taken = int((folder / names[1]).read_text())
                    free = min(free, most - taken + _reclaimable(folder / "memory.stat", names[2]))
    return max(free, 0)


def _groups() -> Iterator[tuple[Path, str]]:
    """For each control group hierarchy that counts memory, where it is mounted, and the place in it of this
    process's group."""
    with contextlib.suppress(OSError, ValueError):
        for line in GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield CGROUP, path.lstrip("/")
            elif "memory" in controllers.split(","):
                yield CGROUP / "memory", path.lstrip("/")


def _reclaimable(facts: Path, name: str) -> int:
    """A number in a container's memory.stat; 0 if it is missing."""
    with contextlib.suppress(OSError, ValueError):
        return int(dict(line.split() for line in facts.read_text().splitlines()).get(name, 0))
    return 0


def peak_device_bytes(device: Any) -> int | None:
    """The most memory that tensors have had on this process's accelerator; None on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def device_bytes(device: Any) -> int | None:
    """All memory of this process's accelerator; None on a CPU."""
    import torch

    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


@contextlib.contextmanager
def limited_to(free: int) -> Iterator[None]:
    """Let this process allocate `free` bytes more than it has; beyond that, allocating raises an error.

    Without it, Linux overcommits memory, and kills a process once it uses that. Memory that processes share
    is not limited (their gradients, on CPUs). Does nothing on another system."""
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    most = _status("VmData") + free
    inside = [value for value in (most, *before) if value != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(inside), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def headroom() -> float:
    """The bytes that this process may still take under `limited_to`."""
    if sys.platform != "linux":
        return math.inf
    import resource

    most = resource.getrlimit(resource.RLIMIT_DATA)[0]
    return math.inf if most == resource.RLIM_INFINITY else most - _status("VmData")


# Messages of libraries about it, and of glibc's loader (elf/dl-load.c, dl-map-segments.h) in an import.
SAID = (
    "out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "bad_alloc",
    "can't start new thread", "resource temporarily unavailable", "failed to map segment",
    "cannot map zero-fill pages", "cannot change memory protections",
    "cannot create shared object descriptor",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, or occurs when nearly none was left; libraries raise
    many kinds."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(words in said for words in SAID) or headroom() < LITTLE


def _status(name: str, file: str = "status") -> int:
    """A number in /proc about this process, in bytes."""
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
