"""`train.py --verify`: one config under a matrix of launches, a few updates each: do they give the same
result?"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft.cli import dump
from ft.config import Config
from ft.data.encoder import cores
from ft.errors import UserError
from ft.launch import asked_precision, asks_for, kill_launch
from ft.runtime import NO_FP16, resolve_batch_size
from ft.signals import handle_stop, leave

ROOT = Path(__file__).parent.parent
UPDATES, SAVE_EVERY, KILL_AFTER = 8, 2, 3
ROWS = 500  # to evaluate on, at most
QUANTITIES = {
    "train/loss": "loss",
    "train/grad_norm": "gradient norm",
    "train/learning_rate": "learning rate",
    "eval/loss": "validation loss",
}
TOLERANCE, WEIGHTS_TOLERANCE = 1e-5, 1e-4  # relative, in fp32
HALF_TOLERANCE = 2e-2  # of bf16 and fp16, whose numbers have 8 and 11 bits


@dataclass
class Difference:
    """How much two runs differ: the largest relative difference of each quantity, and where the first one
    beyond its tolerance is."""

    worst: dict[str, float]
    rows_scored: tuple[int, int]
    first: str = ""


def compare(
    one: Path, other: Path, tolerance: float = TOLERANCE, weights: float = WEIGHTS_TOLERANCE
) -> Difference:
    """Compare the output folders of two runs, update by update."""
    rows, others = _rows(one), _rows(other)
    found = Difference(dict.fromkeys(QUANTITIES.values(), 0.0), (0, 0))
    if [(row["step"], sorted(row)) for row in rows] != [(row["step"], sorted(row)) for row in others]:
        found.first = "the updates and evaluations themselves"
    for row, its in zip(rows, others, strict=False):
        for key, name in QUANTITIES.items():
            if key in row and key in its:
                apart = _relative(float(row[key]), float(its[key]))
                found.worst[name] = max(found.worst[name], apart)
                if not apart <= tolerance and not found.first:
                    found.first = f"update {row['step']}: {name} ({row[key]} and {its[key]})"
        if "eval/rows" in row and "eval/rows" in its:
            found.rows_scored = (row["eval/rows"], its["eval/rows"])
            if row["eval/rows"] != its["eval/rows"] and not found.first:
                found.first = f"update {row['step']}: rows scored"
    found.worst["weights"] = weights_difference(one / "final", other / "final")
    if not found.worst["weights"] <= weights and not found.first:
        found.first = f"update {rows[-1]['step']}: weights"
    return found


def weights_difference(one: Path, other: Path, but: str | None = None) -> float:
    """The norm of the difference of two exported models' weights, relative to the norm of the weights; `but`
    leaves out those whose names end with it."""
    import torch
    from safetensors.torch import load_file

    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    if set(a) != set(b):
        return math.inf
    names = [name for name in sorted(a) if but is None or not name.endswith(but)]
    flat, flat_other = (torch.cat([w[k].double().flatten() for k in names]) for w in (a, b))
    return float((flat - flat_other).norm() / flat.norm())


def verify(config: Config) -> int:
    """Print the table; returns 0 if all launches give the same result, else 1, and prints the first update
    and quantity that differ. Works in temporary folders."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("verify: launches its own processes; run it directly: python train.py ... --verify")
    resolve_batch_size(config, 1)
    handle_stop(leave)  # by an exception, which cleans up launches and folders on its way
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        return _Matrix(config, Path(folder)).run()


class _Matrix:
    def __init__(self, config: Config, folder: Path) -> None:
        import torch

        self.folder = folder
        gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
        forced = asks_for("CPU")
        self.on_cpu = forced or gpus < 2
        self.why = " (one GPU is here, and two processes need two)" if gpus == 1 and not forced else ""
        self.precision = asked_precision()
        if self.on_cpu and self.precision == "fp16":
            raise UserError(f"verify: runs on the CPU here{self.why}: {NO_FP16}")
        half = self.precision in ("bf16", "fp16")
        self.tolerances = (HALF_TOLERANCE, HALF_TOLERANCE) if half else (TOLERANCE, WEIGHTS_TOLERANCE)
        assert config.global_batch_size is not None
        bound = min(config.per_device_train_batch_size or math.inf, config.global_batch_size)
        self.quarter = max(1, int(bound) // 4)
        evaluates = config.eval_strategy != "no"
        short = config.private(
            max_train_steps=UPDATES, max_time=None, logging_steps=1, save_strategy="steps",
            save_steps=SAVE_EVERY, save_total_limit=1, resume_from_checkpoint=None,
            eval_strategy="steps" if evaluates else "no", eval_steps=UPDATES // 2 if evaluates else None,
            early_stopping_patience=None, early_stopping_threshold=0.0, verify=False,
            overwrite_output_dir=False,
            warmup_steps=None if config.warmup_steps is None else min(config.warmup_steps, UPDATES),
            max_eval_samples=min(config.max_eval_samples or ROWS, ROWS),
            max_predict_samples=min(config.max_predict_samples or ROWS, ROWS),
        )  # fmt: skip
        self.yaml = folder / "config.yaml"
        self.yaml.write_text(dump(short), encoding="utf-8")

    def run(self) -> int:
        where = f"the CPU{self.why}" if self.on_cpu else "GPUs"
        print(f"verify: {UPDATES} updates a launch on {where}, mixed precision {self.precision}", flush=True)
        whole = self.folder / "whole"
        self._launch(whole)
        killed = self.folder / "killed"
        self._launch_and_kill(killed)
        shutil.copytree(killed, self.folder / "killed2")
        resume = ["--resume_from_checkpoint", "latest"]
        micro = ["--per_device_train_batch_size", str(self.quarter)]
        launches: list[tuple[str, Path, int, list[str]]] = [
            (f"1 process, micro-batches of {self.quarter}", self.folder / "accumulation", 1, micro),
            ("2 processes", self.folder / "two", 2, []),
            (f"2 processes, micro-batches of {self.quarter}", self.folder / "two4", 2, micro),
            ("1 process, killed and resumed", killed, 1, resume),
            ("1 process, killed, resumed on 2", self.folder / "killed2", 2, resume),
        ]
        names = [*QUANTITIES.values(), "weights"]
        print(f"{'against 1 process':40}" + "".join(f"{name:>17}" for name in [*names, "rows scored"]))
        failed = []
        for name, place, processes, words in launches:
            self._launch(place, processes, words)
            found = compare(whole, place, *self.tolerances)
            shutil.rmtree(place)
            cells = [f"{found.worst[key]:.1e}" for key in names] + [f"{found.rows_scored[1]:,}"]
            print(f"{name:40}" + "".join(f"{cell:>17}" for cell in cells), flush=True)
            if found.first:
                failed.append(f"{name}: differs first at {found.first}")
        for line in failed:
            print(f"NOT THE SAME: {line}")
        if not failed:
            print(f"the same: within {self.tolerances[0]:g} (weights {self.tolerances[1]:g})")
        return 1 if failed else 0

    def _launch(self, place: Path, processes: int = 1, words: list[str] | None = None) -> None:
        with self._started(place, processes, words or []) as (process, said):
            process.wait()
            if process.returncode:
                raise UserError(f"verify: a launch failed; it said:\n{said.read_text(errors='replace')}")

    def _launch_and_kill(self, place: Path) -> None:
        """Kill a run between two checkpoints. One that ends before that is tried again."""
        for _ in range(5):
            with self._started(place, 1, []) as (process, said):
                log = place / "metrics.jsonl"
                while process.poll() is None:
                    rows = log.read_bytes().count(b"\n") if log.exists() else 0
                    if rows > KILL_AFTER and (place / "checkpoints" / "latest").exists():
                        kill_launch(process)
                        break
                    time.sleep(0.002)
                if process.wait() not in (0, -signal.SIGKILL):
                    raise UserError(f"verify: a launch failed; it said:\n{said.read_text(errors='replace')}")
            if not (place / "results.json").exists():
                return
            shutil.rmtree(place)
        raise UserError("verify: the run ended each time before it could be killed; use more data.")

    @contextlib.contextmanager
    def _started(
        self, place: Path, processes: int, words: list[str]
    ) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
        """A launch that writes to the folder `place`, and the file with its output: a pipe that nobody reads
        would block it."""
        one, several = ("cpu", "multi_cpu") if self.on_cpu else ("single_gpu", "multi_gpu")
        name = one if processes == 1 else several
        command = [
            sys.executable, "-m", "accelerate.commands.launch",
            "--config_file", str(ROOT / "accelerate_configs" / f"{name}.yaml"),
            "--num_processes", str(processes), "--mixed_precision", self.precision,
            str(ROOT / "train.py"), str(self.yaml), "--output_dir", str(place), *words,
        ]  # fmt: skip
        environment: dict[str, Any] = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES}
        threads = str(max(1, cores() // 2))  # the same for every process: their number changes bits
        path = place.with_name("said.txt")
        with open(path, "wb") as said, subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            env={**environment, "OMP_NUM_THREADS": threads},
        ) as process:  # fmt: skip
            try:
                yield process, path
            finally:  # an interrupted launch would keep writing to a folder that is being removed
                kill_launch(process)


# Set by this process's own launcher; the launches started here must not see them.
LAUNCH_VARIABLES = (
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT GROUP_RANK ROLE_RANK "
    "ACCELERATE_USE_CPU ACCELERATE_MIXED_PRECISION"
).split()


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _relative(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    return abs(a - b) / max(abs(a), 1e-12)
