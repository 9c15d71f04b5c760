"""The signals that ask a run to stop, as its handler counts them."""

import os
import signal
from types import SimpleNamespace

from ft.signals import LAUNCHER_DIED, REPEAT_SECONDS, StopSignals


def test_a_signal_that_comes_again_at_once_is_the_same_one_and_a_later_one_ends_the_process(monkeypatch):
    """A launcher passes on what a terminal has sent to its processes, too. That it has died is no second
    one."""
    now, killed = [0.0], []
    monkeypatch.setattr("ft.signals.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(os, "kill", lambda *words: killed.append(words))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    signals = StopSignals()
    signals._handle(signal.SIGTERM, None)
    now[0] = REPEAT_SECONDS
    signals._handle(signal.SIGINT, None)
    now[0] = 2 * REPEAT_SECONDS
    signals._handle(LAUNCHER_DIED, None)
    assert killed == [] and signals.received == "SIGTERM"
    signals._handle(signal.SIGINT, None)
    assert killed == [(os.getpid(), signal.SIGINT)] and signals.received == "SIGTERM"
