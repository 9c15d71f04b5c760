"""Writing in the background."""

import os
import sys
import threading

import pytest

from ft.writer import BackgroundWriter


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_under_nice_it_is_written_all_the_same(monkeypatch):
    """With `nice -n 19`; the kernel lets only root lower it again."""

    def set_priority(which, who, priority):
        if priority < 19:
            raise PermissionError

    monkeypatch.setattr(os, "getpriority", lambda *_: 19)
    monkeypatch.setattr(os, "setpriority", set_priority)
    written = []
    writer = BackgroundWriter()
    writer.submit("this", lambda: written.append("this"))
    writer.wait()
    assert written == ["this"] and writer.failures == 0


def test_one_thing_is_written_at_a_time():
    """Each holds a copy of the model and of the optimizer's state."""
    writer, release, written = BackgroundWriter(), threading.Event(), []
    writer.submit("one", lambda: release.wait(60) and written.append("one"))
    other = threading.Thread(target=writer.submit, args=("other", lambda: written.append("other")))
    other.start()
    other.join(0.2)
    assert other.is_alive() and writer.busy and written == []
    release.set()
    other.join(60)
    writer.wait()
    assert written == ["one", "other"]
