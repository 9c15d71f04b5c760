"""All processes of an attempt agree on its name, whatever earlier attempts have left in the store."""

import threading
import time
from datetime import timedelta

import pytest
import torch

from ft.rendezvous import agree_on_attempt


@pytest.fixture
def connect():
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: torch.distributed.TCPStore("127.0.0.1", server.port, wait_for_workers=False)


def attempt(connect, late, size=3, timeout=timedelta(seconds=60)):
    """The name that each process of an attempt gets; the process `late` comes after the others."""
    names = [None] * size

    def process(rank):
        if rank == late:
            time.sleep(0.05)
        names[rank] = agree_on_attempt(connect(), rank, size, timeout)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert None not in names
    return names


@pytest.mark.parametrize("late", [0, 1, 2])
def test_each_attempt_has_a_name_of_its_own_whoever_is_late(connect, late):
    seen = set()
    for _ in range(3):
        names = attempt(connect, late)
        assert len(set(names)) == 1
        seen |= set(names)
    assert len(seen) == 3


def test_an_attempt_that_lost_a_process_before_it_met_the_others_does_not_count(connect):
    store = connect()
    store.set("process/1", "lost")
    store.set("attempt/lost", "of the lost")
    store.set("answers/of the lost", "2")
    assert len(set(attempt(connect, late=1))) == 1


def test_a_process_that_never_comes_ends_the_wait(connect):
    connect().set("process/1", "lost")
    with pytest.raises(RuntimeError, match="not all 2 processes of this launch joined within 0:00:01"):
        agree_on_attempt(connect(), 0, 2, timedelta(seconds=1))
