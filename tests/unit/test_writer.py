"""What is written in the background."""

import os
import sys

import pytest

from ft.writer import BackgroundWriter


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_under_nice_it_is_written_all_the_same(monkeypatch):
    """With `nice -n 19`; the kernel lets nobody but root lower it again."""

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
