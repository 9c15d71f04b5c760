"""Atomic checkpoints: progress, copy, write, find, restore, retention."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from ft import durable
from ft.errors import UserError
from ft.health import Health
from ft.sharded import cut, distinct, fill, host_copy, is_sharded

if TYPE_CHECKING:
    from accelerate import Accelerator


FILES = ("model.safetensors", "optimizer.pt", "state.json")
# What the fingerprint of the data covers.
OF_DATA = " files, tokenizer (and version of its library) and options of the data, see --help"


def is_defined(value: float | None) -> TypeGuard[float]:
    """Whether a metric has a value on the rows it was computed on."""
    return value is not None and not math.isnan(value)


@dataclass
class Progress:
    """Where a run stands: everything besides weights and optimizer that decides how it continues.

    `step` counts optimizer updates and is the position in the plan. The `log_*` fields sum what was not
    logged yet."""

    step: int = 0
    best_metric: float | None = None
    best_step: int = 0
    best_values: dict[str, Any] = field(default_factory=dict)  # the numbers of its evaluation
    best_weights: str = ""  # a sample of them, which identifies best/; on the main process
    best_calibration: dict[str, Any] = field(default_factory=dict)  # the task's, at the best step
    evaluations_without_gain: int = 0
    patience_metric: float | None = None
    train_seconds: float = 0.0  # of all starts, up to the last checkpoint
    log_loss: float = 0.0
    log_weight: float = 0.0
    metrics_rows: int = 0  # of metrics.jsonl; later ones are written again
    evaluation_due: bool = False  # the run was stopped in the middle of one
    evaluated_step: int = 0  # that of the last one
    precision: str = ""  # of the launch, in Accelerate's words
    total_seconds: float = 0.0  # of all starts, including what is not training, up to the last checkpoint
    earlier_totals: list[list[int]] = field(default_factory=list)  # [step, planned updates]
    health: Health = field(default_factory=Health)

    def weigh(self, value: float | None, sign: int, threshold: float) -> bool:
        """Take the metric of an evaluation at this step: count patience, which requires an improvement of
        more than `threshold`, and return whether it is the best so far.

        `sign` is 1 if higher is better, else -1; None and NaN are never better, and cost no patience before
        there was a number to beat."""

        def beats(other: float | None, by: float) -> bool:
            return is_defined(value) and (other is None or sign * (value - other) > by)

        is_best = beats(self.best_metric, 0)
        if is_best:
            self.best_step, self.best_metric = self.step, value
        self.evaluations_without_gain += self.patience_metric is not None
        if beats(self.patience_metric, threshold):
            self.patience_metric, self.evaluations_without_gain = value, 0
        return is_best


def snapshot(accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """A copy, in host memory, of all tensors of a checkpoint: the loop waits for nothing else. Called on all
    processes; only the main one gets it."""
    if not (accelerator.is_main_process or is_sharded(model)):
        return {}
    state = {
        "model": distinct(accelerator.unwrap_model(model)),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler.state_dict()
    return host_copy(state, accelerator.is_main_process)


def write_checkpoint(
    folder: Path, state: dict[str, Any], progress: dict[str, Any], identity: dict[str, Any],
    total_updates: int, limit: int | None,
) -> None:  # fmt: skip
    """Write `folder`/step-N under a temporary name, flush it, rename it, point `latest` at it, then remove
    old ones.

    A failed write leaves the earlier checkpoints untouched. The `limit` newest are kept, and that of the best
    step."""
    import torch
    from safetensors.torch import save_file

    target = folder / f"step-{progress['step']:08d}"
    temporary = folder / f".{target.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(state["model"], temporary / "model.safetensors", metadata={"format": "pt"})
        torch.save({k: v for k, v in state.items() if k != "model"}, temporary / "optimizer.pt")
        about = {"progress": progress, "total_updates": total_updates, "identity": identity}
        durable.write_flushed(temporary / "state.json", json.dumps(about, indent=1))
        durable.write_manifest(temporary)
        durable.replace_folder(temporary, target)
    except Exception as error:
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
        shutil.rmtree(temporary, ignore_errors=True)
        # torch does not say why its file could not be written.
        raise OSError(f"{error} ({free / 1e6:,.1f} MB were free on the disk)") from error
    settle(target, progress["best_step"], limit)


def settle(newest: Path, best_step: int, limit: int | None) -> None:
    """Point `latest` at a complete checkpoint, and remove old ones and what a crash left in their folder."""
    folder = newest.parent
    _clear_hidden(folder)  # first: it may have filled the disk
    durable.replace_file(folder / "latest", newest.name + "\n")
    durable.flush(folder)
    old = checkpoints_in(folder)[: -limit if limit is not None else 0]
    kept = (newest, folder / f"step-{best_step:08d}")
    for path in old:
        if path not in kept:
            _rename(path, f".{path.name}.old")  # so that a half-removed one does not keep its name
    _clear_hidden(folder)


def _clear_hidden(folder: Path) -> None:
    """Remove unfinished checkpoints and those being removed."""
    for path in folder.glob(".step-*"):
        if path.suffix in (".tmp", ".old") and _is_name(path.stem[1:]):
            shutil.rmtree(path, ignore_errors=True)


def checkpoints_in(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first. Copies that a user made under other names do not count."""
    found = [path for path in folder.glob("step-*") if _is_name(path.name) and path.is_dir()]
    return sorted(found, key=_step_of)


def set_aside_later(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after update `step`, so that "latest" does not find them: a run that resumes
    before them leaves their trajectory. Returns where they are."""
    later = [path for path in checkpoints_in(folder) if _step_of(path) > step]
    return [_rename(path, f"superseded-{path.name}") for path in reversed(later)]


def _step_of(path: Path) -> int:
    return int(path.name[len("step-") :])


def _is_name(name: str) -> bool:
    number = name.removeprefix("step-")
    return number.isdecimal() and name == f"step-{int(number):08d}"


def _rename(path: Path, name: str) -> Path:
    """Rename a folder within its parent, replacing an older one of that name. Does nothing if it cannot be
    written."""
    place = path.with_name(name)
    with contextlib.suppress(OSError):
        shutil.rmtree(place, ignore_errors=True)
        path.rename(place)
    return place


def find_checkpoint(wanted: str | None, folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume_from_checkpoint` names, and warnings; "latest" is the newest complete one
    in `folder`, if any. A damaged one is skipped in favour of the one before, and renamed to
    damaged-step-N."""
    if wanted is None:
        return None, []
    if wanted != "latest":
        path = Path(wanted)
        if path.name == "latest" and path.is_file():
            path = path.parent / path.read_text(encoding="utf-8").strip()
        inside = path if path.name == "checkpoints" else path / "checkpoints"  # of another run's output_dir
        if inside.is_dir():
            path = next(reversed(checkpoints_in(inside)), path)
        if not path.exists():
            raise UserError(
                f"resume_from_checkpoint: {wanted!r} does not exist; expected a folder such as "
                f"{folder / 'step-00000500'}, or latest."
            )
        if damage := _damage_of(path):
            raise UserError(
                f"resume_from_checkpoint: {wanted!r} is not an intact checkpoint: {damage}; "
                f"expected one such as {folder / 'step-00000500'}, or latest."
            )
        return path, []
    warnings: list[str] = []
    for path in folder.glob(".step-*.old"):
        # Intact: the run was killed while another of its step replaced it. (Or it will be removed again.)
        name = path.stem[1:]
        if _is_name(name) and not (folder / name).exists() and not _damage_of(path):
            _rename(path, name)
    for path in reversed(checkpoints_in(folder)):
        damage = _damage_of(path)
        if not damage:
            return path, warnings
        warnings.append(f"the checkpoint {path.name} is damaged ({damage}): skipped")
        aside = _rename(path, f"damaged-{path.name}")
        if aside.exists():  # in a read-only folder, it is skipped again
            warnings[-1] += f", kept as {aside.name}"
    return None, warnings


def _damage_of(checkpoint: Path) -> str:
    """`find_damage`; what cannot be read at present is not damage: a network disk may be unavailable."""
    try:
        return durable.find_damage(checkpoint, *FILES)
    except OSError as error:
        raise UserError(
            f"resume_from_checkpoint: {error.filename or checkpoint} cannot be read: {error.strerror}. Start "
            "again when it can, or move the checkpoint away."
        ) from None


def is_own(checkpoint: Path | None, folder: Path) -> bool:
    """Whether a checkpoint, as returned by `check_output_dir`, was made by a run in its own folder."""
    return checkpoint is not None and checkpoint.parent == folder


def mark(folder: Path) -> str:
    """Identifies a checkpoint, to check that every host sees the same one; "nothing" on a host that does not
    see it."""
    path = folder / "manifest.json"
    return durable.digest(path)["sha256"] if path.exists() else "nothing"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a complete checkpoint: progress, total_updates and identity."""
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def check_identity(checkpoint: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a checkpoint of another model, data set, batch size, seed or schedule."""
    for key, value in now.items():
        if saved.get(key) != value:
            covered = OF_DATA if key == "data" else ""
            raise UserError(
                f"resume_from_checkpoint: {checkpoint} was made with another {key}: found "
                f"{saved.get(key)!r}, this run has {value!r}. Resume with the same{covered}, or train anew "
                "in another output_dir."
            )


def restore(checkpoint: Path, accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any) -> None:
    """Load a checkpoint into the prepared objects; all processes read it. Raises if anything is left over."""
    import torch
    from safetensors.torch import load_file

    own = distinct(accelerator.unwrap_model(model))
    saved = load_file(checkpoint / "model.safetensors")
    if {name: value.shape for name, value in saved.items()} != {name: t.shape for name, t in own.items()}:
        raise RuntimeError(f"{checkpoint}: its tensors are not those of this model")
    for name, value in saved.items():
        fill(own[name], value)
    # If sharded, every process of a host reads it: memory-mapped, it is in memory once.
    state = torch.load(
        checkpoint / "optimizer.pt", map_location="cpu", weights_only=True, mmap=accelerator.is_fsdp2
    )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        of_it = state["optimizer"]["state"].get(number, {})
        for key, value in of_it.items():
            if value.shape == parameter.shape:  # not its step count
                of_it[key] = cut(value, parameter)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    if accelerator.scaler is not None and "scaler" in state:
        accelerator.scaler.load_state_dict(state["scaler"])
