"""Where a launch's processes meet: in a part of the launcher's store that no earlier attempt wrote to."""

from __future__ import annotations

import functools
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store


LONGEST = timedelta(minutes=10)  # to wait for all processes to come; the launcher has started them


def store_is_reused() -> bool:
    """Whether the launcher keeps one store for all its attempts, as torchrun and Accelerate's launcher do."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


@functools.cache
def init_method() -> str:
    """The `init_method` of `torch.distributed.init_process_group` that meets in a fresh part of the store.

    With torch's own, `--max_restarts` may fail to bring a job back: a process reads the address that another
    one wrote before it was lost, and fails or waits for it (seen with torch 2.13; pytorch issue 135712).
    """
    from torch.distributed import register_rendezvous_handler

    register_rendezvous_handler("attempt", _meet)
    return "attempt://"


def _meet(url: str, timeout: timedelta) -> Iterator[tuple[Store, int, int]]:
    from torch.distributed import PrefixStore, rendezvous

    timeout = min(timeout, LONGEST)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    yield PrefixStore(agree_on_attempt(store, rank, size, timeout), store), rank, size


def agree_on_attempt(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name for this attempt that all its `size` processes share, and that no earlier attempt had.

    The store may hold anything from earlier attempts, so no key in it can be trusted by itself. Each process
    makes up a name; the first process derives the attempt's name from all of them and stores it under each;
    the attempt is on when all named processes have answered. A name left behind by a lost process never
    answers, until the new process has written its own in that place.

    Raises `RuntimeError` if not all have come within `timeout`.
    """
    own, answered, limit = uuid.uuid4().hex, "", time.monotonic() + timeout.total_seconds()
    store.set(f"process/{rank}", own)
    while time.monotonic() < limit:
        if rank == 0:
            names = store.multi_get([f"process/{other}" for other in range(size)])
            attempt = hashlib.sha256(b"".join(names)).hexdigest()
            if attempt != answered:
                for name in names:
                    store.set(f"attempt/{name.decode()}", attempt)
        attempt = store.get(f"attempt/{own}").decode()
        if store.add(f"answers/{attempt}", int(attempt != answered)) == size:
            return attempt
        answered = attempt
        time.sleep(0.02)
    raise RuntimeError(f"not all {size} processes of this launch joined within {timeout}")
