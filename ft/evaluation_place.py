"""Where an evaluation writes, and what it must not overwrite there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ft.config import EvalConfig
from ft.data.sources import Source
from ft.errors import UserError
from ft.output import SEEDS, lock_output_dir, release_output_dir

# What an evaluation leaves beside its predictions.
EVALUATION = ("results.json", "report.html", "label_errors.jsonl")


def evaluation_folder(output_dir: str, split: str) -> Path:
    """Where an evaluation writes: output_dir, or a folder of its own inside that of a training run or of
    several seeds. Raises `UserError` if it cannot be created."""
    folder = _evaluation_folder(output_dir, split)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: {str(folder)!r} cannot be made: {error.strerror}.") from None
    return folder


def _evaluation_folder(output_dir: str, split: str) -> Path:
    folder = Path(output_dir)
    is_run = any((folder / name).exists() for name in ("metrics.jsonl", SEEDS))
    return folder / f"evaluation-{split}" if is_run else folder


def clear_evaluation(folder: Path, predictions: str) -> list[str]:
    """Remove the results of an earlier evaluation from a folder before another one writes there: they would
    be mistaken for results of the new `predictions`, the name of the file to come. Returns notes for the
    user."""
    is_known = _is_of_an_evaluation(folder)
    there = [name for name in EVALUATION if is_known and (folder / name).exists()]
    for name in there[::-1]:  # results.json last: it identifies the others
        (folder / name).unlink()
    there += [predictions] if (folder / predictions).exists() else []
    return [f"replaced in {folder}, from an earlier evaluation: {', '.join(there)}"] if there else []


def _is_of_an_evaluation(folder: Path) -> bool:
    """Whether the results in a folder are of an evaluation, whose predictions may have gone elsewhere;
    without results, whether its predictions are there."""
    path = folder / "results.json"
    if not path.exists():
        return any(folder.glob("predictions.*"))
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(known, dict) and {"split", "rows", "model"} <= known.keys()


def check_apart(config: EvalConfig, split: str, sources: Iterable[Source]) -> None:
    """Raise `UserError` if an evaluation would overwrite the data that it reads."""
    folder = _evaluation_folder(config.output_dir, split).resolve()
    written = {*EVALUATION, f"predictions.{config.predictions_format}"}
    others = [Path(file) for file in (config.train_file, config.validation_file) if file]
    for path in (path.resolve() for path in [*others, *(path for one in sources for path in one.files)]):
        if path.name in written and path.parent == folder:
            raise UserError(
                f"output_dir: {str(path)!r} is read as data, and would be replaced by what is written there; "
                "name another output_dir."
            )


def check_free(config: EvalConfig, split: str) -> None:
    """Raise `UserError` if results or a page that no evaluation wrote would be overwritten."""
    folder = _evaluation_folder(config.output_dir, split)
    there = [name for name in EVALUATION[:2] if (folder / name).exists()]
    if there and not _is_of_an_evaluation(folder):
        raise UserError(
            f"output_dir: {str(folder)!r} holds a {there[0]} that no evaluation wrote. It would be "
            "replaced: name another output_dir."
        )


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other evaluations out of a folder while this one writes there. Raises `UserError` if another one
    does."""
    lock = lock_output_dir(folder)
    try:
        yield
    finally:
        release_output_dir(lock)
