"""Take up a run where a checkpoint has it, once the two were found to belong together."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft import checkpoint
from ft.checkpoint import Progress
from ft.errors import UserError
from ft.health import Health
from ft.optim import set_learning_rate

if TYPE_CHECKING:
    from ft.run import Run


def identity(run: Run) -> dict[str, Any]:
    """What a checkpoint and the run that resumes it must share. What is not in it may change: processes,
    micro-batches, logging, evaluation and saving, and the number of updates."""
    config = run.config
    model = run.accelerator.unwrap_model(run.model)
    steps, ratio = config.warmup_steps, config.warmup_ratio
    warmup = f"{ratio:g} of the updates for" if steps is None else f"{steps} updates of"
    shapes = [(name, list(p.shape)) for name, p in model.named_parameters()]
    return {
        "model": f"{type(model).__name__} {hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]}",
        "labels": run.task.state(),
        "data": run.data.fingerprint,
        "global_batch_size": config.global_batch_size,
        "seed": config.seed,
        "dropout_mode": config.dropout_mode,
        "schedule": f"{config.lr_scheduler_type}, rate {config.learning_rate:g}, {warmup} warmup",
    }


def resume(run: Run, path: Path, notes: list[str]) -> Progress:
    """Restore model, optimizer and schedule from the checkpoint `path`, on all processes, and return where it
    stands; `notes` gets what to tell the user.

    Raises `UserError` for a checkpoint of another run, or of one that is longer than this."""
    saved = run.hosts.from_main(lambda: checkpoint.read_state(path))
    checkpoint.check_identity(path, saved["identity"], identity(run))
    progress = Progress(**{**saved["progress"], "health": Health(**saved["progress"]["health"])})
    if progress.step > run.total:
        raise UserError(
            f"resume_from_checkpoint: {path} stands after update {progress.step:,}, but this run has "
            f"{run.total:,}; raise max_train_steps or num_train_epochs, or choose an earlier checkpoint."
        )
    checkpoint.restore(path, run.accelerator, run.model, run.optimizer, run.scheduler)
    set_learning_rate(run.scheduler)
    notes.append(f"resumed from {path} after update {progress.step:,}")
    if saved["total_updates"] != run.total:
        notes.append(
            f"the run has {run.total:,} updates instead of {saved['total_updates']:,}; its learning rates "
            "follow from that from here on"
        )
    # Other hosts may not see the folder.
    best = run.output_dir / "best"
    if progress.best_step and not run.hosts.from_main(lambda: checkpoint.recover_folder(best)):
        notes.append(f"best/ of update {progress.best_step} is not in {run.output_dir}: chosen anew")
        progress.best_step, progress.best_metric = 0, None
    return progress
