"""From the plan to micro-batches of tensors, in the order in which Accelerate distributes them to
processes."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ft.data.encode import EncodedRows
from ft.data.plan import Plan, evaluation_batches, plan, shares
from ft.signals import STOP_SIGNALS

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ft.config import Config


@dataclass(frozen=True)
class Slot:
    """One micro-batch before its tensors are made. A slot without rows uses `filler`, which has no weight."""

    rows: np.ndarray
    filler: int
    is_last: bool = True  # of the micro-batches of its update
    update_weight: float = 0.0  # sum of the row weights of the whole update, over all processes
    update_rows: int = 0
    update_tokens: int = 0


@dataclass(frozen=True)
class Pieces:
    """Which windows of a micro-batch belong to which rows. counts (rows,) is on the host. ids (pieces,)
    int64: numbers that no two pieces of a split share. rows (pieces,) int64: the index of each piece's row.
    shares (pieces,) float32: its weight in the mean of its row."""

    counts: np.ndarray
    ids: torch.Tensor
    rows: torch.Tensor
    shares: torch.Tensor

    @staticmethod
    def of(rows: np.ndarray, counts: np.ndarray) -> Pieces:
        """For rows with the given numbers of pieces."""
        places = np.repeat(np.arange(len(rows)), counts)
        number = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
        tensors = (
            rows[places].astype(np.int64) + (number << 40),  # unique; those of first pieces are the rows
            places,
            (1 / counts).astype(np.float32)[places],
        )
        return Pieces(counts, *map(torch.from_numpy, tensors))

    def where(self, rows: slice) -> slice:
        """The positions of the pieces of some rows."""
        begin = int(self.counts[: rows.start].sum())
        return slice(begin, begin + int(self.counts[rows].sum()))

    def part(self, rows: slice) -> Pieces:
        """For some of the rows."""
        ids, places, shares = (tensor[self.where(rows)] for tensor in (self.ids, self.rows, self.shares))
        return Pieces(self.counts[rows], ids, places - rows.start, shares)

    def map(self, function: Any) -> Pieces:
        """With `function` applied to each tensor."""
        return Pieces(self.counts, *map(function, (self.ids, self.rows, self.shares)))


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of some rows, and what the host knows about their update.

    inputs: input_ids, attention_mask (if anything is padded), token_type_ids (for pairs), each (pieces,
    tokens) int64. A row is one piece, and `pieces` None, unless long texts are cut into windows. labels:
    (rows,) int64 or float64, or (rows, labels) uint8, or (rows, 0) if there are none. row_ids (the numbers of
    the rows in the encoded split): (rows,) int64. weights: (rows,) float32, 0 for a filler row.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    row_ids: torch.Tensor
    weights: torch.Tensor
    slot: Slot
    pieces: Pieces | None = None

    @property
    def piece_ids(self) -> torch.Tensor:
        """(pieces,) int64 numbers that no two pieces of a split share; those of the rows, if a row is one
        piece."""
        return self.row_ids if self.pieces is None else self.pieces.ids

    def of_rows(self, scores: torch.Tensor) -> torch.Tensor:
        """The scores (pieces, targets) combined per row (rows, targets): the mean over its pieces."""
        if self.pieces is None:
            return scores
        rows = scores.new_zeros(len(self.row_ids), scores.shape[1])
        return rows.index_add(0, self.pieces.rows, scores * self.pieces.shares[:, None])

    def to(self, *args: Any, **kwargs: Any) -> MicroBatch:
        """The same on another device."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> MicroBatch:
        """The same in pinned memory, from which copies to a device run in the background."""
        return self._map(torch.Tensor.pin_memory)

    def split(self, most_rows: int) -> list[MicroBatch]:
        """The same rows in parts of at most `most_rows`, as wide as the whole; the last part keeps
        `is_last`."""
        begins = range(0, len(self.row_ids), most_rows)
        parts = []
        for begin in begins:
            rows = slice(begin, begin + most_rows)
            of_inputs = self.pieces.where(rows) if self.pieces else rows
            parts.append(
                replace(
                    self,
                    inputs={name: tensor[of_inputs] for name, tensor in self.inputs.items()},
                    labels=self.labels[rows], row_ids=self.row_ids[rows], weights=self.weights[rows],
                    slot=replace(self.slot, is_last=self.slot.is_last and begin == begins[-1]),
                    pieces=self.pieces and self.pieces.part(rows),
                )
            )  # fmt: skip
        return parts

    def _map(self, function: Any) -> MicroBatch:
        inputs = {name: function(tensor) for name, tensor in self.inputs.items()}
        row_ids, labels, weights = map(function, (self.row_ids, self.labels, self.weights))
        pieces = self.pieces and self.pieces.map(function)
        return replace(self, inputs=inputs, labels=labels, row_ids=row_ids, weights=weights, pieces=pieces)


# Numbers as float64: in float32, targets such as seconds since 1970 are two minutes apart.
LABEL_TYPES = {"i": np.int64, "u": np.uint8, "f": np.float64}


class RowDataset(Dataset):
    """Makes the micro-batch of a `Slot`; used where a DataLoader expects a map-style data set."""

    def __init__(self, rows: EncodedRows, tokenizer: Any, row_weights: np.ndarray | None = None) -> None:
        self.rows = rows
        self.pad_id, self.on_left = tokenizer.pad_token_id, tokenizer.padding_side == "left"
        self.multiple = 1
        self.row_weights = np.ones(len(rows)) if row_weights is None else row_weights

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, slot: Slot) -> MicroBatch:
        rows = slot.rows if len(slot.rows) else np.array([slot.filler])
        weights = self.row_weights[rows] if len(slot.rows) else np.zeros(1)
        inputs = self.rows.padded(rows, self.pad_id, self.multiple, self.on_left)
        if inputs["attention_mask"].all():  # see ft.attention.install_masks
            del inputs["attention_mask"]
        labels = np.zeros((len(rows), 0), np.uint8) if self.rows.labels is None else self.rows.labels[rows]
        return MicroBatch(
            inputs={name: torch.from_numpy(array) for name, array in inputs.items()},
            labels=torch.from_numpy(labels.astype(LABEL_TYPES[labels.dtype.kind])),
            row_ids=torch.from_numpy(rows.astype(np.int64)),
            weights=torch.from_numpy(weights.astype(np.float32)),
            slot=slot,
            pieces=None if self.rows.pieces is None else Pieces.of(rows, self.rows.pieces[rows]),
        )


class PlanSampler:
    """A batch sampler that lists, for update after update, the micro-batches of all processes in turn.

    Accelerate gives batch i to process i modulo the number of processes. `start` sets where the next pass
    begins, so that resuming at an update costs nothing. `total_updates` ends the last epoch early."""

    def __init__(
        self,
        dataset: RowDataset,
        global_batch_size: int,
        seed: int,
        num_processes: int,
        micro_batch_size: int | None,
    ) -> None:
        self.dataset, self.global_batch_size, self.seed = dataset, global_batch_size, seed
        self.num_processes, self.micro_batch_size = num_processes, micro_batch_size or global_batch_size
        self.updates_per_epoch = -(-len(dataset) // global_batch_size)
        self.total_updates = self.updates_per_epoch
        self.step = 0

    def start(self, step: int, total_updates: int) -> None:
        """Have the next pass run from the update after `step` updates to the end of its epoch, or of the
        run."""
        self.step, self.total_updates = step, total_updates

    def seen(self, step: int) -> tuple[int, int]:
        """Rows and tokens (without padding) of the first `step` updates of a run."""
        epochs, updates = divmod(step, self.updates_per_epoch)
        lengths = self.dataset.rows.lengths.astype(np.int64)
        begun = self.plan(epochs).order[: updates * self.global_batch_size]
        rows, tokens = len(begun), int(lengths[begun].sum())
        return epochs * len(lengths) + rows, epochs * int(lengths.sum()) + tokens

    def plan(self, epoch: int) -> Plan:
        """The plan of an epoch."""
        return plan(self.dataset.rows.lengths, self.global_batch_size, self.seed, epoch)

    def rows_of(self, step: int) -> str:
        """The rows of update number `step`, as the user numbers them."""
        epoch, update = divmod(step - 1, self.updates_per_epoch)
        rows = self.dataset.rows.row[self.plan(epoch).rows(update)]
        return f"training rows are {', '.join(map(str, sorted(rows.tolist())))} (counted from 0)"

    def __iter__(self) -> Iterator[Slot]:
        epoch, first = divmod(self.step, self.updates_per_epoch)
        planned = self.plan(epoch)
        last = min(len(planned), self.total_updates - epoch * self.updates_per_epoch)
        for update in range(first, last):
            rows = planned.rows(update)
            lengths = self.dataset.rows.lengths[rows]
            micro_batches = shares(rows, lengths, self.num_processes, self.micro_batch_size)
            weight = float(self.dataset.row_weights[rows].sum())
            tokens = int(lengths.sum())
            for number, parts in enumerate(micro_batches, start=1):
                for part in parts:
                    is_last = number == len(micro_batches)
                    yield Slot(part, int(rows[0]), is_last, weight, len(rows), tokens)


class EvaluationSampler:
    """A batch sampler over every row once; empty slots give every process the same number of batches.

    With `chunk_rows`, the batches of that many consecutive rows come before those of the next: `chunks` holds
    their first rows, their ends, and the number of batches that each process has of each."""

    def __init__(
        self, dataset: RowDataset, batch_size: int, num_processes: int, chunk_rows: int | None = None
    ) -> None:
        # (An attribute "batch_size" would have Accelerate look into the batches.)
        self.rows, self.most, self.num_processes = dataset.rows, batch_size, num_processes
        size = chunk_rows or max(1, len(dataset))
        begins = range(0, len(dataset), size)
        ends = [min(begin + size, len(dataset)) for begin in begins]
        self.chunks = [
            (begin, end, -(-len(self._batches(begin, end)) // num_processes))
            for begin, end in zip(begins, ends, strict=True)
        ]

    def _batches(self, begin: int, end: int) -> list[np.ndarray]:
        pieces = None if self.rows.pieces is None else self.rows.pieces[begin:end]
        return evaluation_batches(self.rows.lengths[begin:end], self.most, pieces)

    def __len__(self) -> int:
        return sum(batches for _, _, batches in self.chunks) * self.num_processes

    def __iter__(self) -> Iterator[Slot]:
        for begin, end, batches in self.chunks:
            filled = self._batches(begin, end)
            for rows in filled:
                yield Slot(rows + begin, begin)
            for _ in range(batches * self.num_processes - len(filled)):
                yield Slot(np.zeros(0, np.int64), begin)


def build_loader(dataset: RowDataset, sampler: Any, num_workers: int, device: torch.device) -> DataLoader:
    """A DataLoader over a sampler of slots. For a GPU, which multiplies matrices in tiles, texts are padded
    to a multiple of eight tokens, in pinned memory."""
    if device.type == "cuda":
        dataset.multiple = 8
    if num_workers:
        atexit.register(_end_workers)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_same,
        num_workers=num_workers,
        worker_init_fn=_ignore_stop_signals if num_workers else None,
        # With Python 3.14's default, a helper process in the run's group would end with a signal to it.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        persistent_workers=num_workers > 0,
        pin_memory=device.type == "cuda",
    )


def build_evaluation_loader(
    rows: EncodedRows, tokenizer: Any, options: Config, accelerator: Accelerator
) -> DataLoader:
    """A loader over every row of a split once, to be prepared by the accelerator."""
    dataset = RowDataset(rows, tokenizer)
    sampler = EvaluationSampler(dataset, options.per_device_eval_batch_size, accelerator.num_processes)
    return build_loader(dataset, sampler, options.dataloader_num_workers, accelerator.device)


def _ignore_stop_signals(_worker: int) -> None:
    """A terminal, a launcher or Slurm sends a signal to all processes of a run. If it ended a worker, the run
    would end before it has saved; the workers end with the run."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """End the remaining workers when Python exits, before it tries by a signal that they ignore."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _same(batch: Any) -> Any:
    return batch


def updates(loader: Iterable[MicroBatch]) -> Iterator[list[MicroBatch]]:
    """Group the micro-batches of a process into updates."""
    window: list[MicroBatch] = []
    for micro_batch in loader:
        window.append(micro_batch)
        if micro_batch.slot.is_last:
            yield window
            window = []
