"""Test results of each fine-tuning recipe against plain fine-tuning: three seeds, mean and spread."""

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import (
    add_model_option,
    column_flags,
    data_file,
    gemm_peak,
    mean_and_deviation,
    save,
    say,
    table,
    train_py,
)

GLOBAL_BATCH = 32
KINDS = ("csv", "jsonl")
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "layers": ("layerwise_lr_decay 0.9", {"layerwise_lr_decay": 0.9}),
    "head": ("head_learning_rate, 10 times", {"head_learning_rate": 10}),  # times the learning rate
    "freeze": ("freeze embeddings", {"freeze": "embeddings"}),
    "ema": ("ema_decay 0.99", {"ema_decay": 0.99}),
    "lora": ("lora_rank 8, at a rate of its own", {"lora_rank": 8}),
    "head_tail": ("long_text head_tail", {"long_text": "head_tail"}),
    "windows": ("long_text windows", {"long_text": "windows"}),
}
FOR_LONG_TEXTS = ("head_tail", "windows")
QUICK = {"max_train_samples": 200, "epochs": 1, "seeds": [42]}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    kinds = (
        "folders with train, and test or validation, as csv or jsonl; or pkg: paths, a fifth of which "
        "becomes the test rows"
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, help=kinds)
    add_model_option(parser)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--lora_learning_rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--warmup_ratio", type=float, default=0.1)
    parser.add_argument("--weight_decay", type=float, default=0.01)
    parser.add_argument("--max_train_samples", type=int, help="fewer training rows of each data set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=[a for a in ARMS if a not in FOR_LONG_TEXTS]
    )


def run(options: argparse.Namespace) -> None:
    """All arms in turn, seed by seed, data set by data set: the model of the last update is scored."""
    measured: dict[str, dict[str, list[dict[str, Any]]]] = {}
    names = [folder.name for folder in options.data]
    for folder in options.data:
        _data_flags(folder)  # reports what is missing before anything runs
    if "lora" in options.arms:
        from ft.lora import check_peft  # imports torch, which other commands may not yet

        check_peft()
    gemm = [gemm_peak()]
    for folder in options.data:
        name = str(folder) if _is_package(folder) or names.count(folder.name) > 1 else folder.resolve().name
        runs = measured.setdefault(name, {arm: [] for arm in options.arms})
        for seed in options.seeds:
            for arm in options.arms:
                found = train_py(_flags(options, folder, arm, seed), options.extra)
                metric = found["headline"][0]
                runs[arm].append(
                    {
                        "seed": seed, "metric": metric, "value": found[f"test/{metric}"],
                        "seconds": found["perf/train_seconds"],
                        "trainable": found["train/trainable_parameters"],
                    }
                )  # fmt: skip
                say(f"{folder.name}, {arm}: {runs[arm][-1]}")
            gemm.append(gemm_peak())
            save(options, _text(measured), measured, gemm)


def _flags(options: argparse.Namespace, folder: Path, arm: str, seed: int) -> dict[str, Any]:
    """The flags of train.py; validation rows select nothing, so none are set aside."""
    recipe = dict(ARMS[arm][1])
    if "head_learning_rate" in recipe:
        recipe["head_learning_rate"] *= options.learning_rate
    names = "max_length warmup_ratio weight_decay max_train_samples".split()
    shared = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return {
        **_data_flags(folder), "model_name_or_path": options.model, "validation_split_percentage": 0,
        "global_batch_size": GLOBAL_BATCH, "num_train_epochs": options.epochs, "save_strategy": "no",
        "seed": seed, "learning_rate": options.lora_learning_rate if arm == "lora" else options.learning_rate,
        **shared, **recipe,
    }  # fmt: skip


def _data_flags(folder: Path) -> dict[str, Any]:
    if _is_package(folder):
        from ft.data.sources import local_path

        local_path(str(folder))  # an error if it does not exist
        return {
            "dataset_name": folder, "test_split_percentage": 20, "on_bad_rows": "drop",
            "on_duplicates": "drop",
        }  # fmt: skip
    train = data_file(folder, "train", kinds=KINDS)
    return {
        **(column_flags(train) if train.suffix == ".csv" else {}), "train_file": train,
        "test_file": data_file(folder, "test", "validation", kinds=KINDS),
    }  # fmt: skip


def _is_package(folder: Path) -> bool:
    return str(folder).startswith("pkg:")


def _text(measured: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    parts = []
    for name, arms in measured.items():
        metric = next((one["metric"] for runs in arms.values() for one in runs), "")
        header = [name, f"test {metric}", "lowest to highest", "minus plain", "seconds", "trained parameters"]
        rows = []
        for arm, runs in arms.items():
            if not runs:
                continue
            values = [one["value"] for one in runs]
            # With the same seeds, so that effects of a seed on both cancel.
            base = {one["seed"]: one["value"] for one in arms.get("plain", [])}
            apart = [one["value"] - base[one["seed"]] for one in runs if one["seed"] in base]
            rows.append(
                [
                    ARMS[arm][0],
                    mean_and_deviation(values, 4),
                    f"{min(values):.4f} to {max(values):.4f}",
                    f"{statistics.mean(apart):+.4f}" if apart and arm != "plain" else "",
                    f"{statistics.mean(one['seconds'] for one in runs):,.0f}",
                    f"{runs[0]['trainable']:,}",
                ]
            )
        parts.append(table(header, rows))
    about = (
        f"Batch {GLOBAL_BATCH}, a linear schedule if no option names another, the model of the last update; "
        "± is the standard deviation over the seeds, and minus plain the mean difference to the plain run of "
        "the same seed."
    )
    return "\n\n".join([*parts, about])
