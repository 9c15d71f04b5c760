"""Keeps best/ in step with the checkpoints: a resumed run gets back the best model that its checkpoint knows
of."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from ft.durable import flush, make_free, replace_folder
from ft.errors import UserError, writing


def kept_best(output_dir: Path, step: int) -> Path:
    """Where the best model of update `step` is kept, once there is a better one, until a checkpoint knows of
    that."""
    return output_dir / f".best-{step:08d}"


def weights_sample(folder: Path) -> str:
    """A hash of the first row of every tensor of an exported model, to identify it."""
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            piece = file.get_slice(name)
            row = piece[:1] if piece.get_shape() else file.get_tensor(name)
            digest.update(name.encode() + row.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def recover_best(output_dir: Path, step: int, sample: str, origin: Path) -> bool:
    """Whether best/ is the model of update `step` with this `weights_sample` (any weights, if it is empty): a
    crash may have come after a later best was written, or while it was. A run that resumes in another folder
    than `origin`, its checkpoint's, takes a copy from there."""
    best = output_dir / "best"
    for place in _places(output_dir, step):
        if _is_sample(sample, place):
            if place != best:
                if best.exists():
                    best.rename(make_free(output_dir / ".best.tmp"))
                place.rename(best)
                make_free(output_dir / ".best.tmp")
            return True
    for place in _places(origin, step):
        if sample and _is_sample(sample, place):
            with writing(best):
                _copy(place, make_free(output_dir / ".best.tmp"), best)
            return True
    return False


def _copy(source: Path, temporary: Path, best: Path) -> None:
    try:
        shutil.copytree(source, temporary)
        for path in temporary.rglob("*"):  # an adapter is in a folder of its own
            flush(path)
    except OSError:
        _make_writable(temporary)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _make_writable(temporary)
    replace_folder(temporary, best)


def _make_writable(folder: Path) -> None:
    """Make a folder and those in it writable by their owner: they may be copies of read-only ones."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(path.stat().st_mode | 0o700)


def _places(folder: Path, step: int) -> tuple[Path, Path, Path]:
    return folder / "best", kept_best(folder, step), folder / ".best.old"


def _is_sample(sample: str, place: Path) -> bool:
    from safetensors import SafetensorError

    try:
        return (place / "model.safetensors").exists() and sample in ("", weights_sample(place))
    except SafetensorError:  # truncated, as by an unfinished copy of the run
        return False
    except OSError as error:
        raise UserError(f"{place} cannot be read: {error}. Start again when it can.") from None


def forget_bests(output_dir: Path, before: int | None = None) -> None:
    """Remove the kept best models of updates before step `before`; all of them if it is None."""
    for path in output_dir.glob(".best-*"):
        number = path.name.removeprefix(".best-")
        if number.isdecimal() and (before is None or int(number) < before):
            shutil.rmtree(path, ignore_errors=True)
