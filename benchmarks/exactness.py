"""The same experiment on other launches: what transformers.Trainer, a plain loop and train.py make of it."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import (
    ROOT,
    add_data_options,
    data_file,
    environment,
    gemm_peak,
    median,
    model_folder,
    save,
    say,
    table,
)

BATCH = 32
ARMS = {"trainer": "transformers.Trainer", "plain": "plain Accelerate loop", "ours": "train.py"}
# processes, rows of a micro-batch, accumulation, stopped half-way and resumed
LAUNCHES = {
    "1 x 32": (1, 32, 1, False),
    "1 x 8, accumulation 4": (1, 8, 4, False),
    "2 processes x 16": (2, 16, 1, False),
    "1 x 32, stopped and resumed": (1, 32, 1, True),
}
NO_DROPOUT = "hidden_dropout_prob=0,attention_probs_dropout_prob=0"
QUICK = {"updates": 8}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_data_options(parser)
    parser.add_argument("--updates", type=int, default=22)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=42)


def run(options: argparse.Namespace) -> None:
    """Every arm on every launch, with dropout and without."""
    train = data_file(options.data, "train")
    measured: dict[str, Any] = {}
    for dropout in (True, False):
        for arm in ARMS:
            with tempfile.TemporaryDirectory() as folder:
                for launch, how in LAUNCHES.items():
                    place = Path(folder) / launch.replace(" ", "_").replace(",", "")
                    steps = (_ours if arm == "ours" else _peer)(options, arm, train, place, dropout, *how)
                    whole = measured.get(f"{arm}, {dropout}, 1 x 32", {}).get("steps", steps)
                    reference = Path(folder) / "1_x_32"
                    found = _compare(whole, steps, reference, place)
                    measured[f"{arm}, {dropout}, {launch}"] = found | {"steps": steps}
                    say(f"{arm}, dropout {dropout}, {launch}: {found}")
    save(options, _text(measured), measured, [gemm_peak()])


def _compare(whole: list, steps: list, reference: Path, place: Path) -> dict[str, Any]:
    from ft.verify import weights_difference

    pairs = list(zip(whole, steps, strict=False))
    return {
        "updates": len(steps),
        "loss_ratio": median([b["loss"] / a["loss"] for a, b in pairs]),
        "norm_ratio": median([b["grad_norm"] / a["grad_norm"] for a, b in pairs]),
        "loss_difference": max(abs(b["loss"] - a["loss"]) / a["loss"] for a, b in pairs),
        "weights_difference": weights_difference(reference / "final", place / "final"),
    }


def _environment() -> dict[str, str]:
    return {**environment(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _command(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def _peer(
    options: argparse.Namespace, arm: str, train: Path, place: Path, dropout: bool, processes: int,
    micro: int, accumulation: int, resumed: bool,
) -> list[dict[str, float]]:  # fmt: skip
    words = {
        "model": model_folder(options.model), "train": str(train), "micro": micro,
        "accumulation": accumulation, "updates": options.updates, "seed": options.seed,
        "learning_rate": options.learning_rate, "dropout": dropout, "out": str(place), "resume": False,
        "stop_at": options.updates // 2 if resumed else None,
    }  # fmt: skip
    steps = _run_peer(arm, processes, words)
    if resumed:
        later = _run_peer(arm, processes, words | {"resume": True, "stop_at": None})
        steps = [step for step in steps if step["step"] <= options.updates // 2]
        steps += [step for step in later if step["step"] > options.updates // 2]
    return steps


def _run_peer(arm: str, processes: int, words: dict[str, Any]) -> list[dict[str, float]]:
    command = [*_command(processes), "-m", "benchmarks.exactness_peers", arm, json.dumps(words)]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(next(line for line in done.stdout.splitlines()[::-1] if line.startswith("[{")))


def _ours(
    options: argparse.Namespace, arm: str, train: Path, place: Path, dropout: bool, processes: int,
    micro: int, accumulation: int, resumed: bool,
) -> list[dict[str, float]]:  # fmt: skip
    words = {
        "model_name_or_path": options.model, "train_file": train, "output_dir": place, "max_length": 128,
        "global_batch_size": BATCH, "per_device_train_batch_size": micro, "max_train_steps": options.updates,
        "learning_rate": options.learning_rate, "seed": options.seed, "logging_steps": 1,
        "eval_strategy": "no", "resume_from_checkpoint": "latest",
    }  # fmt: skip
    if not dropout:
        words["config_overrides"] = NO_DROPOUT
    command = [*_command(processes), "train.py"]
    command += [word for name, value in words.items() for word in (f"--{name}", str(value))]
    if resumed:
        _stop_half_way(command, place, options.updates // 2)
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    return [
        {"step": row["step"], "loss": row["train/loss"], "grad_norm": row["train/grad_norm"]} for row in rows
    ]


def _stop_half_way(command: list[str], place: Path, step: int) -> None:
    """Start train.py, and end it by SIGTERM after the given update."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    path = place / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and len(path.read_text().splitlines()) >= step):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    if process.wait() != 75:
        sys.exit(f"error: train.py ended with {process.returncode}, expected 75")


def _text(measured: dict[str, Any]) -> str:
    header = [
        "",
        "launch",
        "reported loss",
        "reported gradient norm",
        "largest difference of the loss",
        "weights",
    ]
    text = ""
    for dropout in (True, False):
        rows = []
        for arm, name in ARMS.items():
            for launch in list(LAUNCHES)[1:]:
                one = measured[f"{arm}, {dropout}, {launch}"]
                cells = [f"{one['loss_ratio']:.3f} x", f"{one['norm_ratio']:.3f} x"]
                cells += [f"{one['loss_difference']:.1e}", f"{one['weights_difference']:.1e}"]
                rows.append([name, launch, *cells])
        text += f"{'With' if dropout else 'Without'} dropout:\n\n{table(header, rows)}\n\n"
    return (
        f"{text}Each arm against its own run of 1 x 32: loss and gradient norm as it reports them (median of "
        "the ratios), the largest relative difference of a loss, the norm of the difference of the final "
        "weights relative to theirs. train.py was stopped by SIGTERM, the Trainer behind a checkpoint, the "
        "plain loop behind save_state."
    )
