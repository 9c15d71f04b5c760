"""Test accuracy and seconds of training of train.py and of transformers.Trainer."""

import argparse
from typing import Any

from benchmarks.common import (
    add_data_options,
    class_file,
    column_flags,
    gemm_peak,
    mean_and_deviation,
    median_and_spread,
    model_folder,
    peer,
    save,
    say,
    table,
    train_py,
)

GLOBAL_BATCH = 32
# What train.py may have of its own, behind --: it is the seconds to an accuracy that are compared.
RECIPE = ("num_train_epochs", "learning_rate", "warmup_ratio", "weight_decay")
ARMS = {"ours": "train.py", "trainer": "Trainer, grouped by length, fused AdamW"}
QUICK = {"epochs": 0.1, "seeds": [42]}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_data_options(parser)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--warmup_ratio", type=float, default=0.0)
    parser.add_argument("--weight_decay", type=float, default=0.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))


def run(options: argparse.Namespace) -> None:
    """Both arms in turn, seed after seed: all training rows, and the model of the last update."""
    train, test = class_file(options.data, "train"), class_file(options.data, "test")
    shared = {
        name: getattr(options, name) for name in "max_length learning_rate warmup_ratio weight_decay".split()
    }
    measured: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
    gemm = [gemm_peak()]
    for seed in options.seeds:
        for arm in options.arms:
            if arm == "ours":
                flags = {
                    "model_name_or_path": options.model, "train_file": train, "test_file": test,
                    "validation_split_percentage": 0, "global_batch_size": GLOBAL_BATCH,
                    "num_train_epochs": options.epochs, "save_strategy": "no", "seed": seed,
                    **column_flags(train), **shared,
                }  # fmt: skip
                found = train_py(flags, options.extra, free=RECIPE)
                found |= {"accuracy": found["test/accuracy"], "seconds": found["perf/train_seconds"]}
            else:
                found = peer(
                    "trainer_accuracy", model=model_folder(options.model), train=train, test=test,
                    batch=GLOBAL_BATCH, epochs=options.epochs, seed=seed, **shared,
                )  # fmt: skip
            kept = {name: found[name] for name in ("accuracy", "seconds", "peak_bytes")}
            measured[arm].append({"seed": seed} | kept)
            say(f"{arm}: {measured[arm][-1]}")
        gemm.append(gemm_peak())
        save(options, _text(options, measured), measured, gemm)


def _text(options: argparse.Namespace, measured: dict[str, list[dict[str, Any]]]) -> str:
    header = [
        "",
        "test accuracy, mean",
        *[f"seed {seed}" for seed in options.seeds],
        "seconds of training, mean",
        "Trainer's seconds / this one's",
        "peak memory, MB",
    ]
    theirs = [one["seconds"] for one in measured.get("trainer", [])]
    rows = []
    for arm, runs in measured.items():
        values = [one["accuracy"] for one in runs]
        cells = [f"{value:.4f}" for value in values] + [""] * (len(options.seeds) - len(values))
        seconds = mean_and_deviation([one["seconds"] for one in runs], 1)
        ratios = [other / one["seconds"] for other, one in zip(theirs, runs, strict=False)]
        faster = median_and_spread(ratios, 2) if arm != "trainer" else ""
        memory = median_and_spread([one["peak_bytes"] / 1e6 for one in runs], 0)
        rows.append([ARMS[arm], mean_and_deviation(values, 4), *cells, seconds, faster, memory])
    return (
        f"{table(header, rows)}\n\n"
        f"Batch {GLOBAL_BATCH}; ± is the standard deviation over the seeds. Unless an option says otherwise, "
        "the schedule is linear, both train on all training rows, and the model of the last update is scored."
    )
