"""predict(): writes the predictions for a split without labels, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ft.config import EvalConfig
from ft.data.audit import describe_rows
from ft.data.encode import EncodedRows
from ft.data.loader import EvaluationSampler, RowDataset, build_loader
from ft.data.prepare import Data
from ft.errors import EXIT_DONE, UserError, printable
from ft.evaluation import gather_rows, scored_batches
from ft.evaluation_place import clear_evaluation, evaluation_folder, held
from ft.prediction_files import PredictionFile, prediction_lines
from ft.report import evaluation_notes
from ft.tasks.base import Task
from ft.unseen import has_set_test_aside

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ft.hosts import HostGroup

# Enough for batches of rows of similar length, few enough to hold their scores. Independent of the launch:
# the same rows make up the same batches, and so get the same scores, on any number of processes.
CHUNK_ROWS = 16_384


def predict(
    config: EvalConfig, accelerator: Accelerator, hosts: HostGroup, task: Task, model: Any, tokenizer: Any,
    data: Data, split: str, notes: list[str], bar: Callable,
) -> int:  # fmt: skip
    """Write the predictions for a split without labels, in row order; returns the exit code.

    The encoded rows stay in their file and only one chunk's scores are held, so that memory grows by only a
    few bytes per row. Raises `UserError` if nothing can be written, or a score is not finite."""
    if config.suspected_label_errors:
        raise UserError(
            f"suspected_label_errors: no row of the {split} data has a label; leave it out, or name the "
            "label_column_name."
        )
    unused = [name for name in ("metrics", "slice_columns") if getattr(config, name)]
    if unused:
        notes = [*notes, f"nothing is scored, so that {' and '.join(unused)} have no effect"]
    if split == "test" and config.test_split_percentage and has_set_test_aside(config):
        how = (
            "eval.py --test_file null --split test"
            if config.test_file
            else "eval.py on the data without its test split"
        )
        notes = [*notes, f"test_split_percentage: the rows that training set aside are scored by {how}"]
    rows = data.splits[split]
    folder = hosts.from_main(lambda: evaluation_folder(config.output_dir, split))
    dataset = RowDataset(rows, tokenizer)
    sampler = EvaluationSampler(
        dataset, config.per_device_eval_batch_size, accelerator.num_processes, CHUNK_ROWS
    )
    loader = build_loader(dataset, sampler, config.dataloader_num_workers, accelerator.device)
    model, loader = accelerator.prepare(model, loader)
    with bar(total=len(rows), desc=f"predict {split}", unit="rows") as shown:
        chunks = predicted_chunks(accelerator, task, model, loader, sampler.chunks, rows, shown.update)
        if not accelerator.is_main_process:
            for _ in chunks:
                pass
            return EXIT_DONE
        with held(folder), PredictionFile(folder, config, rows.table.schema) as file:
            for part, scores in chunks:
                file.write(prediction_lines(part, data.columns, task, scores))
                del part, scores  # before the next are made
            file.close()
            notes = [*notes, *clear_evaluation(folder, file.path.name)]
    for note in (*data.notes, *notes, *evaluation_notes(data.splits, accelerator.device)):
        print(printable(f"note: {note}"))
    print(f"{split}: {len(rows):,} rows predicted, none scored")
    print(f"written to {folder}: {file.path.name}")
    return EXIT_DONE


def predicted_chunks(
    accelerator: Accelerator, task: Task, model: Any, loader: Any, chunks: list[tuple[int, int, int]],
    rows: EncodedRows, after_batch: Callable[[int], object],
) -> Iterator[tuple[EncodedRows, np.ndarray]]:  # fmt: skip
    """The rows of one chunk after another with their scores (rows, targets), in order, on every process.

    `loader` is the prepared loader of the split's `EvaluationSampler`, and `chunks` are the sampler's. When
    the next chunk is requested, no more than the last batch of a chunk is kept; nothing is done for the next
    one before that. Raises `UserError` for scores that are not finite."""
    model.eval()
    batches = scored_batches(
        accelerator, model, lambda part: (task.score(model, part),), loader, len(rows), after_batch
    )
    for begin, end, batches_here in chunks:
        with torch.inference_mode():
            parts = list(islice(batches, batches_here))
        part, (gathered,) = rows.part(begin, end), gather_rows(accelerator, parts, begin, end)
        del parts
        broken = part.row[~np.isfinite(gathered).all(axis=1)]
        if len(broken):
            raise UserError(
                f"the model's scores are not finite for {describe_rows(broken)}; rows count from 0. Did "
                "its training diverge?"
            )
        yield part, gathered
        del gathered
    assert next(batches, None) is None, "the loader holds more batches than the chunks"
