"""The same experiment on different launches, with transformers.Trainer, a plain loop and train.py."""

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
    at_least,
    check_updates,
    class_file,
    column_flags,
    command_line,
    gemm_peak,
    launch,
    median,
    model_folder,
    read_csv,
    save,
    say,
    started,
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
VARIABLES = {"PYTHONPATH": str(ROOT)}
MODES = {"with": True, "without": False}
QUICK = {"updates": 8, "max_length": 32, "dropout": ["with"]}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_data_options(parser)
    parser.add_argument("--updates", type=at_least(2), default=22)
    parser.add_argument("--max_length", type=int, default=128, help="longest text in tokens")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--dropout", nargs="+", choices=MODES, default=list(MODES))


def run(options: argparse.Namespace) -> None:
    """Every arm on every launch, with and without dropout, or as the options say."""
    # One thread in every process, so that sums differ only with the launch; in this one, too, before torch is
    # imported, so that the reported threads and GEMM peak are right.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["ACCELERATE_USE_CPU"] = "true"  # for all arms, and for that peak
    train = class_file(options.data, "train")
    _command(options, train, Path(), BATCH, dropout=False)  # refuses a wrong flag at once
    check_updates(options.updates, len(read_csv(train)[1]), BATCH, options.data)
    measured: dict[str, Any] = {}
    gemm = [gemm_peak()]
    for dropout in (MODES[word] for word in options.dropout):
        for arm in ARMS:
            with tempfile.TemporaryDirectory() as folder:
                for name, how in LAUNCHES.items():
                    place = Path(folder) / name.replace(" ", "_").replace(",", "")
                    steps = (_ours if arm == "ours" else _peer)(options, arm, train, place, dropout, *how)
                    whole = measured.get(f"{arm}, {dropout}, 1 x 32", {}).get("steps", steps)
                    reference = Path(folder) / "1_x_32"
                    found = _compare(whole, steps, reference, place)
                    measured[f"{arm}, {dropout}, {name}"] = found | {"steps": steps}
                    say(f"{arm}, dropout {dropout}, {name}: {found}")
            gemm.append(gemm_peak())
            save(options, _text(measured), measured, gemm)


def _compare(whole: list, steps: list, reference: Path, place: Path) -> dict[str, Any]:
    from ft.verify import weights_difference

    pairs = list(zip(whole, steps, strict=True))
    return {
        "updates": len(steps),
        "loss_ratio": median([b["loss"] / a["loss"] for a, b in pairs]),
        "norm_ratio": median([b["grad_norm"] / a["grad_norm"] for a, b in pairs]),
        "loss_difference": max(abs(b["loss"] - a["loss"]) / a["loss"] for a, b in pairs),
        "weights_difference": weights_difference(reference / "final", place / "final"),
    }


def dropouts(model: str) -> list[str]:
    """The dropout probabilities, of any kind, in a model's config."""
    from transformers import AutoConfig

    values = AutoConfig.from_pretrained(model_folder(model)).to_dict()
    return [name for name, value in values.items() if "drop" in name and type(value) in (int, float)]


def _launcher(processes: int) -> list[str]:
    if processes == 1:
        return []
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def _peer(
    options: argparse.Namespace, arm: str, train: Path, place: Path, dropout: bool, processes: int,
    micro: int, accumulation: int, resumed: bool,
) -> list[dict[str, float]]:  # fmt: skip
    words = {
        "model": model_folder(options.model), "train": str(train), "max_length": options.max_length,
        "micro": micro, "accumulation": accumulation, "updates": options.updates, "seed": options.seed,
        "learning_rate": options.learning_rate, "no_dropout": [] if dropout else dropouts(options.model),
        "out": str(place), "resume": False,
        "stop_at": options.updates // 2 if resumed else None,
    }  # fmt: skip
    steps = _run_peer(arm, processes, words)
    if resumed:
        later = _run_peer(arm, processes, words | {"resume": True, "stop_at": None})
        steps = [step for step in steps if step["step"] <= options.updates // 2]
        steps += [step for step in later if step["step"] > options.updates // 2]
    return steps


def _run_peer(arm: str, processes: int, words: dict[str, Any]) -> list[dict[str, float]]:
    command = [*_launcher(processes), "-m", "benchmarks.exactness_peers", arm, json.dumps(words)]
    printed = launch(*command, variables=VARIABLES)
    return json.loads(next(line for line in printed.splitlines()[::-1] if line.startswith("[{")))


def _ours(
    options: argparse.Namespace, arm: str, train: Path, place: Path, dropout: bool, processes: int,
    micro: int, accumulation: int, resumed: bool,
) -> list[dict[str, float]]:  # fmt: skip
    command = [*_launcher(processes), *_command(options, train, place, micro, dropout)]
    if resumed:
        _stop_half_way(command, place, options.updates // 2)
    launch(*command, variables=VARIABLES)
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    return [
        {"step": row["step"], "loss": row["train/loss"], "grad_norm": row["train/grad_norm"]} for row in rows
    ]


def _command(options: argparse.Namespace, train: Path, place: Path, micro: int, dropout: bool) -> list[Any]:
    flags = {
        "model_name_or_path": options.model, "train_file": train, "output_dir": place,
        "validation_split_percentage": 0,  # the others train on all rows, too
        "max_length": options.max_length, "global_batch_size": BATCH, "per_device_train_batch_size": micro,
        "max_train_steps": options.updates, "learning_rate": options.learning_rate, "seed": options.seed,
        "logging_steps": 1, "eval_strategy": "no", "resume_from_checkpoint": "latest",
        **column_flags(train),
    }  # fmt: skip
    if not dropout:
        flags["config_overrides"] = ",".join(f"{name}=0" for name in dropouts(options.model))
    return ["train.py", *command_line(flags, options.extra)]


def _stop_half_way(command: list[Any], place: Path, step: int) -> None:
    """Start train.py, and stop it by SIGTERM after the given update."""
    path = place / "metrics.jsonl"
    with (
        tempfile.TemporaryFile("w+") as err,
        started(*command, variables=VARIABLES, stdout=subprocess.DEVNULL, stderr=err) as process,
    ):
        while process.poll() is None and not (path.exists() and len(path.read_text().splitlines()) >= step):
            time.sleep(0.01)
        process.terminate()
        if process.wait() in (0, -signal.SIGTERM):  # the latter if Python is exiting, without handlers
            sys.exit(
                f"error: --updates: the run was over before it could be stopped after update {step}; "
                "ask for more updates"
            )
        if process.returncode != 75:
            err.seek(0)
            sys.exit(f"error: train.py ended with {process.returncode}, expected 75:\n{err.read()}")


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
    for dropout in MODES.values():
        rows = []
        for arm in ARMS:
            for name in list(LAUNCHES)[1:]:
                one = measured.get(f"{arm}, {dropout}, {name}")
                if one is None:  # not yet
                    continue
                cells = [f"{one['loss_ratio']:.3f} x", f"{one['norm_ratio']:.3f} x"]
                cells += [f"{one['loss_difference']:.1e}", f"{one['weights_difference']:.1e}"]
                rows.append([ARMS[arm], name, *cells])
        if not rows:
            continue
        text += f"{'With' if dropout else 'Without'} dropout:\n\n{table(header, rows)}\n\n"
    return (
        f"{text}Each arm against its own run of 1 x 32: loss and gradient norm as it reports them (median of "
        "the ratios), the largest relative difference of a loss, the norm of the difference of the final "
        "weights relative to theirs. train.py was stopped by SIGTERM, the Trainer behind a checkpoint, the "
        "plain loop behind save_state. Every process has one thread."
    )
