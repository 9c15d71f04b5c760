"""The only file that imports W&B: a W&B run under the id of its output_dir, offline if its server cannot be
used; its series, summary, alerts, charts and artifacts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ft.durable import replace_file
from ft.errors import EXIT_STOPPED, UserError, first_line, tell
from ft.signals import noted_signal

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "ft"  # where the environment names no other

# Of a chart: the name of W&B's own picture, and which of its fields each column of the table is.
PICTURES = {
    "matrix": ("wandb/confusion_matrix/v1", ("Actual", "Predicted", "nPredictions")),
    "curves": ("wandb/area-under-curve/v0", ("class", "x", "y")),
}
_ours = {""}  # folders that this process named in the environment


@dataclass(frozen=True)
class Chart:
    """A table, or a plot of one. The columns of a matrix are the true and the predicted class and the number
    of rows; those of curves, the curve's name, x and y."""

    kind: Literal["table", "matrix", "curves"]
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Artifact:
    """Something that W&B stores in versions under one name: `about` describes it, with its fingerprint, in
    few keys; its content is the files of a folder, or is written to one file as JSON."""

    kind: Literal["dataset", "model"]
    name: str
    about: dict[str, Any]
    content: Path | dict[str, Any]


def group_runs(name: str, trackers: list[str]) -> None:
    """Put the runs that this process will start into one W&B group. To be called before the first."""
    if not {"wandb", "all"} & set(trackers):
        return
    if os.environ.get("WANDB_RUN_ID"):
        raise UserError(
            "num_seeds: WANDB_RUN_ID names one run of W&B, but each seed is a run of its own; unset it. In a "
            "sweep, make seed a parameter of it instead."
        )
    os.environ.setdefault("WANDB_RUN_GROUP", name)


def start(output_dir: Path, start_step: int, name: str, config: dict) -> GeneralTracker:
    """Start W&B under the id of this output_dir, in its folder; offline if its server cannot be used."""
    from accelerate.tracking import WandBTracker

    # The user's own settings win. No error reports to W&B, no long wait for its server, no output but ours.
    for key, value in {
        "ERROR_REPORTING": "false", "INIT_TIMEOUT": "30", "SHOW_INFO": "false", "FINISH_TIMEOUT": "300",
        "FINISH_TIMEOUT_RAISES": "true",
    }.items():  # fmt: skip
        os.environ.setdefault(f"WANDB_{key}", value)
    folder = os.environ.get("WANDB_DIR", str(output_dir))
    # Where it stages and caches artifacts, tables with texts among them; else below the user's home.
    for key, place in {"WANDB_DATA_DIR": "wandb", "WANDB_CACHE_DIR": "wandb/cache"}.items():
        if os.environ.get(key, "") in _ours:
            os.environ[key] = str(Path(folder).resolve() / place)
            _ours.add(os.environ[key])
    import wandb

    settings = wandb.setup().settings
    run_id, resumes = _wandb_id(output_dir, settings.run_id)
    options: dict[str, Any] = {
        "name": name if config["run_name"] else settings.run_name or name,
        "dir": folder,
        "id": None if settings.sweep_id else run_id,  # a sweep gives its runs their ids
        "resume": settings.resume or "allow",
        "config": {**config, "resumes": resumes},
    }
    why_offline = _why_offline(settings)
    if why_offline:
        options["mode"] = "offline"
    project = None if settings.sweep_id else settings.project or PROJECT  # a sweep has one
    tracker = WandBTracker(project, **options)
    try:
        tracker.start()
    except Exception as error:
        if options.get("mode") == "offline":
            raise
        why_offline = f"its server did not take the run: {first_line(error)}"
        wandb.teardown()  # its service holds on to the id otherwise
        tracker = WandBTracker(project, **options, mode="offline")
        tracker.start()
    run = tracker.tracker
    run.define_metric("step", hidden=True)
    for series in ("epoch", "train/*", "eval/*", "perf/*", "data/*", "test/*", "best/*"):
        run.define_metric(series, step_metric="step")
    run.define_metric("resumes", step_metric="step", hidden=True)
    if run.offline:
        started = Path(run.dir).resolve().parent
        # A resumed run has several folders of one id; W&B uploads them in order, each once.
        place = (
            f"{shlex.quote(str(started.parent))}/offline-run-*-{run.id}"
            if resumes
            else shlex.quote(str(started))
        )
        tell(f"W&B: offline ({why_offline}). To upload this run: wandb sync {place}")
    elif run.url:
        tell(f"W&B: {run.url}")
    return tracker


# --- what is sent to a run


def define_best(run: Any, name: str, is_higher: bool) -> None:
    """Have the summary keep the best and the last value of a metric."""
    escaped = name.replace(".", r"\.")  # of f1_micro_at_0.5: W&B splits names at dots
    run.define_metric(escaped, step_metric="step", summary=f"{'max' if is_higher else 'min'},last")


def conclude(run: Any, summary: Mapping[str, Any]) -> None:
    """Give a finishing run the numbers of its summary."""
    run.summary.update(summary)


def show(run: Any, summary: Mapping[str, Any], charts: Mapping[str, Chart]) -> None:
    """Log charts in a last row, with the best values that a sweep may use."""
    import wandb

    drawn: dict[str, Any] = {}
    for key, chart in charts.items():
        table = wandb.Table(columns=list(chart.columns), data=[list(row) for row in chart.rows])
        drawn[key] = table
        if chart.kind != "table":
            picture, names = PICTURES[chart.kind]
            fields = dict(zip(names, chart.columns, strict=True))
            words = {"title": chart.title, "x-axis-title": fields.get("x"), "y-axis-title": fields.get("y")}
            words = {name: word for name, word in words.items() if word}
            drawn[key] = wandb.plot_table(picture, table, fields, words)
    best = {key: value for key, value in summary.items() if key.startswith("best/") and value is not None}
    axes = {"step": summary["train/total_steps"], "resumes": run.config["resumes"]}
    run.log({**axes, **best, **drawn})


def keep(run: Any, artifacts: Callable[[], Sequence[Artifact]]) -> None:
    """Log artifacts."""
    import wandb

    # Offline, the upload comes later, when a folder may hold another model: its files are copied.
    policy: Any = "mutable" if run.offline else "immutable"
    for artifact in artifacts():
        name = re.sub("[^A-Za-z0-9_.-]+", "-", artifact.name)[:100]
        kept = wandb.Artifact(f"{artifact.kind}-{name}", artifact.kind, metadata=artifact.about)
        if isinstance(artifact.content, dict):
            with kept.new_file(f"{artifact.kind}.json") as file:
                file.write(json.dumps(artifact.content, indent=1))
        else:
            for path in (path for path in sorted(artifact.content.rglob("*")) if path.is_file()):
                place = path.relative_to(artifact.content).as_posix()
                kept.add_file(str(path), place, skip_cache=True, policy=policy)
        logged = run.log_artifact(kept)
        if not (run.offline or run.disabled):
            wait_for_upload(logged)


def wait_for_upload(logged: Any) -> None:
    """Wait for an artifact, however long a model takes, but not if the run is asked to stop: then the rest
    has FINISH_TIMEOUT. Raises what the upload raises."""
    raised: list[Exception] = []

    def wait() -> None:
        try:
            logged.wait()  # given a limit, it would cancel the upload there
        except Exception as error:
            raised.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    while waiting.is_alive() and noted_signal() is None:
        waiting.join(0.2)
    if raised:
        raise raised[0]


def finish_seconds() -> float:
    """How long W&B's service may take to end a run, by `start` or by the user."""
    return float(os.environ["WANDB_FINISH_TIMEOUT"])


def stop(run: Any) -> None:
    """End a run that is to be resumed."""
    run.mark_preempting()
    run.finish(exit_code=EXIT_STOPPED)


# --- its id, and whether it is offline


def _wandb_id(output_dir: Path, given: str | None) -> tuple[str, int]:
    """The id of this output_dir's W&B run, and how often it was resumed.

    The file wandb_id keeps both: made once, so that a resumed run goes on under its id."""
    import secrets

    path = output_dir / "wandb_id"
    kept = path.read_text(encoding="utf-8").split() if path.exists() else []
    run_id = given or (kept[0] if kept else secrets.token_hex(4))
    resumes = int(kept[1]) + 1 if kept[:1] == [run_id] and len(kept) > 1 else 0
    replace_file(path, f"{run_id} {resumes}\n")
    return run_id, resumes


def _why_offline(settings: Any) -> str:
    """Why W&B has to run offline; empty if it need not. Without a key it would ask for one, and without a
    network it would try for minutes."""
    import ssl
    import urllib.error
    import urllib.request

    import wandb

    if settings.mode in ("offline", "dryrun"):
        return "as WANDB_MODE asks"
    if settings.mode == "disabled":
        return ""
    try:
        if not wandb.login(prompt=False, verify=False):
            return "no API key"
        if settings.insecure_disable_ssl or settings.http_proxy or settings.https_proxy:
            return ""  # W&B's own route there, which is not that of urllib
        urllib.request.urlopen(settings.base_url, timeout=5).close()  # through the user's proxy, if any
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError as error:
        if isinstance(getattr(error, "reason", error), ssl.SSLError):
            return ""  # it answers; W&B's own client trusts other certificates than Python
        return f"{settings.base_url} cannot be reached"
    except Exception as error:  # an invalid key
        return first_line(error)
    return ""


def close_trackers(exit_code: int) -> None:
    """Let W&B write what it still holds, before a process leaves by os._exit after an error.

    Its file may be empty otherwise. After `Tracker.finish` there is nothing left to do."""
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        # A launcher sends it as soon as another process is gone; ours is leaving anyway.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(Exception):
            wandb.teardown(exit_code)
