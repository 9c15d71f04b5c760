"""Accuracy and time per epoch of train.py and of the well-known tutorial, on the same rows."""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import (
    add_data_options,
    at_least,
    class_file,
    column_flags,
    gemm_peak,
    in_turn,
    mean_and_deviation,
    median,
    model_folder,
    peer,
    read_csv,
    save,
    say,
    table,
    train_py,
)

BATCH = 8
UPDATES, WARM_UP = 15, 5  # of the tutorial as written; first updates that do not count
WEIGHT_DECAY = 0.01  # the default of torch's AdamW, which the tutorial uses
ARMS = {
    "ours": "train.py",
    "tutorial": "tutorial, padded to the longest text of a batch",
    "tutorial_as_written": "tutorial as written, padded to the model's limit",
}
QUICK = {"rows": 200, "epochs": 1, "seeds": [42]}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_data_options(parser)
    parser.add_argument("--rows", type=at_least(1), default=1000, help="rows of training, and of validation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=5e-5)


def run(options: argparse.Namespace) -> None:
    """All arms in turn, seed by seed."""
    train, validation = class_file(options.data, "train"), class_file(options.data, "validation", "test")
    rows = min(options.rows, len(read_csv(train)[1]))
    if rows * options.epochs < UPDATES * BATCH:
        sys.exit(f"error: --rows: {rows} in {options.epochs} epochs, expected {UPDATES * BATCH} in all")
    measured: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    gemm = [gemm_peak()]
    for number, seed in enumerate(options.seeds):
        for arm in in_turn(list(ARMS), number):
            measure = {"ours": _ours, "tutorial": _tutorial, "tutorial_as_written": _as_written}[arm]
            measured[arm].append({"seed": seed} | measure(options, train, validation, seed))
            say(f"{arm}: {measured[arm][-1]}")
        gemm.append(gemm_peak())
        save(options, _text(options, measured), measured, gemm)


def _ours(options: argparse.Namespace, train: Path, validation: Path, seed: int) -> dict[str, float]:
    flags = {
        "model_name_or_path": options.model, "train_file": train, "validation_file": validation,
        "max_train_samples": options.rows, "max_eval_samples": options.rows, "global_batch_size": BATCH,
        "learning_rate": options.learning_rate, "lr_scheduler_type": "linear", "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": 0, "save_strategy": "no", "seed": seed, "num_train_epochs": options.epochs,
        # The last update is always evaluated; no other is, as in the tutorial.
        "eval_strategy": "steps", "eval_steps": 10**9, **column_flags(train),
    }  # fmt: skip
    results = train_py(flags, options.extra)
    return {
        "accuracy": results["eval/accuracy"],
        "seconds_per_epoch": results["perf/train_seconds"] / options.epochs,
    }


def _tutorial(options: argparse.Namespace, train: Path, validation: Path, seed: int) -> dict[str, float]:
    result = _peer(options, train, seed, updates=None, padding="do_not_pad", validation=validation)
    return {"accuracy": result["accuracy"], "seconds_per_epoch": result["seconds"] / options.epochs}


def _as_written(options: argparse.Namespace, train: Path, validation: Path, seed: int) -> dict[str, float]:
    result = _peer(options, train, seed, updates=UPDATES, padding="max_length")
    an_update = statistics.mean(step["seconds"] for step in result["steps"][WARM_UP:])
    return {"seconds_per_epoch": an_update * result["updates_per_epoch"]}


def _peer(options: argparse.Namespace, train: Path, seed: int, **others: Any) -> dict[str, Any]:
    return peer(
        "tutorial", model=model_folder(options.model), train=train, rows=options.rows, batch=BATCH,
        epochs=options.epochs, seed=seed, learning_rate=options.learning_rate, **others,
    )  # fmt: skip


def _text(options: argparse.Namespace, measured: dict[str, list[dict[str, Any]]]) -> str:
    header = ["", "seconds an epoch, mean", "validation accuracy, mean"]
    header += [f"seed {one['seed']}" for one in measured["ours"]]
    rows = []
    for arm, runs in measured.items():
        values = [one["accuracy"] for one in runs if "accuracy" in one]
        cells = [ARMS[arm], mean_and_deviation([one["seconds_per_epoch"] for one in runs], 1)]
        cells += [mean_and_deviation(values, 4), *[f"{value:.4f}" for value in values]] if values else []
        rows.append(cells + [""] * (len(header) - len(cells)))
    seconds = {arm: [one["seconds_per_epoch"] for one in runs] for arm, runs in measured.items()}
    ratios = {
        arm: median([theirs / ours for ours, theirs in zip(seconds["ours"], seconds[arm], strict=True)])
        for arm in ARMS
    }
    return (
        f"{table(header, rows)}\n\nThe tutorial's time by ours, median over the seeds: "
        f"{ratios['tutorial_as_written']:.1f} as written, {ratios['tutorial']:.2f} with padding to the "
        "longest text of a batch, which computes the same and is what its accuracy was measured with. "
        f"Times are of the training loop without the evaluation; that of the tutorial as written is "
        f"extrapolated from {UPDATES - WARM_UP} updates after {WARM_UP} that do not count. The same "
        "rows, rate, schedule and epochs in all arms. ± is the standard deviation over the seeds."
    )
