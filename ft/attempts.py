"""One update, retried until it succeeds: after a skipped fp16 step, and in smaller parts after running out of
memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ft.errors import UserError, tell

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ft.data.loader import MicroBatch

MAX_SKIPPED = 40  # fp16 starts at a scale of 2**16 and halves it; no finite gradient overflows after so many


class Attempts:
    """Makes the attempts at an update: `for attempt in attempts.at(micro_batches): with attempt: ...`.

    fp16 skips a step whose gradient overflowed and lowers the loss scale; the same update is then repeated,
    so that no row is lost and the schedule does not advance. A micro-batch that does not fit in the device's
    memory is halved, and stays so: the update and the plan are the same, only the sums are rounded in another
    order.
    """

    def __init__(self, accelerator: Accelerator, optimizer: Any, model: Any) -> None:
        self.accelerator, self.optimizer = accelerator, optimizer
        self.most_rows: int | None = None  # in a micro-batch, after one was too large
        self.in_forward = False  # of several processes' model; stays true after an error in it
        if accelerator.num_processes > 1:
            plain = accelerator.unwrap_model(model)
            plain.register_forward_pre_hook(partial(self._note, True))
            plain.register_forward_hook(partial(self._note, False))

    def _note(self, in_forward: bool, *_: Any) -> None:
        self.in_forward = in_forward

    def at(self, micro_batches: list[MicroBatch]) -> Iterator[_Attempt]:
        """Attempts at one update, until one succeeds. The micro-batches are those of the plan."""
        skipped = 0
        while skipped < MAX_SKIPPED:
            parts = micro_batches
            if self.most_rows is not None:  # the same rows in the same order
                parts = [part for one in micro_batches for part in one.split(self.most_rows)]
            attempt = _Attempt(self, parts)
            yield attempt
            if attempt.done:
                return
            skipped += not attempt.out_of_memory
            if attempt.out_of_memory:
                most = f"micro-batches have at most {self.most_rows} rows from here on"
                warn_out_of_memory(self.accelerator, f"{most}, at the same global batch")
        # The gradient is not finite at any scale: the update stays without effect, on the scale, too.
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.update(scaler.get_scale() / scaler.get_backoff_factor() ** skipped)


class _Attempt:
    """Catches errors that the next attempt can fix. Iterating gives the micro-batches."""

    def __init__(self, attempts: Attempts, micro_batches: list[MicroBatch]) -> None:
        self.attempts, self.micro_batches = attempts, micro_batches
        self.done = self.out_of_memory = self._in_last = self._in_step = False

    def __iter__(self) -> Iterator[MicroBatch]:
        for micro_batch in self.micro_batches:
            self._in_last, self.attempts.in_forward = micro_batch.slot.is_last, False
            yield micro_batch
        self._in_step = True

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        attempts = self.attempts
        if kind is None:
            self.done = not attempts.accelerator.optimizer_step_was_skipped
        if kind is None or not issubclass(kind, torch.OutOfMemoryError):
            return False
        if self._in_step:  # some parameters may have moved
            raise UserError(
                "out of memory in the optimizer step: AdamW's two moments take 8 bytes per trained parameter "
                "(12 with ema_decay); train fewer (lora_rank, freeze), or shard them over GPUs "
                "(accelerate_configs/multi_gpu_fsdp2.yaml)."
            ) from None
        largest = max(len(part.row_ids) for part in self.micro_batches)
        if largest == 1:
            raise UserError(
                "out of memory on a single row: lower max_length (with long_text windows, max_windows), or "
                "use a smaller model."
            ) from None
        in_shards = attempts.accelerator.is_fsdp2
        in_exchange = attempts.accelerator.num_processes > 1 and self._in_last and not attempts.in_forward
        if in_shards or in_exchange:
            # The processes exchange gradients in this pass (if sharded, weights in all): some of ours may be
            # sent, and cannot be recalled. DDP is ready to send as soon as the model's own forward pass is
            # over; during that pass nothing is sent, and the others wait in their exchange for ours.
            raise UserError(
                f"per_device_train_batch_size: out of memory with micro-batches of {largest} rows; set it to "
                f"{-(-largest // 2)}. The global batch, and so the result, stays the same."
            ) from None
        self.out_of_memory = True
        attempts.optimizer.zero_grad()
        attempts.most_rows = -(-largest // 2)
        return True


def warn_out_of_memory(accelerator: Accelerator, remedy: str) -> None:
    """Say what one process does about it: another may have room."""
    where = f" in process {accelerator.process_index}" if accelerator.num_processes > 1 else ""
    tell(f"warning: out of memory{where}; {remedy}")
