"""Separate processes that encode the texts: the heap that suits a run makes a tokenizer slower (0.84 of the
library's own speed within the run, 1.04 and 0.94 in separate processes)."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import pyarrow as pa

from ft.data.encoder import Encoder, cores
from ft.errors import UserError
from ft.heap import plain_environment

# Not multiprocessing, whose processes run the user's script again, and wait for ever if the run was
# killed. These end with their input, and know only where to import from.
PROGRAM = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from ft.data.workers import work; work()"
)


def encode_apart(
    texts: Iterable[list[list[str]]], encoder: Encoder, count: int
) -> Iterator[dict[str, pa.Array]]:
    """What `encoder` makes of one batch after another, in `count` processes, with few batches in memory.

    Raises `UserError` if a process cannot be started, or is killed; `RuntimeError` if its code fails, after
    it has printed why."""
    environment = plain_environment()
    environment.setdefault("RAYON_NUM_THREADS", str(max(1, cores() // count)))  # for a tokenizer in Rust
    processes: list[subprocess.Popen] = []
    free: SimpleQueue[subprocess.Popen] = SimpleQueue()

    def ask(batch: list[list[str]]) -> dict[str, pa.Array]:
        process = free.get()
        try:
            _send(process, batch)
            return pickle.load(process.stdout)  # type: ignore[arg-type]
        except (OSError, EOFError, pickle.UnpicklingError):
            code = process.wait()
            if code > 0:
                message = f"a process that encodes the texts failed, exit code {code}; see above"
                raise RuntimeError(message) from None
            raise _unusable(f"ended early with exit code {code}") from None
        finally:
            free.put(process)

    pool = ThreadPoolExecutor(count)
    asked: deque[Future] = deque()
    try:
        for _ in range(count):
            processes.append(_start(environment))
        for process in processes:
            with suppress(BrokenPipeError):  # of one that has ended; reported when it is asked
                _send(process, sys.path, encoder)
            free.put(process)
        for batch in texts:
            asked.append(pool.submit(ask, batch))
            if len(asked) > 2 * count:
                yield asked.popleft().result()
        while asked:
            yield asked.popleft().result()
    finally:
        for process in processes:
            process.kill()
        pool.shutdown(cancel_futures=True)
        for process in processes:
            process.communicate()


def _start(environment: dict[str, str]) -> subprocess.Popen:
    pipe = subprocess.PIPE
    try:
        # A session of its own: a keyboard interrupt is for the run to handle.
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=pipe,
            stdout=pipe,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise _unusable(f"could not be started: {error}") from None


def _send(process: subprocess.Popen, *things: Any) -> None:
    assert process.stdin is not None
    for thing in things:
        pickle.dump(thing, process.stdin)
    process.stdin.flush()


def _unusable(what: str) -> UserError:
    return UserError(
        f"a process that encodes the texts {what}; if memory is short, set preprocessing_num_workers to 1: "
        "the texts are then encoded by the run itself."
    )


def work() -> None:
    """Encode incoming batches until the run has ended."""
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what a tokenizer prints must not mix with the answers
        try:
            encoder = pickle.load(sys.stdin.buffer)
            while True:
                pickle.dump(encoder(pickle.load(sys.stdin.buffer)), answers)
                answers.flush()
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            os._exit(0)
