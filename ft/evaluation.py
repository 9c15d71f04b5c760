"""evaluate(): one pass over a split, every row scored once; used by train.py and eval.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ft.attempts import warn_out_of_memory
from ft.data.encode import EncodedRows
from ft.errors import UserError
from ft.metrics import NamedMetrics
from ft.sharded import is_sharded
from ft.tasks.base import Task

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Evaluation:
    """`metrics`: loss and the task's metrics, the same on every process. `scores` (rows, targets) and
    `labels` in the order of the encoded split, on the main process; None elsewhere."""

    metrics: dict[str, Any]
    scores: np.ndarray | None
    labels: np.ndarray | None = None


def evaluate(
    accelerator: Accelerator,
    task: Task,
    model: Any,
    loader: Any,
    rows: EncodedRows,
    named: NamedMetrics | None,
    after_batch: Callable[[int], object],
    calibrate: bool = False,
) -> Evaluation:
    """Score every row of a split once, over all processes.

    `loader` is the prepared loader of the split's `EvaluationSampler`. `after_batch` is called equally often
    on every process, with the number of rows that all have scored if they had as many as this one; an
    exception in it ends the evaluation. With `calibrate` the task fits its calibration on these rows (the
    validation rows, never others) before the metrics are computed. The loss is the mean over rows. Raises
    `UserError` for scores that are not finite, and `RuntimeError` if the gathered rows are not those of the
    split, each once."""
    was_training = model.training
    model.eval()
    try:
        # Not inference_mode: what a model caches in a pass, such as tables of positions, and the unsharded
        # parameters that FSDP2 makes in its first one must be usable in training, too.
        with torch.no_grad():
            score = partial(task.predict, model)
            parts = list(scored_batches(accelerator, model, score, loader, len(rows), after_batch))
    finally:
        model.train(was_training)
    scores_all, losses_all = gather_rows(accelerator, parts, 0, len(rows))
    broken = np.flatnonzero(~np.isfinite(scores_all).all(axis=1))
    if len(broken):
        raise UserError(
            f"the scores of {len(broken):,} of {len(rows):,} rows are not finite: the training has diverged. "
            "Lower learning_rate, add warmup, or resume from a checkpoint before it."
        )
    assert rows.labels is not None
    found: list[Any] = [None, task.calibration]
    if accelerator.is_main_process:
        if calibrate:
            task.calibration = task.calibrate(scores_all, rows.labels)
        ours = task.metrics(scores_all, rows.labels)
        metrics = {"rows": len(rows), "loss": float(losses_all.astype(np.float64).mean()), **ours}
        if named is not None:
            metrics |= named.compute(task.predictions(scores_all), rows.labels, ours)
        found = [metrics, task.calibration]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(found, src=0)
    metrics, task.calibration = found
    if not accelerator.is_main_process:
        return Evaluation(metrics, None)
    return Evaluation(metrics, scores_all, rows.labels)


def scored_batches(
    accelerator: Accelerator, model: Any, score: Callable[[Any], tuple[torch.Tensor, ...]], loader: Any,
    count: int, after_batch: Callable[[int], object],
) -> Iterator[tuple[torch.Tensor, ...]]:  # fmt: skip
    """For each batch in turn, its row numbers, (rows,), and what `score` returns for them in float32, (rows,
    ...). `loader` and `after_batch` are as for `evaluate`, `count` is the number of rows of the split."""
    most_rows, left = None, count
    for batch in loader:
        found, most_rows = within_memory(accelerator, model, score, batch, most_rows)
        real = batch.slot.rows.size  # a filler slot has none
        done = min(accelerator.num_processes * real, left)
        left -= done
        after_batch(done)
        yield batch.row_ids[:real], *(tensor[:real].float() for tensor in found)


def within_memory(
    accelerator: Accelerator, model: Any, score: Callable[[Any], tuple[torch.Tensor, ...]], batch: Any,
    most_rows: int | None,
) -> tuple[tuple[torch.Tensor, ...], int | None]:  # fmt: skip
    """What `score` returns for a batch, tensors (rows, ...), in parts of at most `most_rows` rows, if that is
    set. A part that does not fit in the device's memory is halved; the second value is then the bound for the
    next batches.

    The parts are padded like the whole, so the scores are the same up to rounding. Raises `UserError` for a
    single row, and if the model is sharded: all processes score together."""
    while True:
        parts = [batch] if most_rows is None else batch.split(most_rows)
        largest = max(len(part.row_ids) for part in parts)
        try:
            with accelerator.autocast():
                found = [score(part) for part in parts]
            return tuple(map(torch.cat, zip(*found, strict=True))), most_rows
        except torch.OutOfMemoryError:
            most_rows = -(-largest // 2)
        if largest == 1:
            raise UserError(
                "out of memory in an evaluation, on a single row: lower max_length (with long_text windows, "
                "max_windows), or use a smaller model."
            )
        if is_sharded(model):
            raise UserError(
                f"per_device_eval_batch_size: out of memory with batches of {largest} rows; set it to "
                f"{most_rows}."
            )
        warn_out_of_memory(
            accelerator, f"this evaluation continues with {most_rows} rows at a time "
            f"(--per_device_eval_batch_size {most_rows} starts there)",
        )  # fmt: skip


def gather_rows(
    accelerator: Accelerator, parts: Sequence[tuple[torch.Tensor, ...]], begin: int, end: int
) -> list[np.ndarray]:
    """What all processes found for the rows from `begin` up to but excluding `end` of a split, on every
    process and in row order. `parts` are those of this process, one per batch: its row numbers, (rows,), and
    what was found for them, (rows, ...). Raises `RuntimeError` unless each row occurs once."""
    gathered = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    if accelerator.num_processes > 1:
        padded = [accelerator.pad_across_processes(t, dim=0, pad_index=-1) for t in gathered]
        gathered = [accelerator.gather(tensor) for tensor in padded]
        gathered = [tensor[gathered[0] >= 0] for tensor in gathered]
    ids, *found = (tensor.cpu().numpy() for tensor in gathered)
    order = np.argsort(ids)
    if not np.array_equal(ids[order], np.arange(begin, end)):
        raise RuntimeError(
            f"scored {len(ids)} rows ({len(np.unique(ids))} different ones), expected {end - begin}"
        )
    return [array[order] for array in found]


def prefix_of(split: str) -> str:
    """The prefix of a split's metrics, in results.json and the trackers."""
    return "eval" if split == "validation" else split


def found_of(results: Mapping[str, Any], split: str) -> dict[str, Any]:
    """The part of results.json about a scored split."""
    prefix = f"{prefix_of(split)}/"
    return {key[len(prefix) :]: value for key, value in results.items() if key.startswith(prefix)}


def load_named_metrics(names: list[str], task: Task, accelerator: Accelerator) -> NamedMetrics | None:
    """The metrics that the user named, on the main process, which computes them; None elsewhere or without
    names."""
    if not names or not accelerator.is_main_process:
        return None
    return NamedMetrics(names, task.metric_names(), task.metric_style, task.metric_count)
