"""Resume a run from a checkpoint, after checking that the two belong together."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft import checkpoint
from ft.best import recover_best
from ft.checkpoint import Progress
from ft.errors import UserError
from ft.health import Health
from ft.options import DataOptions, ModelOptions, RunOptions
from ft.output import clear_output_dir, left_in
from ft.sharded import class_name
from ft.values import precision_name
from ft.words import trained_words_mark

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from ft.config import Config
    from ft.run import Run


# Options that may change when a run is resumed: where it runs, what it watches, when it stops. Those of the
# data are covered by the data's fingerprint, and the model by its weights.
MAY_CHANGE = {
    *RunOptions.__annotations__,
    *DataOptions.__annotations__,
    *(name for name in ModelOptions.__annotations__ if name != "config_overrides"),
    "task", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_train_steps", "max_time", "gradient_checkpointing", "torch_compile",
    "tf32", "on_nonfinite", "deterministic",
}  # fmt: skip


def identity(run: Run) -> dict[str, Any]:
    """What a checkpoint and the run that resumes it must share: the model before training, its targets, the
    data, and every option except those in `MAY_CHANGE`."""
    config = run.config
    # The options come first, so that an error names what the user has changed.
    return {
        **{
            field.name: getattr(config, field.name)
            for field in fields(config)
            if field.name not in MAY_CHANGE
        },
        "class_weights": config.weights("class_weights"),
        "pos_weight": config.weights("pos_weight"),
        "threshold_mode": config.threshold_mode,
        "long_text": config.long_text,
        "max_windows": config.max_windows,
        "model": run.shapes,
        "pretrained model": run.pretrained,
        "data": run.data.fingerprint,
        "labels": run.task.state(),
        "metric_for_best_model": config.best_metric,
        "greater_is_better": config.higher_is_better,
        "choice of word embeddings": trained_words_mark(run.model),
    }


def of_launch(config: Config, accelerator: Accelerator) -> dict[str, Any]:
    """What all processes of a run must share before anything is read: every option except file paths and what
    only the main process does. The contents of the files are compared when they are read."""
    own = {*DataOptions.__annotations__, *ModelOptions.__annotations__} - {"config_overrides"}
    own |= {"output_dir", "resume_from_checkpoint", "run_name", "report_to", "log_artifacts", "hub_model_id"}
    options = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in own}
    return {**options, "mixed precision": accelerator.mixed_precision}


def shapes_mark(model: torch.nn.Module) -> str:
    """The class of a model, with a hash of the names and shapes of its weights."""
    shapes = [(name, list(p.shape)) for name, p in model.named_parameters()]
    return f"{class_name(model)} {hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]}"


def weights_mark(model: torch.nn.Module) -> str:
    """A hash of some pretrained weights, which identifies a model even if its path has changed. New weights,
    such as the head, are left out: another kind of CPU may draw different last bits. Call it before the model
    is sharded."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        is_new = getattr(parameter, "was_drawn", False) or ".lora_" in name
        if name.startswith(f"{getattr(model, 'base_model_prefix', '')}.") and not is_new:
            digest.update(parameter.detach().flatten()[:4].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def resume(run: Run, path: Path, notes: list[str]) -> Progress:
    """Restore model, optimizer and schedule from the checkpoint `path`, on all processes, and return the
    progress; adds notes for the user to `notes`.

    Raises `UserError` for a checkpoint of another run, or of one that is longer than this."""
    saved = run.hosts.from_main(lambda: checkpoint.read_state(path))
    if saved["identity"].setdefault("choice of word embeddings") is None:
        if trained_words_mark(run.model):
            raise UserError(
                f"resume_from_checkpoint: {path} was made by an earlier version, which trained all word "
                "embeddings; go on with that version, or train anew in another output_dir."
            )
        saved["identity"]["choice of word embeddings"] = []
    checkpoint.check_identity(path, saved["identity"], identity(run))
    saved["progress"].setdefault("evaluated_step", saved["progress"]["step"])  # older ones do not record it
    progress = Progress(**{**saved["progress"], "health": Health(**saved["progress"]["health"])})
    if progress.step > run.total:
        raise UserError(
            f"resume_from_checkpoint: {path} is at update {progress.step:,}, but this run has "
            f"{run.total:,}; raise max_train_steps or num_train_epochs, or choose an earlier checkpoint."
        )
    run.hosts.check_same({f"resume_from_checkpoint: {path}": checkpoint.mark(path)})
    checkpoint.restore(path, run.accelerator, run.model, run.optimizer, run.scheduler)
    notes.append(f"resumed from {path} after update {progress.step:,}")
    notes += _change_notes(run, progress, saved["total_updates"])
    # Other hosts may not see the folder.
    folder = run.output_dir / "checkpoints"
    is_own = run.has_own_checkpoint
    later = run.hosts.from_main(lambda: checkpoint.set_aside_later(folder, progress.step if is_own else -1))
    if later:
        notes.append(
            f"checkpoints of a different trajectory, which latest no longer finds, are kept as "
            f"{', '.join(place.name for place in later)}"
        )
    if not is_own:
        progress.metrics_rows = 0  # they are in another folder's metrics.jsonl
        left = run.hosts.from_main(lambda: left_in(run.output_dir))
        if left := [name for name in left if name != "checkpoints"]:
            notes.append(f"files of another run in {run.output_dir} are replaced: {', '.join(left)}")
    best = progress.best_step
    origin = path.resolve().parent.parent if run.takes_best else run.output_dir
    if best and not run.hosts.from_main(
        lambda: recover_best(run.output_dir, best, progress.best_weights, origin)
    ):
        notes.append(f"best/ of update {best} is not in {run.output_dir}: chosen anew")
        progress.best_step, progress.best_metric, progress.best_weights = 0, None, ""
        progress.best_values = {}
    if not is_own:
        kept = ("checkpoints", "best") if progress.best_step else ("checkpoints",)
        run.hosts.from_main(lambda: clear_output_dir(run.output_dir, kept))
    return progress


def _change_notes(run: Run, progress: Progress, total_before: int) -> list[str]:
    """Notes for the user of a run that continues with another length or precision than before; `progress`
    remembers the lengths."""
    notes, totals = [], progress.earlier_totals
    if totals and totals[-1][0] == progress.step:  # no update was made since
        if totals[-1][1] == run.total:
            totals.pop()
    elif total_before != run.total:
        totals.append([progress.step, total_before])
    later_totals = [*(total for _, total in totals[1:]), run.total]
    for (step, total), instead in zip(totals, later_totals, strict=False):
        notes.append(
            f"the run has {instead:,} updates instead of {total:,}, which sets its learning rates "
            f"from update {step:,} on"
        )
    precision = run.accelerator.mixed_precision
    if progress.precision not in ("", precision):
        before, now = precision_name(progress.precision), precision_name(precision)
        notes.append(
            f"WARNING mixed precision: it was {before} up to here, and is {now} from here on; launch with "
            f"--mixed_precision {progress.precision} to keep it"
        )
    return notes
