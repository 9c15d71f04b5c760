"""Where the numbers go: metrics.jsonl always; W&B, TensorBoard and Trackio through Accelerate's trackers.

metrics.jsonl is the record of the run; the trackers are copies of it. One that cannot start, or breaks later,
is dropped with a warning and the run continues. Numbers that JSON cannot represent are the strings "NaN",
"Infinity" and "-Infinity", which `float` reads; null means that a metric is not defined for the data."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft import wandb_run
from ft.config import Config
from ft.durable import replace_file
from ft.errors import UserError, first_line, tell, unwritten, writing
from ft.values import is_installed, scalars
from ft.wandb_run import PROJECT, Artifact, Chart

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

ANSWER_SECONDS = 60.0


def choose_trackers(names: list[str]) -> list[str]:
    """The trackers that report_to names: "all" stands for those that are installed, "none" for none.
    Raises `UserError` for one that is unknown or not installed."""
    chosen = [name for name in dict.fromkeys(names) if name not in ("none", "all")]
    for name in chosen:
        if name not in STARTS:
            raise UserError(f"report_to: found {name!r}, expected {', '.join(STARTS)}, none or all.")
        if not is_installed(name):
            raise UserError(f"report_to: {name} is not installed; pip install '.[{name}]', or leave it out.")
    if "all" in names:
        return [name for name in STARTS if is_installed(name)]
    return chosen


def to_json(value: Any, **options: Any) -> str:
    """`json.dumps` for strict parsers: NaN and the infinities, anywhere in it, become strings."""
    return json.dumps(_strict(value), allow_nan=False, **options)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _is_scored(name: str) -> bool:
    """Whether a key of metrics.jsonl is a validation metric, of which one value is the best."""
    return name.startswith("eval/") and name != "eval/rows"


class Tracker:
    """Writes metrics.jsonl on the main process, one row per log or evaluation, and passes the numbers to the
    trackers. `make_room` is called once if a row cannot be written to disk, before the run is given up."""

    def __init__(
        self, accelerator: Accelerator, config: Config, output_dir: Path, start_step: int, rows: int,
        make_room: Callable[[], object],
    ) -> None:  # fmt: skip
        self.accelerator, self._make_room = accelerator, make_room
        self.path = output_dir / "metrics.jsonl"
        self.rows = 0
        self._higher = config.is_higher_better
        self._defined: set[str] = set()  # the metrics that W&B knows how to sum up
        if not accelerator.is_main_process:
            return
        with writing(self.path):
            self._cut(rows)
            self._file = open(self.path, "ab", buffering=0)
        name = config.run_name or output_dir.resolve().name
        for kind in map(str, accelerator.log_with):
            # One by one instead of by accelerator.init_trackers, so that one that fails does not take the
            # others down.
            try:
                accelerator.trackers.append(STARTS[kind](output_dir, start_step, name, vars(config)))
            except Exception as error:
                _warn(f"{kind} did not start, and gets no numbers", error)

    def log(self, step: int, epoch: float, values: dict[str, Any]) -> None:
        """One row. `step` counts optimizer updates; tables among `values` are left out."""
        if not self.accelerator.is_main_process:
            return
        row = {"step": step, "epoch": round(epoch, 4), **scalars(values)}
        self._write(to_json(row) + "\n")
        self.rows += 1
        known = {key: value for key, value in row.items() if value is not None}
        for tracker in list(self.accelerator.trackers):
            try:
                if tracker.name == "wandb":
                    for name in [one for one in known if _is_scored(one) and one not in self._defined]:
                        _in_time(partial(wandb_run.define_best, tracker.tracker, name, self._is_higher(name)))
                        self._defined.add(name)
                    # W&B drops rows whose own step goes back, as after a resume; our "step" is its axis.
                    values = {**known, "resumes": tracker.tracker.config["resumes"]}
                    _in_time(partial(tracker.log, values))
                else:
                    values = {key: value for key, value in known.items() if key != "step"}
                    _in_time(partial(tracker.log, values, step=step))
            except Exception as error:
                self._drop(tracker, error)

    def _write(self, line: str) -> None:
        left = line.encode()
        for make_room in (self._make_room, None):
            try:
                while left:  # a disk that fills up takes only part
                    left = left[self._file.write(left) :]
                return
            except OSError as error:
                if make_room is None:
                    raise unwritten(self.path, error) from None
                make_room()

    def alert(self, title: str, text: str, level: str = "ERROR") -> None:
        """If W&B is a tracker, have it notify the user, by email or as configured there."""
        for tracker in [one for one in self.accelerator.trackers if one.name == "wandb"]:
            try:
                _in_time(partial(tracker.tracker.alert, title=title, text=text, level=level))
            except Exception as error:
                self._drop(tracker, error)

    def finish(
        self,
        summary: dict[str, Any],
        charts: Callable[[], Mapping[str, Chart]] = dict,
        artifacts: Callable[[], Sequence[Artifact]] = list,
    ) -> None:
        """Close the file and the trackers. W&B gets `summary` for the run's summary, and charts and
        artifacts, which are made only then. An empty summary means that the run stops here to be resumed."""
        if not self.accelerator.is_main_process:
            return
        self._file.close()
        for tracker in list(self.accelerator.trackers):
            try:
                if tracker.name != "wandb":
                    _in_time(tracker.finish)
                    continue
                if summary:
                    numbers = {**scalars(summary), **self._bests()}
                    _in_time(partial(wandb_run.conclude, tracker.tracker, numbers))
                    self._add("charts", partial(_show, tracker.tracker, numbers, charts))
                    # Without a limit: hashes and upload of a large model take long.
                    self._add("artifacts", partial(wandb_run.keep, tracker.tracker, artifacts=artifacts))
                else:
                    _in_time(partial(wandb_run.stop, tracker.tracker), _upload_seconds())
                _in_time(tracker.finish, _upload_seconds())  # of what is left
                # Its service writes the last rows a moment later, which a process that leaves by os._exit
                # would cut short.
                _in_time(sys.modules["wandb"].teardown)
            except Exception as error:
                self._drop(tracker, error)
        self.accelerator.trackers.clear()

    def _add(self, what: str, add: Callable[[], object]) -> None:
        """Add something optional to a W&B run."""
        try:
            add()
        except TimeoutError:
            raise
        except Exception as error:
            _warn(f"wandb has no {what} of this run", error)

    def _bests(self) -> dict[str, dict[str, float]]:
        """For each validation metric, its last value and its best one, under max or min. From all of
        metrics.jsonl: W&B itself knows only those since the last resume."""
        found: dict[str, dict[str, float]] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            for name, given in json.loads(line).items():
                if not _is_scored(name) or given is None or not math.isfinite(value := float(given)):
                    continue
                end, better = ("max", max) if self._is_higher(name) else ("min", min)
                before = found.get(name, {}).get(end, value)
                found[name] = {end: better(before, value), "last": value}
        return found

    def _is_higher(self, name: str) -> bool:
        return self._higher(name.removeprefix("eval/"))

    def _drop(self, tracker: GeneralTracker, error: Exception) -> None:
        self.accelerator.trackers.remove(tracker)
        what = f"{tracker.name} failed, and gets no more numbers; metrics.jsonl has them all"
        folder = getattr(getattr(tracker, "tracker", None), "dir", None)
        if tracker.name == "wandb" and isinstance(folder, str):
            what += f", and wandb sync --include-online {Path(folder).parent} uploads what it got"
        _warn(what, error)
        if tracker.name == "wandb":
            with contextlib.suppress(Exception):
                # Else it complains again when the process ends; it waits for what may never answer.
                _in_time(sys.modules["wandb"].teardown)

    def flush(self) -> None:
        """Flush the rows so far to disk, on the main process. Raises `OSError`: network file systems report
        only here that they are full."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            error.filename = str(self.path)
            raise

    def _cut(self, rows: int) -> None:
        """Keep the first `rows` rows: a resumed run writes the later ones again."""
        if not self.path.exists():
            return
        kept = self.path.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]
        if kept and not kept[-1].endswith("\n"):
            kept.pop()  # a crash truncated it
        self.rows = len(kept)
        replace_file(self.path, "".join(kept))


def _show(run: Any, summary: Mapping[str, Any], charts: Callable[[], Mapping[str, Chart]]) -> None:
    made = charts()  # outside the time limit
    _in_time(partial(wandb_run.show, run, summary, made))


def _upload_seconds() -> float:
    return wandb_run.finish_seconds() + ANSWER_SECONDS


def _in_time(call: Callable[[], object], seconds: float | None = None) -> None:
    """Make a call, and raise `TimeoutError` if it does not return within `seconds` (None: ANSWER_SECONDS): a
    tracker must not hang the run."""
    seconds = ANSWER_SECONDS if seconds is None else seconds
    raised: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer in {seconds:g} s")
    if raised:
        raise raised[0]


def _warn(what: str, error: Exception) -> None:
    tell(f"warning: {what} ({first_line(error)})", sys.stderr)


# --- one function per tracker: make it, start it, give it the config


def _start_tensorboard(output_dir: Path, start_step: int, name: str, config: dict) -> GeneralTracker:
    from accelerate.tracking import TensorBoardTracker

    # Rows that a crashed run wrote after the checkpoint are hidden: they are written again.
    tracker = TensorBoardTracker("tensorboard", output_dir, purge_step=start_step + 1 if start_step else None)
    tracker.start()
    plain = {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in config.items()}
    tracker.store_init_configuration(plain)
    return tracker


def _start_trackio(output_dir: Path, start_step: int, name: str, config: dict) -> GeneralTracker:
    from accelerate.tracking import TrackioTracker

    # Only a resumed run is looked up by name: another run's folder may have the same name.
    options = {"name": name, "config": config, "resume": "allow" if start_step else "never"}
    tracker = TrackioTracker(os.environ.get("TRACKIO_PROJECT", PROJECT), **options)
    tracker.start()
    return tracker


# Under the names of their packages.
STARTS = {"wandb": wandb_run.start, "tensorboard": _start_tensorboard, "trackio": _start_trackio}
