"""The output folder: who may write in it, and what is removed of an earlier run."""

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from ft.best import forget_bests
from ft.checkpoint import checkpoints_in, find_checkpoint
from ft.config import Config
from ft.errors import UserError, unwritten, writing
from ft.options import RunOptions

LEAVES = (
    "config.yaml environment.json metrics.jsonl results.json report.html training.png wandb_id "
    "checkpoints best final wandb tensorboard"
).split()
INPUTS = "model_name_or_path tokenizer_name dataset_name train_file validation_file test_file".split()
SEEDS = "seeds.json"  # names the seeds of `num_seeds`, whose folders are beside it
SPLITS = ("train", "validation", "test")  # whose evaluations have folders of their own
REPLACED = ".replaced"  # keeps what `overwrite_output_dir` replaces until the new run has begun
# Of what a run leaves: the files of which one exists before all else, and is removed after it.
MARKS = ("environment.json", "metrics.jsonl", SEEDS)
# A DataLoader's worker, and so the lock, outlives a killed process by some seconds.
LOCK_SECONDS = 10


def check_output_dir(options: RunOptions) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, None to start from scratch, and warnings. Writes nothing (damaged
    checkpoints are renamed), so that a mistake found later costs nothing.

    Raises `UserError` for a folder that holds a run, unless told to resume or to overwrite it.
    """
    folder = Path(options.output_dir)
    check_place(folder)
    found, warnings = find_checkpoint(options.resume_from_checkpoint, folder / "checkpoints")
    left = left_in(folder)
    if seed_folders(folder) and not options.overwrite_output_dir:
        raise UserError(
            f"output_dir: {str(folder)!r} holds the runs of several seeds ({', '.join(left[:4])}). Resume "
            "them with --num_seeds and --resume_from_checkpoint latest, or name another folder."
        )
    manifests = _manifests(folder)
    _check_restart(options, found, manifests)
    own = _own(found, folder, left)
    if own and options.overwrite_output_dir:
        warnings.append(
            f"overwrite_output_dir: nothing is overwritten, as resume_from_checkpoint goes on from {own}"
        )
    if own:
        return own, warnings
    _check_inputs(options, left)
    # A killed start from elsewhere may already have copied a best/.
    _check_others(folder, [name for name in left if not (found and name == "best")])
    if not left or options.overwrite_output_dir:
        return found, warnings
    is_finished = (folder / "results.json").exists()
    has_come_far = is_finished or (folder / "final").exists() or bool(manifests)
    if options.resume_from_checkpoint is None or (found is not None and has_come_far):
        raise _holds_a_run(folder, left)
    if is_finished:
        raise UserError(
            f"resume_from_checkpoint: the run in {str(folder)!r} is finished and has no checkpoint; "
            "replace it with --overwrite_output_dir, or name another folder."
        )
    return found, warnings  # the run there died before its first checkpoint


def _own(found: Path | None, folder: Path, left: list[str]) -> Path | None:
    """Which of a run's own checkpoints was found, under whatever name or link; None if it is from elsewhere.
    Raises `UserError` for anything else inside what the run has left, which `left` names."""
    if found is None:
        return None
    for own in checkpoints_in(folder / "checkpoints"):
        if own.resolve() == found.resolve():
            return own
    if _lies_in(found.parent, folder, left) or _lies_in(found, folder, left):  # a link, or what it leads to
        raise UserError(
            f"resume_from_checkpoint: {str(found)!r} is part of the run in {str(folder)!r}, but not one of "
            "its checkpoints, and the run may have diverged since; resume from it in "
            "another output_dir."
        )
    return None


def _lies_in(path: Path, folder: Path, left: list[str]) -> bool:
    """Whether a path leads into what a run has left in its folder, or to it."""
    place = path.resolve()
    return bool({place, *place.parents} & {(folder / name).resolve() for name in left})


def _check_inputs(options: RunOptions, left: list[str]) -> None:
    """Raise `UserError` if a run's input is among what it removes before its first update: what an earlier
    one has left in its folder, which `left` names. It could not be resumed."""
    folder = Path(options.output_dir)
    for key in INPUTS:
        name = getattr(options, key, None)
        if name and _lies_in(Path(os.path.expanduser(name)), folder, left):
            raise UserError(
                f"{key}: {name!r} is part of the run in {str(folder)!r}, which this one would "
                "replace; name another output_dir."
            )


def _check_others(folder: Path, left: list[str]) -> None:
    """Raise `UserError` if what would be replaced is not from a run, but the user's own: a hand-written
    config in the folder that its run is to use, a model in best/, W&B's folder of other runs."""
    of_a_run = any((folder / name).exists() for name in MARKS) or any(n.startswith("seed-") for n in left)
    has_checkpoints = any((folder / "checkpoints").glob("*step-*"))  # damaged ones, or copies to begin with
    if left and not of_a_run and not has_checkpoints:
        raise UserError(
            f"output_dir: {str(folder)!r} holds {' and '.join(left)}, which no run wrote and this one "
            "would replace; move your files, or name another output_dir."
        )


def _check_restart(options: RunOptions, found: Path | None, made: list[Path]) -> None:
    """Raise `UserError` if a launcher restarts a run that would fall back behind what it has `made` since the
    launch: manifests of checkpoints and results of seeds, the newest last. (torchrun counts restarts per
    host: another host's loss, after which all restart, is not included.)"""
    has_launcher = "TORCHELASTIC_RUN_ID" in os.environ
    if not has_launcher or options.resume_from_checkpoint == "latest" or not made:
        return
    place = made[-1].parent
    is_newest = found is not None and found.resolve() == place.resolve()
    if not is_newest and made[-1].stat().st_mtime > psutil.Process(os.getppid()).create_time():
        raise UserError(
            f"resume_from_checkpoint: the launcher restarted this run, which had reached {place}; "
            "launch it with --resume_from_checkpoint latest, to continue there."
        )


def _manifests(folder: Path) -> list[Path]:
    """The manifests of a run's checkpoints, oldest first."""
    made = [path / "manifest.json" for path in checkpoints_in(folder / "checkpoints")]
    return [path for path in made if path.exists()]


def check_seeds_dir(options: Config) -> None:
    """Raise `UserError` if the runs of several seeds may not begin in a folder, as `check_output_dir` does
    for one. Each of them checks its own folder later."""
    folder = Path(options.output_dir)
    check_place(folder)
    left = left_by_seeds(options)
    _check_others(folder, left)
    for seed in seed_folders(folder):
        _check_restart(options, None, [*_manifests(seed), *seed.glob("results.json")])
    if options.overwrite_output_dir:
        _check_inputs(options, left)
    if not left or options.overwrite_output_dir:
        return
    if options.resume_from_checkpoint is None:
        raise _holds_a_run(folder, left)
    if (folder / "metrics.jsonl").exists():
        raise UserError(
            f"output_dir: {str(folder)!r} holds the run of one seed, but num_seeds is {options.num_seeds}; "
            "leave num_seeds out, or name another folder."
        )


def set_aside(options: Config) -> None:
    """Move earlier runs out of the way of several seeds, to be put back or deleted later."""
    folder = Path(options.output_dir)
    (folder / REPLACED).mkdir(exist_ok=True)
    for name in _marks_last(left_by_seeds(options)):
        with writing(folder / name):
            _remove(folder / REPLACED / name)  # from a killed start; what that had begun takes its place
            (folder / name).replace(folder / REPLACED / name)


def put_back(folder: Path) -> None:
    """Undo `set_aside`, as far as it got. What cannot be moved stays where it is."""
    with contextlib.suppress(OSError):
        for name in _marks_last(os.listdir(folder / REPLACED))[::-1]:
            with contextlib.suppress(OSError):
                (folder / REPLACED / name).replace(folder / name)
        (folder / REPLACED).rmdir()


def check_place(folder: Path) -> None:
    """Raise `UserError` if a folder is a file or inside one, and if it may not be written."""
    there = _first_that_exists(folder.absolute())
    if not there.is_dir():
        raise UserError(f"output_dir: {str(there)!r} is a file; name a folder.")
    if not os.access(there, os.W_OK):
        raise UserError(f"output_dir: the folder {str(there)!r} may not be written; name another.")


def _holds_a_run(folder: Path, left: list[str]) -> UserError:
    return UserError(
        f"output_dir: {str(folder)!r} already holds a run ({', '.join(left[:4])}). Go on with "
        "--resume_from_checkpoint latest, replace it with --overwrite_output_dir, or name another folder."
    )


def left_in(folder: Path) -> list[str]:
    """What a run has left in a folder."""
    evaluations = [f"{name}-{split}" for name in ("evaluation", "compared") for split in SPLITS]
    left = [name for name in (*LEAVES, *evaluations) if (folder / name).exists()]
    # A record without a folder of any of its seeds is from a killed start.
    seeds = [path.name for path in seed_folders(folder)]
    return [*left, *([SEEDS, *seeds] if seeds else [])]


def standing(folder: Path) -> list[str]:
    """The same, with each checkpoint: what changes when another run writes there. Raises `UserError` for what
    cannot be a folder."""
    check_place(folder)
    return [*left_in(folder), *(path.name for path in checkpoints_in(folder / "checkpoints"))]


def seed_folders(folder: Path) -> list[Path]:
    """The folders of single seeds, see `ft.seeds`, as recorded: any other with such a name is a run of its
    own."""
    try:
        known = dict(json.loads((folder / SEEDS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return []
    return [path for seed in known if (path := folder / f"seed-{seed}").exists()]


def left_by_seeds(options: Config) -> list[str]:
    """What earlier runs have left where several seeds are to write."""
    folder = Path(options.output_dir)
    names = (f"seed-{seed}" for seed in range(options.seed, options.seed + options.num_seeds))
    return list(dict.fromkeys([*left_in(folder), *(name for name in names if (folder / name).exists())]))


def _first_that_exists(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    for path in (folder, *folder.parents):
        try:
            path.stat()
            return path
        except (FileNotFoundError, NotADirectoryError):
            if path.is_symlink():
                raise UserError(f"output_dir: {str(path)!r} is a broken link; name a folder.") from None
        except (OSError, ValueError) as error:  # a name that is too long, or contains a NUL
            why = getattr(error, "strerror", None) or error
            raise UserError(f"output_dir: {str(folder)[:300]!r} cannot be a folder: {why}.") from None
    return folder


def lock_output_dir(folder: Path) -> FileLock:
    """Keep other runs out of the folder while this process lives; the system frees the lock of a process that
    died. Raises `UserError` if another run holds it."""
    lock = FileLock(folder / ".lock", thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return lock.acquire(timeout=LOCK_SECONDS).lock
    except Timeout:
        raise UserError(
            f"output_dir: another run is writing to {str(folder)!r} now; wait for its end, or name another "
            "folder."
        ) from None
    except OSError as error:
        raise unwritten(folder, error) from None


class OutputDir:
    """The output folder of one run, on its main process, which owns it from `hold` to `release`."""

    def __init__(self, options: RunOptions) -> None:
        self.options, self.folder = options, Path(options.output_dir)
        self._found: Path | None = None
        self._seen: list[str] = []

    def look(self) -> tuple[Path | None, list[str]]:
        """See `check_output_dir`."""
        self._seen = standing(self.folder)
        self._found, warnings = check_output_dir(self.options)
        return self._found, warnings

    def hold(self) -> Path | None:
        """Keep other runs out. Returns the checkpoint to resume from, which is looked up again if another run
        has written there since `look`; raises `UserError` like that, and like `lock_output_dir`."""
        self._lock = lock_output_dir(self.folder)
        if standing(self.folder) != self._seen:
            try:
                self.look()
            except UserError:
                self.release()
                raise
        return self._found

    def release(self) -> None:
        """Let other runs in."""
        release_output_dir(self._lock)


def release_output_dir(lock: FileLock) -> None:
    """Release a folder that `lock_output_dir` locked; if it is otherwise empty, it is removed."""
    place = Path(lock.lock_file)
    place.unlink(missing_ok=True)  # before another run can take it
    lock.release()
    with contextlib.suppress(OSError):
        place.parent.rmdir()


def clear_output_dir(folder: Path, keep: Collection[str] = ()) -> None:
    """Remove what an earlier run left, except the names in `keep`; other files stay."""
    forget_bests(folder)
    for name in _marks_last(left_in(folder)):
        if name not in keep:
            with writing(folder / name):
                _remove(folder / name)


def _marks_last(names: Iterable[str]) -> list[str]:
    """What a run has left, sorted so that it is still known as a run's if a kill comes in between."""
    return sorted(names, key=lambda name: (name in MARKS, name))


def _remove(path: Path) -> None:
    """Remove a file, a folder, or a link to one, but not what that leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it, so that a reader never sees half of it. Raises
    `UserError` if it cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
