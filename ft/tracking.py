"""Where the numbers go: metrics.jsonl always; W&B, TensorBoard and Trackio through Accelerate's trackers."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft.config import Config
from ft.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

MODULES = {"wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio"}


def choose_trackers(names: list[str]) -> list[str]:
    """The trackers that report_to names: "all" stands for those that are installed, "none" for no one."""
    if names == ["all"]:
        return [name for name, module in MODULES.items() if importlib.util.find_spec(module)]
    chosen = [name for name in names if name != "none"]
    for name in chosen:
        if name not in MODULES:
            raise UserError(f"report_to: found {name!r}, expected {', '.join(MODULES)}, none or all.")
        if not importlib.util.find_spec(MODULES[name]):
            raise UserError(f"report_to: {name} is not installed; pip install '.[{name}]', or leave it out.")
    return chosen


def scalars(values: dict[str, Any]) -> dict[str, Any]:
    """The numbers among some metrics; tables stay behind."""
    return {key: value for key, value in values.items() if value is None or isinstance(value, int | float)}


def strict(row: dict[str, Any]) -> dict[str, Any]:
    """A row with numbers that JSON lacks as the strings "NaN", "Infinity" and "-Infinity"."""
    names = {math.inf: "Infinity", -math.inf: "-Infinity"}
    return {
        key: names.get(value, "NaN") if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


class Tracker:
    """Writes metrics.jsonl on the main process, one row a log or evaluation, and hands the numbers to the
    trackers."""

    def __init__(self, accelerator: Accelerator, config: Config, output_dir: Path, start_step: int) -> None:
        self.accelerator = accelerator
        self.path = output_dir / "metrics.jsonl"
        if accelerator.is_main_process:
            self._cut(start_step)
            self._file = open(self.path, "a", encoding="utf-8")
        if accelerator.log_with:
            self._start_trackers(config, output_dir, resumed=start_step > 0)

    def log(self, step: int, epoch: float, values: dict[str, Any]) -> None:
        """One row. `step` counts optimizer updates; tables among `values` are left out."""
        if not self.accelerator.is_main_process:
            return
        row = {"step": step, "epoch": round(epoch, 4), **scalars(values)}
        self._file.write(json.dumps(strict(row), allow_nan=False) + "\n")
        self._file.flush()
        known = {key: value for key, value in row.items() if value is not None}
        for tracker in list(self.accelerator.trackers):
            # W&B drops rows whose own step goes back, as after a resume; there our "step" is the axis.
            self._try(tracker, lambda t: t.log(known, step=None if t.name == "wandb" else step))

    def finish(self, summary: dict[str, Any]) -> None:
        """Close the file and the trackers; `summary` goes to the run's summary in W&B."""
        if not self.accelerator.is_main_process:
            return
        self._file.close()
        for tracker in list(self.accelerator.trackers):
            if tracker.name == "wandb":
                self._try(tracker, lambda t: t.tracker.summary.update(scalars(summary)))
            self._try(tracker, lambda t: t.finish())

    def _try(self, tracker: Any, call: Callable[[Any], Any]) -> None:
        """Ask something of a tracker; one that fails is given up with a line, and the run goes on."""
        try:
            call(tracker)
        except Exception as error:  # a tracker may raise anything, and none of it is worth the run
            if tracker in self.accelerator.trackers:
                self.accelerator.trackers.remove(tracker)
            print(
                f"WARNING {tracker.name}: {type(error).__name__}: {error}; the run goes on without it, and "
                f"{self.path} is whole",
                flush=True,
            )

    def _cut(self, step: int) -> None:
        """Keep the whole rows up to `step`: a resumed run writes the later ones again."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step and step:
                    kept.append(line)
            except (ValueError, KeyError):
                break  # a line that a crash cut short
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.rename(self.path)

    def _start_trackers(self, config: Config, output_dir: Path, resumed: bool) -> None:
        name = config.run_name or output_dir.resolve().name
        options: dict[str, Any] = {}
        if "wandb" in [str(getattr(t, "value", t)) for t in self.accelerator.log_with]:
            offline = self.accelerator.is_main_process and _wandb_offline()
            run_id = _wandb_id(output_dir) if self.accelerator.is_main_process else None
            options["wandb"] = {"name": name, "dir": str(output_dir), "id": run_id, "resume": "allow"}
            if offline:
                options["wandb"]["mode"] = "offline"
        values = {
            key: value if isinstance(value, int | float | str) else json.dumps(value)
            for key, value in vars(config).items()
        }
        self.accelerator.init_trackers(
            os.environ.get("WANDB_PROJECT", "ft"), config=values, init_kwargs=options
        )
        for tracker in self.accelerator.trackers if self.accelerator.is_main_process else []:
            if tracker.name == "wandb":
                run = tracker.tracker
                run.define_metric("step")
                run.define_metric("*", step_metric="step")
                if run.offline:
                    print(
                        "W&B: no API key or no network; logged offline. To upload: wandb sync "
                        f"{Path(run.dir).parent}"
                    )


def _wandb_id(output_dir: Path) -> str:
    """The id of this output_dir's W&B run: made once, so that a resumed run goes on under it."""
    import secrets

    path = output_dir / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()


def _wandb_offline() -> bool:
    """Whether W&B has to run offline: no key, or no way to its server; a login prompt or a time-out would
    hang."""
    import socket
    from urllib.parse import urlparse

    import wandb

    if os.environ.get("WANDB_MODE"):
        return False  # the user has decided
    if not wandb.Settings().api_key and not wandb.api.api_key:
        return True
    server = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    try:
        socket.create_connection((server.hostname or "", server.port or 443), timeout=5).close()
    except OSError:
        return True
    return False
