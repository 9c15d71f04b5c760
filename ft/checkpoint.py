"""Checkpoints that exist whole or not at all: progress, save, find, restore, retention."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Progress:
    """Where a run stands; everything that decides how it goes on, but for weights and optimizer.

    `step` counts optimizer updates and is the position in the plan. The `log_*` fields sum what was not
    logged yet."""

    step: int = 0
    best_metric: float | None = None
    best_step: int = 0
    evaluations_without_gain: int = 0
    patience_metric: float | None = None
    log_loss: float = 0.0
    log_weight: float = 0.0


def save_checkpoint(
    folder: Path, accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any, progress: Progress,
    identity: dict[str, Any], limit: int | None,
) -> None:  # fmt: skip
    """Write `folder`/step-N beside its place, flush it, rename it, point `latest` at it, then remove old
    ones.

    To be called on all processes; the main one writes. A failed write leaves the earlier checkpoints as they
    were."""
    import torch
    from safetensors.torch import save_model

    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    target = folder / f"step-{progress.step:08d}"
    temporary = folder / f".{target.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_model(accelerator.unwrap_model(model), str(temporary / "model.safetensors"))
        state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler.state_dict()
        torch.save(state, temporary / "optimizer.pt")
        _write(
            temporary / "state.json",
            json.dumps({"progress": asdict(progress), "identity": identity}, indent=1),
        )
        files = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
        _write(temporary / "manifest.json", json.dumps(files, indent=1))
        flush_folder(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _write(folder / ".latest.tmp", target.name + "\n")
        (folder / ".latest.tmp").rename(folder / "latest")
        flush(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = find_latest(folder)
        kept = f"the checkpoint {last.name} is untouched" if last else "there was no earlier checkpoint"
        raise UserError(
            f"output_dir: the checkpoint of step {progress.step} cannot be written to {str(folder)!r}: "
            f"{error.strerror or error}; {kept}. Make room, then resume from it."
        ) from None
    if limit is not None:
        for old in sorted(folder.glob("step-*"))[:-limit]:
            if old != target:
                shutil.rmtree(old, ignore_errors=True)


def find_latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`: the one that `latest` names, or a newer that a crash kept it
    from naming; None where there is none."""
    whole = [path for path in sorted(folder.glob("step-*")) if (path / "manifest.json").exists()]
    return whole[-1] if whole else None


def find_checkpoint(wanted: str | None, folder: Path) -> Path | None:
    """The checkpoint that resume_from_checkpoint asks for; None to start anew."""
    if wanted is None:
        return None
    if wanted == "latest":
        return find_latest(folder)
    path = Path(wanted)
    if path.name == "checkpoints" or (path / "checkpoints").is_dir():
        path = find_latest(path if path.name == "checkpoints" else path / "checkpoints") or path
    if not (path / "manifest.json").exists():
        raise UserError(
            f"resume_from_checkpoint: {wanted!r} is no whole checkpoint; expected a folder such as "
            f"{folder / 'step-00000500'}, or latest."
        )
    return path


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint, after its files were held against the manifest."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        for name, digest in manifest.items():
            if _digest(checkpoint / name) != digest:
                raise UserError(
                    f"resume_from_checkpoint: {checkpoint}: {name} is damaged; remove this checkpoint."
                )
        return json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"resume_from_checkpoint: {checkpoint} is damaged: {error}; remove it.") from None


def check_identity(checkpoint: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a checkpoint of another model, data set, batch size, seed or schedule."""
    for key, value in now.items():
        if saved.get(key) != value:
            raise UserError(
                f"resume_from_checkpoint: {checkpoint} was made with another {key}: found "
                f"{saved.get(key)!r}, "
                f"this run has {value!r}. Resume with the same, or train anew in another output_dir."
            )


def restore(
    checkpoint: Path, accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any
) -> Progress:
    """Load a checkpoint into the prepared objects; all processes read it. Raises if anything is left over."""
    import torch
    from safetensors.torch import load_model

    load_model(accelerator.unwrap_model(model), str(checkpoint / "model.safetensors"), strict=True)
    state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return Progress(**json.loads((checkpoint / "state.json").read_text())["progress"])


def flush_folder(folder: Path) -> None:
    """Have the disk take every file of a folder, and the folder itself."""
    for path in folder.iterdir():
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    flush(path)


def _digest(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
