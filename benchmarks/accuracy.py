"""Test accuracy and training seconds of train.py and of transformers.Trainer."""

import argparse
import statistics
from itertools import islice, pairwise
from typing import Any

from benchmarks.common import (
    ALL_ROWS,
    add_data_options,
    class_file,
    column_flags,
    gemm_peak,
    in_turn,
    mean_and_deviation,
    median,
    median_and_spread,
    model_folder,
    peak_shares,
    peer,
    planned_lengths,
    save,
    say,
    table,
    text_lengths,
    train_py,
)

GLOBAL_BATCH = 32
# What train.py alone may be given, after --: seconds to reach an accuracy are compared.
RECIPE = ("num_train_epochs", "learning_rate", "warmup_ratio", "weight_decay")
ARMS = {"ours": "train.py", "trainer": "Trainer, grouped by length, fused AdamW"}
KEPT = ("accuracy", "seconds", "tokens", "squares", "positions", "peak_bytes")
QUICK = {"epochs": 0.5, "seeds": [42]}


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
    """Both arms in turn, seed by seed: all training rows, and the model of the last update."""
    train, test = class_file(options.data, "train"), class_file(options.data, "test", "validation")
    shared = {
        name: getattr(options, name) for name in "max_length learning_rate warmup_ratio weight_decay".split()
    }
    measured: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
    gemm = [gemm_peak()]
    lengths = text_lengths(options.model, train, options.max_length)
    for number, seed in enumerate(options.seeds):
        for arm in in_turn(options.arms, number):
            if arm == "ours":
                flags = {
                    "model_name_or_path": options.model, "train_file": train, "test_file": test,
                    "validation_split_percentage": 0, "global_batch_size": GLOBAL_BATCH,
                    "num_train_epochs": options.epochs, "save_strategy": "no", "seed": seed,
                    **column_flags(train), **shared, **ALL_ROWS,
                }  # fmt: skip
                found = train_py(flags, options.extra, free=RECIPE)
                found |= {"accuracy": found["test/accuracy"], "seconds": found["perf/train_seconds"]}
                found |= _counts(found["rows"], lengths, seed)
            else:
                found = peer(
                    "trainer_accuracy", model=model_folder(options.model), train=train, test=test,
                    batch=GLOBAL_BATCH, epochs=options.epochs, seed=seed, **shared,
                )  # fmt: skip
            kept = {name: found[name] for name in KEPT}
            measured[arm].append({"seed": seed} | kept)
            say(f"{arm}: {measured[arm][-1]}")
        gemm.append(gemm_peak())
        save(options, _text(options, test.stem, measured, gemm), measured, gemm)


def _counts(
    logged: list[dict[str, Any]], lengths: list[int], seed: int, batch: int = GLOBAL_BATCH
) -> dict[str, int]:
    """Real tokens, the sum of the squared lengths, and positions of a run, from its logs and its plan."""
    logs = [log for log in logged if "data/tokens" in log]
    of_log = [after - before for before, after in pairwise([0, *(log["data/tokens"] for log in logs)])]
    positions = sum(
        tokens / (1 - log["perf/padding_share"]) for tokens, log in zip(of_log, logs, strict=True)
    )
    updates = list(islice(planned_lengths(lengths, batch, seed), logs[-1]["step"]))
    if sum(of_log) != (planned := sum(int(update.sum()) for update in updates)):
        raise SystemExit(f"error: {sum(of_log)} tokens logged, {planned} planned")
    squares = sum(int((update**2).sum()) for update in updates)
    return {"tokens": planned, "squares": squares, "positions": round(positions)}


def _text(
    options: argparse.Namespace, split: str, measured: dict[str, list[dict[str, Any]]], gemm: list[float]
) -> str:
    header = [
        "",
        f"{split} accuracy, mean",
        *[f"seed {seed}" for seed in options.seeds],
        "seconds of training, mean",
        "Trainer's seconds / this one's",
        "real tokens/s, median",
        "padding",
        "% of the GEMM peak",
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
        speed = median_and_spread([one["tokens"] / one["seconds"] for one in runs], 0)
        padding = f"{median([1 - one['tokens'] / one['positions'] for one in runs]):.1%}"
        percent = peak_shares(options.model, runs, gemm)
        cells += [seconds, faster, speed, padding, median_and_spread(percent, 1), memory]
        rows.append([ARMS[arm], mean_and_deviation(values, 4), *cells])
    means = {arm: statistics.fmean(one["seconds"] for one in runs) for arm, runs in measured.items() if runs}
    share = ""
    if len(means) == 2:
        share = f"The mean seconds of train.py are {means['ours'] / means['trainer']:.3f} of the Trainer's. "
    return (
        f"{table(header, rows)}\n\n{share}"
        f"Batch {GLOBAL_BATCH}; ± is the standard deviation over the seeds. Unless an option says otherwise, "
        "the schedule is linear, both train on all training rows, and the model of the last update is "
        "scored. The arms take turns in being first. Speeds are of all updates; for the share of the GEMM "
        "peak, see `model_flops` in common.py."
    )
