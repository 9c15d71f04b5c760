"""The output folder: who may write in it, and what of an earlier run goes."""

import os
import shutil
from pathlib import Path

from ft.checkpoint import find_checkpoint
from ft.config import RunOptions
from ft.errors import UserError

LEAVES = (
    "config.yaml environment.json metrics.jsonl results.json training.png wandb_id checkpoints best final "
    "wandb tensorboard trackio"
).split()


def check_output_dir(options: RunOptions) -> Path | None:
    """The checkpoint to resume from, None to start anew. Changes nothing, so that a mistake found later costs
    nothing.

    Raises `UserError` for a folder that holds a run, unless told to go on or to start anew.
    """
    folder = Path(options.output_dir)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"output_dir: {str(there)!r} is a file; name a folder.")
    if not os.access(there, os.W_OK):
        raise UserError(f"output_dir: the folder {str(there)!r} may not be written; name another.")
    found = find_checkpoint(options.resume_from_checkpoint, folder / "checkpoints")
    held = [name for name in LEAVES if (folder / name).exists()]
    if found is not None or not held or options.overwrite_output_dir:
        return found
    if options.resume_from_checkpoint is None:
        raise UserError(
            f"output_dir: {str(folder)!r} already holds a run ({', '.join(held[:4])}). Go on with "
            "--resume_from_checkpoint latest, replace it with --overwrite_output_dir, or name another folder."
        )
    if (folder / "results.json").exists():
        raise UserError(
            f"resume_from_checkpoint: the run in {str(folder)!r} is finished and has no checkpoint; "
            "replace it with --overwrite_output_dir, or name another folder."
        )
    return None  # it died before its first checkpoint


def clear_output_dir(folder: Path) -> None:
    """Remove what an earlier run left; other files stay."""
    for path in (folder / name for name in LEAVES):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
