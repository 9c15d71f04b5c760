"""How many of the suspected label errors are labels that were flipped deliberately."""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

from benchmarks.common import (
    add_data_options,
    class_file,
    column_flags,
    command_line,
    gemm_peak,
    launch,
    mean_and_deviation,
    read_csv,
    save,
    say,
    table,
    write_csv,
)
from ft.analysis.label_errors import check_cleanlab

FIRST = 100
QUICK = {"epochs": 0.5, "seeds": [42]}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_data_options(parser)
    parser.add_argument(
        "--share", type=float, default=0.05, help="of the labels of each split that are flipped"
    )
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])


def run(options: argparse.Namespace) -> None:
    """Flip labels in the training and test rows, train, and check the suspects among the test rows, which the
    model has not seen."""
    check_cleanlab()  # before hours of training
    measured, gemm = [], [gemm_peak()]
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            measured.append({"seed": seed, **_one(options, seed, Path(folder))})
        say(f"{measured[-1]}")
        gemm.append(gemm_peak())
        save(options, _text(options, measured), {"runs": measured}, gemm)


def _one(options: argparse.Namespace, seed: int, folder: Path) -> dict[str, int]:
    train, test = folder / "train.csv", folder / "test.csv"
    _write_flipped(class_file(options.data, "train"), train, options.share, seed)
    flipped = _write_flipped(class_file(options.data, "test"), test, options.share, seed + 1)
    flags = {
        "model_name_or_path": options.model, "train_file": train, "test_file": test,
        "max_length": options.max_length, "seed": seed, **column_flags(train),
        "learning_rate": options.learning_rate, "num_train_epochs": options.epochs, "warmup_ratio": 0.1,
        "weight_decay": 0.01, "save_strategy": "no", "output_dir": folder / "run",
    }  # fmt: skip
    launch("train.py", *command_line(flags))
    best = folder / "run" / "best"
    launch(
        "eval.py",
        folder / "run" / "config.yaml",
        "--model_name_or_path",
        best,
        "--suspected_label_errors",
        "true",
    )
    text = (folder / "run" / "evaluation-test" / "label_errors.jsonl").read_text(encoding="utf-8")
    suspects = [json.loads(line)["row"] for line in text.splitlines()]
    return {
        "flipped": len(flipped),
        "suspects": len(suspects),
        "found": len(flipped & set(suspects)),
        "first": min(FIRST, len(suspects)),
        "found_first": len(flipped & set(suspects[:FIRST])),
    }


def _write_flipped(source: Path, target: Path, share: float, seed: int) -> set[int]:
    """Copy a csv file with a share of its labels changed to another one; the numbers of those rows."""
    texts, labels = read_csv(source)
    generator, names, count = random.Random(seed), sorted(set(labels)), round(share * len(labels))
    if len(names) < 2 or not 0 < count <= len(labels):
        sys.exit(
            f"error: --share: {count} of the {len(labels)} labels of {source.name}, of {len(names)} classes; "
            "expected one at least, and two classes"
        )
    flipped = set(generator.sample(range(len(labels)), count))
    others = [generator.choice([name for name in names if name != label]) for label in labels]
    changed = [others[row] if row in flipped else label for row, label in enumerate(labels)]
    write_csv(target, texts, changed)
    return flipped


def _text(options: argparse.Namespace, measured: list[dict[str, int]]) -> str:
    header = [
        "seed",
        f"of the first {FIRST} suspects, flipped",
        "suspects",
        "flipped rows",
        "of these suspected",
    ]
    rows = [
        [
            str(one["seed"]), f"{one['found_first']} of {one['first']}", f"{one['suspects']:,}",
            f"{one['flipped']:,}", f"{one['found'] / one['flipped']:.0%}",
        ]
        for one in measured
    ]  # fmt: skip
    share = mean_and_deviation([100 * one["found_first"] / max(one["first"], 1) for one in measured], 1)
    return (
        f"{table(header, rows)}\n\nPercent of the first {FIRST} suspects that were flipped: {share}. "
        f"{options.share:.0%} of the labels of the training and test rows are flipped to another class, "
        "drawn evenly; the suspects are among the test rows. Data has errors of its own, too."
    )
