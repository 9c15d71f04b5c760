"""Where the numbers go: metrics.jsonl always; W&B, TensorBoard and Trackio through Accelerate's trackers.

metrics.jsonl is the record of the run; the trackers are copies of it. One that cannot start, or breaks later,
is dropped with a warning and the run goes on. Numbers that JSON does not know are the strings "NaN",
"Infinity" and "-Infinity", which `float` reads; null stands for a metric that is not defined for the data."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft.config import Config
from ft.errors import EXIT_STOPPED, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

MODULES = {"wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio"}
ANSWER_SECONDS = 60.0
PROJECT = "ft"  # where the environment names no other


def choose_trackers(names: list[str]) -> list[str]:
    """The trackers that report_to names: "all" stands for those that are installed, "none" for no one."""
    chosen = [name for name in dict.fromkeys(names) if name not in ("none", "all")]
    for name in chosen:
        if name not in MODULES:
            raise UserError(f"report_to: found {name!r}, expected {', '.join(MODULES)}, none or all.")
        if not importlib.util.find_spec(MODULES[name]):
            raise UserError(f"report_to: {name} is not installed; pip install '.[{name}]', or leave it out.")
    if "all" in names:
        return [name for name, module in MODULES.items() if importlib.util.find_spec(module)]
    return chosen


def group_runs(name: str, trackers: list[str]) -> None:
    """Have the runs that this process will start stand in one group of W&B. To be called before the first."""
    if not {"wandb", "all"} & set(trackers):
        return
    if os.environ.get("WANDB_RUN_ID"):
        raise UserError(
            "num_seeds: WANDB_RUN_ID names one run of W&B, but each seed is a run of its own; unset it. In a "
            "sweep, make seed a parameter of it instead."
        )
    os.environ.setdefault("WANDB_RUN_GROUP", name)


def scalars(values: dict[str, Any]) -> dict[str, Any]:
    """The numbers among some metrics; tables stay behind."""
    return {key: value for key, value in values.items() if value is None or isinstance(value, int | float)}


def to_json(value: Any, **options: Any) -> str:
    """`json.dumps` that strict parsers read: NaN and the infinities, anywhere in it, become strings."""
    return json.dumps(_strict(value), allow_nan=False, **options)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class Tracker:
    """Writes metrics.jsonl on the main process, one row a log or evaluation, and hands the numbers to the
    trackers."""

    def __init__(
        self, accelerator: Accelerator, config: Config, output_dir: Path, start_step: int, rows: int
    ) -> None:
        self.accelerator = accelerator
        self.path = output_dir / "metrics.jsonl"
        self.rows = 0
        if not accelerator.is_main_process:
            return
        self._cut(rows)
        self._file = open(self.path, "a", encoding="utf-8")
        name = config.run_name or output_dir.resolve().name
        for kind in map(str, accelerator.log_with):
            # One after the other and not accelerator.init_trackers, so that one that fails does not take the
            # others along.
            try:
                accelerator.trackers.append(STARTS[kind](output_dir, start_step, name, vars(config)))
            except Exception as error:
                _warn(f"{kind} did not start, and gets no numbers", error)

    def log(self, step: int, epoch: float, values: dict[str, Any]) -> None:
        """One row. `step` counts optimizer updates; tables among `values` are left out."""
        if not self.accelerator.is_main_process:
            return
        row = {"step": step, "epoch": round(epoch, 4), **scalars(values)}
        try:
            self._file.write(to_json(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"output_dir: {str(self.path)!r} cannot be written: {error}.") from None
        self.rows += 1
        known = {key: value for key, value in row.items() if value is not None}
        for tracker in list(self.accelerator.trackers):
            try:
                if tracker.name == "wandb":
                    # W&B drops rows whose own step goes back, as after a resume; our "step" is its axis.
                    values = {**known, "resumes": tracker.tracker.config["resumes"]}
                    _in_time(partial(tracker.log, values))
                else:
                    values = {key: value for key, value in known.items() if key != "step"}
                    _in_time(partial(tracker.log, values, step=step))
            except Exception as error:
                self._drop(tracker, error)

    def finish(self, summary: dict[str, Any]) -> None:
        """Close the file and the trackers. `summary` goes to the run's summary in W&B; an empty one says that
        the run stops here to be resumed."""
        if not self.accelerator.is_main_process:
            return
        self._file.close()
        for tracker in list(self.accelerator.trackers):
            try:
                if tracker.name == "wandb":
                    tracker.tracker.summary.update(scalars(summary))
                    if not summary:
                        tracker.tracker.mark_preempting()
                        tracker.tracker.finish(exit_code=EXIT_STOPPED)
                tracker.finish()
                if tracker.name == "wandb":
                    # Its service writes the last rows a moment later, which a process that leaves by os._exit
                    # would cut short.
                    sys.modules["wandb"].teardown()
            except Exception as error:
                self._drop(tracker, error)
        self.accelerator.trackers.clear()

    def _drop(self, tracker: GeneralTracker, error: Exception) -> None:
        self.accelerator.trackers.remove(tracker)
        _warn(f"{tracker.name} failed, and gets no more numbers; metrics.jsonl has them all", error)
        if tracker.name == "wandb":
            with contextlib.suppress(Exception):
                sys.modules["wandb"].teardown()  # else it complains once more when the process ends

    def flush(self) -> None:
        """Have the disk take the rows so far."""
        if self.accelerator.is_main_process:
            os.fsync(self._file.fileno())

    def _cut(self, rows: int) -> None:
        """Keep the first `rows` rows: a resumed run writes the later ones again."""
        if not self.path.exists():
            return
        kept = self.path.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]
        if kept and not kept[-1].endswith("\n"):
            kept.pop()  # a crash cut it short
        self.rows = len(kept)
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write("".join(kept))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def _in_time(call: Callable[[], object]) -> None:
    """Make a call, and raise `TimeoutError` where it does not come back: a tracker must not hang the run."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if thread.is_alive():
        raise TimeoutError(f"no answer in {ANSWER_SECONDS:g} s")
    if raised:
        raise raised[0]


def _warn(what: str, error: Exception) -> None:
    print(f"warning: {what} ({_first_line(error)})", file=sys.stderr, flush=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def close_trackers(exit_code: int) -> None:
    """Let W&B write what it still holds, before a process leaves by os._exit after an error.

    Its file may be empty otherwise. After `Tracker.finish` there is nothing left to do."""
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        # A launcher sends it as soon as another process is gone; ours is leaving anyway.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(Exception):
            wandb.teardown(exit_code)


# --- one function a tracker: make it, start it, give it the config


def _start_tensorboard(output_dir: Path, start_step: int, name: str, config: dict) -> GeneralTracker:
    from accelerate.tracking import TensorBoardTracker

    # Rows after the checkpoint that a crashed run had written are hidden: they come again.
    tracker = TensorBoardTracker("tensorboard", output_dir, purge_step=start_step + 1 if start_step else None)
    tracker.start()
    plain = {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in config.items()}
    tracker.store_init_configuration(plain)
    return tracker


def _start_trackio(output_dir: Path, start_step: int, name: str, config: dict) -> GeneralTracker:
    from accelerate.tracking import TrackioTracker

    # By name only a resumed run is found again: another run's folder may have the same name.
    options = {"name": name, "config": config, "resume": "allow" if start_step else "never"}
    tracker = TrackioTracker(os.environ.get("TRACKIO_PROJECT", PROJECT), **options)
    tracker.start()
    return tracker


def _start_wandb(output_dir: Path, start_step: int, name: str, config: dict) -> GeneralTracker:
    """Start W&B under the id of this output_dir, in its folder; offline where its server cannot be used."""
    from accelerate.tracking import WandBTracker

    # The user's own settings win. No error reports to W&B, no long wait for its server, no talk but ours.
    for key, value in {
        "ERROR_REPORTING": "false", "INIT_TIMEOUT": "30", "FINISH_TIMEOUT": "300", "SHOW_INFO": "false",
    }.items():  # fmt: skip
        os.environ.setdefault(f"WANDB_{key}", value)
    import wandb

    settings = wandb.setup().settings
    run_id, resumes = _wandb_id(output_dir, settings.run_id)
    options: dict[str, Any] = {
        "name": name if config["run_name"] else settings.run_name or name,
        "dir": os.environ.get("WANDB_DIR", str(output_dir)),
        "id": None if settings.sweep_id else run_id,  # a sweep gives its runs their ids
        "resume": settings.resume or "allow",
        "config": {**config, "resumes": resumes},
    }
    why_offline = _why_offline(settings)
    if why_offline:
        options["mode"] = "offline"
    tracker = WandBTracker(settings.project or PROJECT, **options)
    try:
        tracker.start()
    except Exception as error:
        if options.get("mode") == "offline":
            raise
        why_offline = f"its server did not take the run: {_first_line(error)}"
        wandb.teardown()  # its service holds on to the id otherwise
        tracker = WandBTracker(settings.project or PROJECT, **options, mode="offline")
        tracker.start()
    run = tracker.tracker
    run.define_metric("step", hidden=True)
    for series in ("epoch", "train/*", "eval/*", "perf/*"):
        run.define_metric(series, step_metric="step")
    run.define_metric("resumes", step_metric="step", hidden=True)
    if run.offline:
        folder = Path(run.dir).resolve().parent
        # A resumed run has several folders of one id; W&B uploads them in order, each once.
        place = (
            f"{shlex.quote(str(folder.parent))}/offline-run-*-{run.id}"
            if resumes
            else shlex.quote(str(folder))
        )
        print(f"W&B: offline ({why_offline}). To upload this run: wandb sync {place}", flush=True)
    elif run.url:
        print(f"W&B: {run.url}", flush=True)
    return tracker


STARTS = {"wandb": _start_wandb, "tensorboard": _start_tensorboard, "trackio": _start_trackio}


def _wandb_id(output_dir: Path, given: str | None) -> tuple[str, int]:
    """The id of this output_dir's W&B run, and how often it was resumed.

    The file wandb_id keeps both: made once, so that a resumed run goes on under its id."""
    import secrets

    from ft.checkpoint import write_flushed  # not at the top: it imports torch

    path = output_dir / "wandb_id"
    kept = path.read_text(encoding="utf-8").split() if path.exists() else []
    run_id = given or (kept[0] if kept else secrets.token_hex(4))
    resumes = int(kept[1]) + 1 if kept[:1] == [run_id] and len(kept) > 1 else 0
    temporary = output_dir / ".wandb_id.tmp"
    write_flushed(temporary, f"{run_id} {resumes}\n")
    temporary.replace(path)
    return run_id, resumes


def _why_offline(settings: Any) -> str:
    """Why W&B has to run offline; empty where it need not. Without a key it would ask for one, and without a
    network it would try for minutes."""
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
        urllib.request.urlopen(settings.base_url, timeout=5).close()  # through the user's proxy, if any
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError:
        return f"{settings.base_url} cannot be reached"
    except Exception as error:  # a key that cannot be one
        return _first_line(error)
    return ""
