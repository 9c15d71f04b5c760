"""Accuracy and time of an epoch of train.py and of the well-known tutorial, on the same rows."""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common import (
    WARM_UP,
    add_data_options,
    data_file,
    gemm_peak,
    logged_steps,
    mean_and_deviation,
    median,
    model_folder,
    peer,
    rates,
    save,
    say,
    table,
    text_lengths,
    train_py,
)

BATCH = 8
TIMED_UPDATES = 15
WEIGHT_DECAY = 0.01  # the default of torch's AdamW, which the tutorial uses
ARMS = {"ours": "train.py", "tutorial": "tutorial"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_data_options(parser)
    parser.add_argument("--rows", type=int, default=1000, help="rows of training, and of validation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument(
        "--time_only",
        action="store_true",
        help=f"only {TIMED_UPDATES} updates a run, for the time of an epoch",
    )


def run(options: argparse.Namespace) -> None:
    """Both arms in turn, seed after seed."""
    if options.time_only and not options.name:
        options.name = f"tutorial_time_{options.data.resolve().name}"
    train, validation = data_file(options.data, "train"), data_file(options.data, "validation", "test")
    epoch_tokens = _epoch_tokens(options, train)
    measured: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
    gemm = [gemm_peak()]
    for seed in options.seeds:
        for arm in options.arms:
            if arm == "ours":
                result = _ours(options, train, validation, seed, epoch_tokens)
            else:
                result = _tutorial(options, train, validation, seed)
            measured[arm].append({"seed": seed} | result)
            say(f"{arm}: {measured[arm][-1]}")
        gemm.append(gemm_peak())
        save(options, _text(options, measured), measured, gemm)


def _epoch_tokens(options: argparse.Namespace, train: Path) -> int:
    """Tokens of the rows that both arms draw."""
    import numpy as np

    from ft.data.split import sample

    lengths = np.array(text_lengths(options.model, train))
    return int(lengths[sample(len(lengths), options.rows)].sum())


def _ours(
    options: argparse.Namespace, train: Path, validation: Path, seed: int, epoch_tokens: int
) -> dict[str, float]:
    flags = {
        "model_name_or_path": options.model, "train_file": train, "validation_file": validation,
        "max_train_samples": options.rows, "max_eval_samples": options.rows, "global_batch_size": BATCH,
        "learning_rate": options.learning_rate, "lr_scheduler_type": "linear", "weight_decay": WEIGHT_DECAY,
        "save_strategy": "no", "seed": seed,
    }  # fmt: skip
    if options.time_only:
        flags |= {"max_train_steps": TIMED_UPDATES, "logging_steps": 1, "eval_strategy": "no"}
        steps = logged_steps(train_py(flags, options.extra)["rows"], BATCH)
        # By tokens, because the texts of its updates differ in length.
        return {"seconds_per_epoch": epoch_tokens / rates(steps)["tokens_per_second"]}
    # The last update is always evaluated; no other is, as in the tutorial.
    flags |= {"num_train_epochs": options.epochs, "eval_strategy": "steps", "eval_steps": 10**9}
    results = train_py(flags, options.extra)
    return {
        "accuracy": results["eval/accuracy"],
        "seconds_per_epoch": results["perf/train_seconds"] / options.epochs,
    }


def _tutorial(options: argparse.Namespace, train: Path, validation: Path, seed: int) -> dict[str, float]:
    result = peer(
        "tutorial", model=model_folder(options.model), train=train, rows=options.rows, batch=BATCH,
        epochs=options.epochs, updates=TIMED_UPDATES if options.time_only else None, seed=seed,
        learning_rate=options.learning_rate, validation=None if options.time_only else validation,
    )  # fmt: skip
    if options.time_only:
        steps = rates(result["steps"])
        an_update = steps["seconds"] / (len(result["steps"]) - WARM_UP)
        return {"seconds_per_epoch": an_update * result["updates_per_epoch"]}
    return {"accuracy": result["accuracy"], "seconds_per_epoch": result["seconds"] / options.epochs}


def _text(options: argparse.Namespace, measured: dict[str, list[dict[str, Any]]]) -> str:
    header = ["", "seconds an epoch, mean"]
    if not options.time_only:
        header += ["validation accuracy, mean", *[f"seed {seed}" for seed in options.seeds]]
    rows = []
    for arm, runs in measured.items():
        cells = [ARMS[arm], mean_and_deviation([one["seconds_per_epoch"] for one in runs], 1)]
        if not options.time_only:
            values = [one["accuracy"] for one in runs]
            cells += [mean_and_deviation(values, 4), *[f"{value:.4f}" for value in values]]
            cells += [""] * (len(header) - len(cells))
        rows.append(cells)
    text = table(header, rows)
    if len(measured) == 2 and all(measured.values()):
        ratios = [
            theirs["seconds_per_epoch"] / ours["seconds_per_epoch"]
            for ours, theirs in zip(measured["ours"], measured["tutorial"], strict=True)
        ]
        text += f"\n\nThe tutorial's time by ours, median over the seeds: {median(ratios):.2f}."
    how = (
        f"The time is extrapolated from {TIMED_UPDATES - WARM_UP} updates after {WARM_UP} that do not count."
        if options.time_only
        else "The time is that of the training loop, without the evaluation at the end."
    )
    return f"{text}\n\nThe same rows for both. {how} ± is the standard deviation over the seeds."
