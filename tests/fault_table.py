"""The table of the faults: `python -m pytest -n 0 -m case --table=docs/reliability.md`.

Its tests are marked with what they do and what happens then; the table holds what that run saw."""

import json
import statistics
from pathlib import Path

import pytest

FAULTS = Path(__file__).parent / "faults"
GOODPUT = "## Goodput"
HEAD = """# Reliability: what was done to a run, and what happened

Made by `python -m pytest -n 0 -m case --table=docs/reliability.md`, which asserts every row. The last column
counts the variants that ended as the row says, of those that were tried.

"""


def pytest_addoption(parser):
    parser.addoption("--table", help="write the table of the faults to this file")


def pytest_configure(config):
    config.addinivalue_line("markers", "case(done, happened): a row of the table of faults")
    config.fault_rows = {}
    if config.getoption("--table") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--table: add -n 0; of several processes, none knows all rows")


def pytest_collection_modifyitems(items):
    here = [item for item in items if FAULTS in item.path.parents]
    bare = [item.nodeid for item in here if not item.get_closest_marker("case")]
    if bare:
        raise pytest.UsageError(f"no @pytest.mark.case on {bare[0]}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    mark = item.get_closest_marker("case")
    if mark is None or (report.when != "call" and report.passed):
        return
    section = (item.module.__doc__ or "").splitlines()[0]
    item.config.fault_rows.setdefault((section, *mark.args), {})[item.nodeid] = report.outcome


def pytest_sessionfinish(session):
    path = session.config.getoption("--table")
    if not path:
        return
    text, last = HEAD, None
    for (section, done, happened), results in session.config.fault_rows.items():
        if section != last:
            text += ("" if last is None else "\n") + f"## {section.rstrip('.')}\n\n"
            text += "| what was done | what happened | seen |\n|---|---|---:|\n"
            last = section
        passed = sum(outcome == "passed" for outcome in results.values())
        text += f"| {done} | {happened} | {passed} of {len(results)} |\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(with_goodput(text, Path(path).parent), encoding="utf-8")


def with_goodput(text, docs):
    """The table and, under it, what tests/faults/goodput.py has measured last, if it has."""
    text = text.split(f"\n{GOODPUT}")[0]
    if not (docs / "goodput.json").exists():
        return text
    seen = json.loads((docs / "goodput.json").read_text(encoding="utf-8"))
    restarts = [seconds for seconds in seen["restart_seconds"] if seconds is not None]
    restart = (
        f"{statistics.median(restarts):.1f} s ({max(restarts):.1f} at most)" if restarts else "none in time"
    )
    numbers = [
        f"{seen['seconds'] / 60:.1f}", str(seen["kills"]), f"{seen['updates']:,}",
        f"{100 * seen['goodput']:.1f} %", restart,
    ]  # fmt: skip
    return f"""{text}
{GOODPUT}

Measured by `python tests/faults/goodput.py` ({seen["date"]}): two processes on {seen["cores"]} cores, a random
model of MiniLM's size ({seen["seconds_per_update"]:.2f} s an update), a checkpoint every {seen["save_steps"]}
updates; SIGKILL to the launcher and both processes at even intervals, and the same command again.

| minutes | SIGKILLs | updates that counted | share of the time that went into them | restart to first new update |
|---:|---:|---:|---:|---:|
| {" | ".join(numbers)} |
"""  # noqa: E501
