"""`num_seeds`: the same training with several seeds, one after the other, and their combined results."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ft.cli import dump
from ft.config import Config
from ft.data.sources import find_sources, fingerprints
from ft.errors import EXIT_DONE, Stopped, UserError
from ft.hosts import HostGroup
from ft.output import (
    REPLACED,
    SEEDS,
    check_seeds_dir,
    lock_output_dir,
    put_back,
    release_output_dir,
    seed_folders,
    set_aside,
    write_whole,
)
from ft.resume import of_launch
from ft.runtime import STARTED, build_accelerator, resolve_batch_size
from ft.signals import noted_signal
from ft.tracking import to_json
from ft.values import aligned, parse_duration, short
from ft.wandb_run import group_runs

SUMMARISED = ("eval/", "test/", "best/")


def train_seeds(config: Config, train: Callable[[Config], int]) -> int:
    """Run `train` for each seed in its own folder output_dir/seed-N; returns the exit code.

    When resumed, it skips finished seeds and continues the interrupted one. Everything random in a run comes
    from its own seed, so each is bit-identical to a run of that seed alone."""
    accelerator = build_accelerator(config)
    hosts = HostGroup(accelerator)
    notes = resolve_batch_size(config, accelerator.num_processes)
    hosts.check_same(of_launch(config, accelerator))
    folder = Path(config.output_dir)
    name = config.run_name or folder.resolve().name
    group_runs(name, config.tracker_names)
    runs = [
        replace(
            config, num_seeds=1, seed=seed, output_dir=str(folder / f"seed-{seed}"),
            run_name=f"{name}-seed-{seed}", overwrite_output_dir=False,
            overwrite_cache=config.overwrite_cache and seed == config.seed,  # once for all
        )
        for seed in range(config.seed, config.seed + config.num_seeds)
    ]  # fmt: skip

    record = _Record(config)
    try:
        done = hosts.from_main(lambda: record.open(runs))
        for note in notes:
            hosts.say(f"note: {note}")
        for number, run in enumerate(runs, start=1):
            if run.seed in done:
                hosts.say(f"--- seed {run.seed} ({number} of {len(runs)}): finished before")
                continue
            _stop_if_asked(config, hosts)
            hosts.from_main(record.check_data)
            hosts.say(f"--- seed {run.seed} ({number} of {len(runs)})")
            train(replace(run))  # a copy: what the run resolves for itself is not what was asked for
            hosts.from_main(partial(record.add, run))
            _forget(config)
        if accelerator.is_main_process:
            results = summarise([Path(run.output_dir) for run in runs])
            write_whole(folder / "results.json", to_json(results, indent=1) + "\n")
            hosts.say(table(results))
            hosts.say(f"written to {folder}: results.json; each run in its seed-N/")
    finally:
        if accelerator.is_main_process:
            record.close(runs)
    return EXIT_DONE


class _Record:
    """The folder of all seeds: its lock, its config.yaml, and seeds.json, which has a hash of the config with
    which each seed was finished, null if it is not. For the main process."""

    def __init__(self, config: Config) -> None:
        self.config, self.folder = config, Path(config.output_dir)
        self.seeds: dict[str, str | None] = {}
        self._lock: Any = None

    def open(self, runs: Sequence[Config]) -> list[int]:
        """Lock the folder; returns the finished seeds. Writes nothing that cannot be undone."""
        check_seeds_dir(self.config)
        self._lock = lock_output_dir(self.folder)
        resumed = self.config.resume_from_checkpoint is not None
        if self.config.overwrite_output_dir and not (
            resumed and any(Path(r.output_dir).exists() for r in runs)
        ):
            set_aside(self.config)
        path = self.folder / SEEDS
        if path.exists():
            self.seeds = json.loads(path.read_text(encoding="utf-8"))
        self.seeds = dict.fromkeys(str(run.seed) for run in runs) | self.seeds
        self._write()
        # After a change, every run checks for itself whether it may resume, and has more to do.
        return [
            run.seed
            for run in runs
            if self.seeds[str(run.seed)] == _asked(run) and (Path(run.output_dir) / "results.json").exists()
        ]

    def check_data(self) -> None:
        """Raise `UserError` if the data is not that of a finished seed: a mean over both would say nothing
        about seeds."""
        finished = [seed for seed, asked in self.seeds.items() if asked]
        now = fingerprints(find_sources(self.config)) if finished else {}
        for seed in finished:
            path = self.folder / f"seed-{seed}" / "environment.json"
            known = json.loads(path.read_text(encoding="utf-8")).get("sources", {}) if path.exists() else {}
            changed = [split for split in known if now.get(split) != known[split]]
            if changed:
                raise UserError(
                    f"output_dir: {str(path.parent)!r} was trained on other data: {' and '.join(changed)} "
                    "changed since. Restore it, or train all seeds anew with overwrite_output_dir."
                )

    def add(self, run: Config) -> None:
        """Note a finished seed."""
        write_whole(self.folder / "config.yaml", dump(self.config.repeatable()))
        self.seeds[str(run.seed)] = _asked(run)
        self._write()

    def _write(self) -> None:
        write_whole(self.folder / SEEDS, to_json(self.seeds, indent=1) + "\n")

    def close(self, runs: Sequence[Config]) -> None:
        """Release the folder. What was replaced is restored if the first run did not even begin, or if not
        all of it could be moved."""
        if self._lock is None:
            return
        has_begun = any((Path(run.output_dir) / "config.yaml").exists() for run in runs)
        if not seed_folders(self.folder):
            (self.folder / SEEDS).unlink(missing_ok=True)
        if (self.folder / REPLACED).exists():
            if has_begun and self.seeds:  # which are known once everything was moved
                shutil.rmtree(self.folder / REPLACED)
            else:
                put_back(self.folder)
        release_output_dir(self._lock)


def _asked(run: Config) -> str:
    """A hash of a run's requested options, except for where it resumes, when it has to end, and the bound on
    micro-batches, which may follow from the number of processes."""
    asked = replace(run.repeatable(), max_time=None, hang_timeout=None, per_device_train_batch_size=None)
    return hashlib.sha256(dump(asked).encode()).hexdigest()[:16]


def _stop_if_asked(config: Config, hosts: HostGroup) -> None:
    """Between two runs: raise `Stopped` on all processes if one of them was told to stop, or max_time has
    passed."""
    seconds = parse_duration("max_time", config.max_time)
    late = seconds is not None and time.monotonic() - STARTED > seconds
    if any(hosts.sum(noted_signal() is not None, late)):
        reason = noted_signal() or ("max_time" if late else "a signal")
        hosts.say(
            f"stopped between two seeds ({reason}): rerun the same command with "
            "--resume_from_checkpoint latest"
        )
        raise Stopped


def _forget(config: Config) -> None:
    """Free what a run leaves in this process: its tensors, and programs compiled for its model."""
    gc.collect()
    torch = sys.modules["torch"]
    if config.torch_compile:
        torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def summarise(folders: Sequence[Path]) -> dict[str, Any]:
    """The combined results of some runs: for each number that all of them have under eval/, test/ or best/,
    its mean and its sample standard deviation (NAME_std); and all results of each run under "runs".

    The interval of one run (NAME_low, NAME_high) is about its rows, and has no mean here."""
    runs = {
        folder.name: json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in folders
    }
    results: dict[str, Any] = {"seeds": [int(name.removeprefix("seed-")) for name in runs]}
    first, *_ = runs.values()
    for key in first:
        values = [run.get(key) for run in runs.values()]
        if (
            not key.startswith(SUMMARISED)
            or key.endswith(("/rows", "_low", "_high"))
            or not all(map(_is_number, values))
        ):
            continue
        results[key] = statistics.fmean(values)
        results[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return results | {"runs": {name: _numbers(run) for name, run in runs.items()}}


def table(results: dict[str, Any]) -> str:
    """The headline metrics of each run, their mean and standard deviation, for the terminal; neither, where
    one is not defined in a run."""
    runs = results["runs"]
    first, *_ = runs.values()
    split = "test" if "test/loss" in first else "eval"
    names = [
        name
        for name in (*first.get("headline", []), "loss")
        if all(f"{split}/{name}" in values for values in runs.values())
    ]
    if not names:
        return "no rows were scored, so there is nothing to compare; add a test split or validation rows"
    lines = [["", *(f"{split}/{name}" for name in names)]]
    lines += [[run, *(_shown(values[f"{split}/{name}"]) for name in names)] for run, values in runs.items()]
    for title, ending in (("mean", ""), ("std", "_std")):
        cells = [results.get(f"{split}/{name}{ending}") for name in names]
        lines.append([title, *("" if cell is None else short(cell) for cell in cells)])
    return "\n".join(aligned(lines))


def _shown(value: Any) -> str:
    """A number of a results.json, in which null stands for what is not defined."""
    return short(value) if _is_number(value) else str(value or "not defined")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(run: dict[str, Any]) -> dict[str, Any]:
    """A run's results without their long tables, which its own results.json has."""
    return {
        key: value for key, value in run.items() if not isinstance(value, dict | list) or key == "headline"
    }
