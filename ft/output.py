"""The output folder: who may write in it, and what of an earlier run goes."""

import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from ft.checkpoint import find_checkpoint
from ft.config import RunOptions
from ft.errors import UserError

LEAVES = (
    "config.yaml environment.json metrics.jsonl results.json training.png wandb_id checkpoints best final "
    "wandb tensorboard"
).split()
# A DataLoader's worker outlives a process that was killed by some seconds, and its lock with it.
LOCK_SECONDS = 10


def check_output_dir(options: RunOptions) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, None to start anew, and warnings. Writes nothing, so that a mistake
    found later costs nothing.

    Raises `UserError` for a folder that holds a run, unless told to go on or to start anew.
    """
    folder = Path(options.output_dir)
    there = _first_that_exists(folder.absolute())
    if not there.is_dir():
        raise UserError(f"output_dir: {str(there)!r} is a file; name a folder.")
    if not os.access(there, os.W_OK):
        raise UserError(f"output_dir: the folder {str(there)!r} may not be written; name another.")
    found, warnings = find_checkpoint(options.resume_from_checkpoint, folder / "checkpoints")
    held = [name for name in LEAVES if (folder / name).exists()]
    if found is not None or not held or options.overwrite_output_dir:
        return found, warnings
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
    return None, warnings  # it died before its first checkpoint


def _first_that_exists(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    for path in (folder, *folder.parents):
        try:
            path.stat()
            return path
        except (FileNotFoundError, NotADirectoryError):
            if path.is_symlink():
                raise UserError(f"output_dir: {str(path)!r} is a link to nowhere; name a folder.") from None
        except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
            why = getattr(error, "strerror", None) or error
            raise UserError(f"output_dir: {str(folder)[:300]!r} cannot be a folder: {why}.") from None
    return folder


def lock_output_dir(folder: Path) -> FileLock:
    """Keep other runs out of the folder for as long as this process lives; the system frees the lock of one
    that died. Raises `UserError` where another run holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", thread_local=False)
    try:
        return lock.acquire(timeout=LOCK_SECONDS).lock
    except Timeout:
        raise UserError(
            f"output_dir: another run is writing to {str(folder)!r} now; wait for its end, or name another "
            "folder."
        ) from None
    except OSError as error:
        raise UserError(f"output_dir: {str(folder)!r} cannot be written: {error.strerror}.") from None


def clear_output_dir(folder: Path, keep_checkpoints: bool) -> None:
    """Remove what an earlier run left; other files stay."""
    for path in (folder / name for name in LEAVES):
        if keep_checkpoints and path.name == "checkpoints":
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
