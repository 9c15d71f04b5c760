"""What people look at: the summary in the terminal, training.png, the description of the environment."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ft.checkpoint import is_defined
from ft.config import Config
from ft.data.plan import shares
from ft.errors import writing
from ft.launch import asks_for_gpus, relaunch_command
from ft.sharded import class_name, is_sharded
from ft.tasks.base import Task
from ft.values import precision_name, short
from ft.words import count_parameters, used_words


def progress_bar(show: bool, **options: Any) -> Any:
    """A tqdm bar on standard error; silent on other processes and if the output is not a terminal."""
    from tqdm import tqdm

    return tqdm(disable=not (show and sys.stderr.isatty()), dynamic_ncols=True, **options)


def padding_share(sampler: Any) -> float:
    """Share of the tokens that are padding, over the first 200 updates of the plan."""
    rows, planned = sampler.dataset.rows, sampler.plan(0)
    real = padded = 0
    for update in range(min(200, len(planned))):
        taken = planned.rows(update)
        cut = shares(taken, rows.lengths[taken], sampler.num_processes, sampler.micro_batch_size)
        for parts in cut:
            for part in (part for part in parts if len(part)):
                real += int(rows.lengths[part].sum())
                padded += math.prod(rows.padded_shape(part, sampler.dataset.multiple))
    return 1 - real / max(padded, 1)


def truncation_notes(splits: dict[str, Any]) -> list[str]:
    """How many texts of each split of encoded rows are truncated, or split into windows; nothing for a split
    without any."""
    notes = []
    for name, rows in splits.items():
        many, count = f"of {len(rows):,} texts", int(rows.cut.sum())
        if rows.pieces is None and count:
            notes.append(f"{name}: {count:,} {many} are cut at {rows.lengths.max()} tokens")
        elif rows.pieces is not None and (apart := int((rows.pieces > 1).sum())):
            most = int(rows.pieces.max())
            windows = "2 windows" if most == 2 else f"2 to {most} windows"
            longer = f"; {count:,} of them are longer than max_windows, and cut there" if count else ""
            notes.append(f"{name}: {apart:,} {many} are scored in {windows}{longer}")
    return notes


def device_name(device: Any) -> str:
    """The vendor's name of a device; cpu for the CPU."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def evaluation_notes(splits: dict[str, Any], device: Any) -> list[str]:
    """Notes on the splits of an evaluation and on its device."""
    notes = truncation_notes(splits)
    if device.type == "cpu" and asks_for_gpus():
        import torch

        threads = torch.get_num_threads()
        notes.append(
            "WARNING device: no GPU was found, so this launch, which is not for a CPU, runs on the CPU, with "
            f"{threads} thread{'s' * (threads > 1)} a process; accelerate_configs/cpu.yaml (all cores) and "
            "multi_cpu.yaml are for CPUs"
        )
    return notes


def rows_notes(config: Config, data: Any) -> list[str]:
    """Notes at the start of a run on rows that are not used as the options suggest."""
    notes = []
    if config.eval_strategy == "no" and "validation" in data.splits:
        remedy = "; validation_split_percentage: 0 trains on them" * data.was_set_aside("validation")
        notes.append(f"the validation rows are not scored (eval_strategy: no){remedy}")
    rows = data.rows_of_update(config.global_batch_size)
    if rows != config.global_batch_size:
        notes.append(
            f"global_batch_size is {config.global_batch_size:,}, but there are {rows:,} training rows: each "
            "update has all of them"
        )
    return notes


def start_summary(
    data: Any, task: Task, model: Any, sampler: Any, config: Config, total_updates: int, notes: list[str],
    accelerator: Any,
) -> str:  # fmt: skip
    """What will be trained on what, in a few lines, after the `notes`."""
    held_out = {name: rows for name, rows in data.splits.items() if name != "train"}
    said = [*data.notes, *notes, *evaluation_notes(held_out, accelerator.device)]
    lines = [f"note: {note}" for note in said]
    rows = ", ".join(f"{name} {len(split):,}" for name, split in data.splits.items())
    lines.append(f"data: {rows} rows; {task.describe()}")
    train = data.splits["train"]
    lengths, cut = train.full_lengths, int(train.cut.sum())
    seen = f"cut at {train.lengths.max()}" if config.long_text == "truncate" else f"cut ({config.long_text})"
    if train.pieces is not None:
        seen = (
            f"longer than {config.max_windows} windows, and cut there; {(train.pieces > 1).mean():.1%} have "
            f"several windows, {train.pieces.sum():,} in all"
        )
    lines.append(
        f"tokens: {lengths.mean():.1f} a row, longest {lengths.max():,}; {cut:,} of the training rows "
        f"({cut / len(train):.1%}) {seen}; padding {padding_share(sampler):.1%}"
    )
    in_update = data.rows_of_update(config.global_batch_size)
    update = described_update(in_update, sampler.num_processes, sampler.micro_batch_size)
    lines.append(f"updates: {total_updates:,} ({sampler.updates_per_epoch:,} an epoch); {update}")
    if config.eval_strategy != "no":
        end = "highest" if config.higher_is_better else "lowest"
        lines.append(f"best: the model with the {end} {config.best_metric} on the validation rows")
    count, trained = count_parameters(model)
    some = "" if trained == count else f"; trainable parameters: {trained:,} of {count:,}"
    for words in used_words(model).values():
        needed = f"the {len(words.tokens):,} that the data needs"
        some += f"; of {words.num_embeddings:,} word embeddings, {needed} are trained"
    split = ", in shards on the processes (FSDP2)" if is_sharded(model) else ""
    lines.append(f"model: {class_name(model)}, {count / 1e6:.1f} million parameters{some}{split}")
    precision = precision_name(accelerator.mixed_precision)
    mixed = "" if precision == "fp32" else " mixed precision"
    lines.append(f"device: {device_name(accelerator.device)}, {precision}{mixed}")
    return "\n".join(lines)


def described_update(rows: int, processes: int, most: int) -> str:
    """The rows of an update as processes x rows x accumulation steps, in micro-batches of at most `most`
    rows; only the rows if they do not divide evenly."""
    share = -(-rows // processes)
    micro = min(share, most)
    steps = -(-share // micro)
    return (
        f"global batch {rows} {'=' if processes * micro * steps == rows else '<='} {processes} "
        f"process{'es' if processes > 1 else ''} x {micro} row{'s' if micro > 1 else ''} x {steps} "
        f"accumulation step{'s' if steps > 1 else ''}"
    )


def end_summary(results: dict[str, Any], config: Config, task: Task, output_dir: Path) -> str:
    """The outcome of a run, in a few lines."""
    metric = config.best_metric
    lines = []
    if results.get(f"best/{metric}") is not None:
        lines.append(
            f"best: validation {metric} {short(results[f'best/{metric}'])} at update {results['best/step']}"
        )
    if "test/loss" in results:
        lines.append(f"test: {result_line(results, 'test', task)}")
    count = results["train/total_steps"]
    lines.append(
        f"trained {count:,} update{'s' * (count != 1)} in {results['perf/train_seconds']:.1f} s "
        f"({results['perf/examples_per_second']:.1f} examples/s, "
        f"{results['perf/tokens_per_second']:,.0f} tokens/s)"
    )
    names = [
        name
        for name in ("results.json", "report.html", "metrics.jsonl", "training.png")
        if (output_dir / name).exists()
    ]
    lines.append(f"written to {output_dir}: best/ and final/ (models), {', '.join(names)}")
    return "\n".join(lines)


def validation_line(metrics: dict[str, Any], config: Config) -> str:
    """The result of an intermediate evaluation: the metric that selects the best model, and the loss."""
    names = dict.fromkeys((config.best_metric, "loss"))
    found = {name: short(metrics[name]) if is_defined(metrics[name]) else "undefined" for name in names}
    return "validation " + ", ".join(f"{name} {value}" for name, value in found.items())


def result_line(results: dict[str, Any], prefix: str, task: Task) -> str:
    """The headline metrics of a scored split with their intervals, and its loss."""
    parts = []
    for name in (*task.headline, "loss"):
        key = f"{prefix}/{name}"
        if results.get(key) is None:
            continue
        low, high = results.get(f"{key}_low"), results.get(f"{key}_high")
        interval = "" if low is None or high is None else f" ({short(low)} to {short(high)})"
        parts.append(f"{name} {short(results[key])}{interval}")
    return ", ".join(parts)


def environment(config: Any, data: Any, accelerator: Any) -> dict[str, Any]:
    """What the run ran on, and the command to repeat it. No environment variable is written: some are
    secret."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "scikit-learn"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            pass
    import torch

    device = accelerator.device
    name = device_name(device) if device.type != "cpu" else None
    return {
        "versions": versions,
        "git_commit": _git_commit(),
        "world_size": accelerator.num_processes,
        "device": device.type,
        "mixed_precision": accelerator.mixed_precision,
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "accelerator": name},
        "threads": torch.get_num_threads(),
        "data_fingerprint": data.fingerprint,
        "data": data.facts,
        "sources": data.sources,
        "draw": data.draw(config),
        "columns": {"texts": data.columns.texts, "label": data.columns.label},
        "command": relaunch_command(),
    }


def _git_commit() -> str | None:
    """The commit of these scripts, with "+changes" where the working tree differs; None outside a clone."""

    def git(*command: str) -> str:
        here = Path(__file__).parent
        run = subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        # A repository without this file is another one, in whose folder these scripts are installed.
        git("ls-files", "--error-unmatch", __file__)
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes else "")


def training_curves(output_dir: Path, metric: str) -> dict[str, dict[str, np.ndarray]]:
    """Loss, learning rate and the validation metric by update, as far as metrics.jsonl has them: for each
    its series by name, (points, 2) of update and value."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    asked = {"loss": ["train/loss", "eval/loss"], "learning rate": ["train/learning_rate"]}
    if metric != "loss":
        asked[f"validation {metric}"] = [f"eval/{metric}"]
    curves: dict[str, dict[str, np.ndarray]] = {}
    for title, keys in asked.items():
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:  # "NaN" and "Infinity" become numbers
                curves.setdefault(title, {})[key] = np.array(points, dtype=float)
    return curves


def draw_training(output_dir: Path, metric: str) -> None:
    """training.png: `training_curves`, one below the other; none if nothing was logged, as when a finished
    run is resumed in another folder."""
    curves = training_curves(output_dir, metric)
    if not curves:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(curves), 1, figsize=(8, 2.6 * len(curves)), sharex=True, squeeze=False)
    for axis, (title, series) in zip(axes[:, 0], curves.items(), strict=True):
        for key, points in series.items():
            sparse = len(points) < 30 or key.startswith("eval/")
            axis.plot(*points.T, marker="o" if sparse else None, markersize=3, linewidth=1.4, label=key)
        axis.set_ylabel(title)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            axis.legend(frameon=False)
    axes[-1, 0].set_xlabel("update")
    figure.align_ylabels()
    figure.tight_layout()
    with writing(output_dir / "training.png"):
        figure.savefig(output_dir / ".training.png", dpi=120)
        (output_dir / ".training.png").replace(output_dir / "training.png")
    plt.close(figure)
