"""Forecasts the time, memory and disk space of the whole run from a probe's measurements."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ft.checkpoint import checkpoints_in
from ft.config import Config
from ft.preflight.costs import fit
from ft.preflight.findings import Findings
from ft.preflight.memory import device_bytes, processes_here
from ft.runtime import STARTED
from ft.values import parse_duration

if TYPE_CHECKING:
    from ft.preflight.probe import Measured, Probe


def room_on_disk(config: Config) -> int:
    """Bytes that a run may write: what is free, and what it replaces of an existing run (several seeds keep
    that to their end)."""
    folder = Path(config.output_dir).absolute()
    # os.path reports what may not be seen as missing.
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    is_anew = config.overwrite_output_dir and config.resume_from_checkpoint is None
    names = ["best", "final", *(["checkpoints"] if is_anew else [])] if config.num_seeds == 1 else []
    replaced = [path for name in names for path in (folder / name).rglob("*") if path.is_file()]
    return shutil.disk_usage(there).free + sum(path.stat().st_size for path in replaced)


def judged(config: Config, probe: Probe, waited: float, room: int, findings: Findings) -> dict[str, Any]:
    """What a probe has found, as JSON: launch, longest_update, checkpoint and forecast; what does not fit is
    a finding. `waited` are the seconds that the audit took before the run, `room` the `room_on_disk` before
    the probe wrote there. Empty if the resumed run has made all its updates."""
    measured, accelerator = probe.measured, probe.accelerator
    if probe.done >= probe.total:
        findings.warn(
            "not_tried",
            f"nothing was tried or forecast: all {probe.total:,} updates are done, and a resumed run "
            "only scores and exports again; for more, raise num_train_epochs or max_train_steps",
        )
        return {}
    start = measured.started - STARTED - waited
    standing = 0
    if config.resume_from_checkpoint is not None:
        standing = len(checkpoints_in(Path(config.output_dir) / "checkpoints"))
    per_epoch = probe.sampler.updates_per_epoch
    found = forecast(config, measured, probe.total, per_epoch, probe.done, start, standing)
    found |= {
        "memory_bytes": measured.most_host_bytes,
        "device_memory_bytes": device_bytes(accelerator.device),
        "free_disk_bytes": room,
    }
    said = "\n".join(measured.said).splitlines()
    place = str(probe.output_dir)  # has no best/ of a resumed run, about which there is a note, too
    notes = [line.removeprefix("note: ") for line in said if line.startswith("note: ") and place not in line]
    warnings = [line.removeprefix("warning: ") for line in said if line.startswith("warning: ")]
    of_data = set(probe.data.notes)  # which the audit has found, too
    warnings += [
        note.removeprefix("WARNING ") for note in notes if note.startswith("WARNING ") and note not in of_data
    ]
    _judge(config, measured, found, warnings, findings)
    return {
        "notes": notes,
        "launch": {
            "processes": accelerator.num_processes,
            "device": accelerator.device.type,
            "mixed_precision": accelerator.mixed_precision,
        },
        "longest_update": measured.longest,
        "checkpoint": {
            "bytes": measured.checkpoint_bytes,
            "save_seconds": measured.save,
            "write_seconds": measured.write,
            "reload_seconds": measured.reload,
            "same": measured.reloaded_same,
        },
        "forecast": found,
    }


def _judge(
    config: Config, measured: Measured, found: dict[str, Any], warnings: list[str], findings: Findings
) -> None:
    """Findings about memory, disk, time and what the probe warned about."""
    if found["peak_memory_bytes"] > found["memory_bytes"]:
        findings.block(
            "memory",
            f"memory: a process needs {giga(found['peak_memory_bytes'])}, and can have "
            f"{giga(found['memory_bytes'])} of this host, which {processes_here()} of them share; lower "
            "per_device_train_batch_size (the result stays the same) or max_length.",
        )
    if found["disk_bytes"] > found["free_disk_bytes"]:
        findings.block(
            "disk",
            f"output_dir: the run writes {giga(found['disk_bytes'])}, and its disk has "
            f"{giga(found['free_disk_bytes'])} free; make room, name another folder, or lower "
            "save_total_limit.",
        )
    if not measured.reloaded_same:
        findings.block("checkpoint", "checkpoint: what was read back is not what was saved.")
    limit = parse_duration("max_time", config.max_time)
    if limit is not None and found["total_seconds"] > limit:
        takes = duration(found["total_seconds"])
        findings.warn("max_time", f"max_time: {config.max_time} is not enough for a run of {takes}")
    for warning in warnings:
        findings.warn("run", warning)


def forecast(
    config: Config, measured: Measured, total: int, per_epoch: int, done: int, start: float,
    standing: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Seconds and bytes of the run from its start (`start` seconds to the first update) to its end, beside
    the `standing` checkpoints of the run that it resumes.

    An upper bound: every evaluation is assumed to export a better model, and early stopping never to happen.
    `done` of `total` updates were made before a resume."""
    update_cost = fit(np.array(measured.update_costs), np.array(measured.update_seconds))
    round_cost = np.zeros(3)
    if measured.round_seconds:
        round_cost = fit(np.array(measured.round_costs), np.array(measured.round_seconds))
    rounds = {split: float(costs @ round_cost) for split, costs in measured.planned_rounds.items()}
    strategy = config.eval_strategy if "validation" in measured.planned_rounds else "no"
    evaluations = times_due(strategy, config.eval_steps or config.logging_steps, total, per_epoch, done)
    rest = 0.0
    if evaluations:
        rest = measured.first_evaluation_rest + (evaluations - 1) * measured.evaluation_rest
    saves = times_due(config.save_strategy, config.save_steps, total, per_epoch, done)
    first = measured.longest.get("seconds", 0.0) - float(measured.longest_cost @ update_cost)
    seconds = {
        "start": start + max(0.0, first),  # one-time costs of the first update, such as compiling
        "updates": float(measured.planned @ update_cost),
        "evaluations": evaluations * rounds.get("validation", 0.0) + rest,
        "saves": saves * measured.save,
        "end": measured.end + rounds.get("test", 0.0) + (measured.write if saves else 0.0),
    }
    if saves:  # a save waits for one that is still being written
        between = (seconds["updates"] + seconds["evaluations"]) / saves
        seconds["saves"] += (saves - 1) * max(0.0, measured.write - between)
    peak = int(max(measured.peak_host))
    if saves > 1 and not max(measured.peak_device):  # the copy being written during the next updates
        peak = max(peak, measured.before_saving + measured.checkpoint_bytes)
    kept = saves
    if config.save_total_limit is not None:
        kept = min(saves, max(1, config.save_total_limit + 2 - standing))
    return {
        "runs": config.num_seeds,  # one per seed; this is for all of them
        "total_seconds": config.num_seeds * sum(seconds.values()),
        "seconds": seconds,
        "updates": measured.updates,
        "evaluations": evaluations,
        "saves": saves,
        "peak_memory_bytes": peak,
        "peak_device_bytes": int(max(measured.peak_device)) or None,
        # best/, final/ and, while one replaces another, a third; the newest checkpoints, that of the best
        # step and the one that is being written.
        "disk_bytes": config.num_seeds * (3 * measured.export_bytes + kept * measured.checkpoint_bytes),
    }


def times_due(strategy: str, every: int, total: int, per_epoch: int, done: int = 0) -> int:
    """How often `Run.due` is true from update `done` + 1 to `total`: every `every` updates or each epoch, and
    at the last."""
    if strategy == "no" or done >= total:
        return 0
    every = per_epoch if strategy == "epoch" else every
    return total // every - done // every + (total % every > 0)


def giga(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """Seconds for people: "41 s", "3 min 5 s" or "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
