"""Skips what the end of every run costs and few tests look at."""

import functools
from contextlib import ExitStack, contextmanager
from unittest.mock import Mock, patch

FEW = 1_000  # resamples of an interval, instead of 10,000


@contextmanager
def spared(drawn=False, resampled=False):
    """Runs in this process draw no training.png and no report.html (half the time of a short run), unless
    `drawn`; their intervals use a tenth of the resamples, unless `resampled`; and git is called once."""
    import ft.assess
    import ft.finish
    import ft.report
    from ft.analysis.resampling import RESAMPLES
    from ft.run import Run

    with ExitStack() as stack:
        if not drawn:
            for name in ("write_page", "draw_training"):
                stack.enter_context(patch.object(ft.finish, name, Mock()))
        if not resampled:
            for function in (ft.assess.assess, Run.assess):
                fewer = tuple(FEW if value == RESAMPLES else value for value in function.__defaults__)
                stack.enter_context(patch.object(function, "__defaults__", fewer))
        stack.enter_context(patch.object(ft.report, "_git_commit", _git_commit()))
        yield


@functools.cache
def _git_commit():
    import ft.report

    return functools.cache(ft.report._git_commit)
