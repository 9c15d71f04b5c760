"""Tests, on short rows and before training, whether a model's output for a row depends on that row alone."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from ft.attention import install_attention, install_masks
from ft.dropout import ROWLESS, UNKEYED, RowKeys, install
from ft.errors import UserError, first_line
from ft.model import checkpoint_activations
from ft.trial import PADDING, ROWS, logits_of, short_rows

TOLERANCE = 1e-4  # relative; what rounding does is far below, what padding or neighbours do is far above


def key_dropout(
    model: nn.Module, mode: str, seed: int, compiled_length: int | None = None
) -> tuple[RowKeys, list[str]]:
    """Install what `dropout_mode` asks for, and mask functions that do not read the mask, before the model is
    moved or wrapped. `compiled_length` is the longest text, in tokens, that a compiled model will see.

    Returns the keys to set, and a line for each place that makes a row's output depend on more than the row;
    with torch's own dropout the keys exist, but nothing reads them. Raises `UserError` for a dropout that
    keeps nothing."""
    install_masks(model, is_compiled=compiled_length is not None)
    if mode == "torch":
        return RowKeys(seed), ["all dropout is torch's (dropout_mode: torch)"]
    rows = RowKeys(seed)
    names = install_attention(model, rows, compiled_length) | install(model, rows)
    notes = find_rows(model, rows, names, compiled_length)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        checkpoint_activations(model, context_fn=rows.recomputed)
    return rows, notes


def find_rows(
    model: nn.Module, rows: RowKeys, names: dict[int, str], compiled_length: int | None = None
) -> list[str]:
    """Learn by trials which axis of each dropout's input holds the rows, and report what is not a function of
    the row alone.

    Three rows are tried alone, and once more in another order, padded, and beside a fourth. `names` are those
    of the layers with dropout."""
    few, more = list(range(ROWS)), list(range(ROWS, -1, -1))
    try:
        trials = [_Trial(model, rows, few, 0), _Trial(model, rows, more, PADDING)]
        for place in rows.places:
            shapes, others = (trial.shapes[place] for trial in trials)
            for use in shapes.keys() & others.keys():
                axis = place.axes[use] = _row_axis(shapes[use], others[use])
                if compiled_length is not None and axis != UNKEYED:
                    sizes = zip(shapes[use], others[use], strict=True)
                    grown = [compiled_length + 1 if size != other else size for size, other in sizes]
                    rows.reserve(grown if axis == ROWLESS else grown[:axis] + grown[axis + 1 :])
        if any(axis != 0 for place in rows.places for axis in place.axes.values()):
            trials = [_Trial(model, rows, few, 0), _Trial(model, rows, more, PADDING)]
        alone, beside = trials[0].outputs, trials[1].outputs[[more.index(row) for row in few]]
        apart = float((alone - beside).abs().max() / alone.abs().max().clamp_min(1e-12))
    except UserError:  # of a dropout
        raise
    except Exception as error:  # of the model's own code, which may need more than texts
        return [f"the model could not be tried on short rows ({first_line(error)})"]
    unkeyed = sorted(place.layer for place in rows.places if UNKEYED in place.axes.values())
    if unkeyed:
        where = _paths([names[layer] for layer in unkeyed])
        return [f"the input of the dropout in {where} has no row dimension"]
    drawing = [*trials[0].drawing, *trials[1].drawing]
    if drawing:
        return [f"random numbers are drawn, not keyed by row, in {_paths(drawing)}"]
    if not apart <= TOLERANCE:
        return [
            f"the model's output for a row changes with padding or with the rows beside it, by {apart:.0e}"
        ]
    return []


def _row_axis(few: tuple[int, ...], more: tuple[int, ...]) -> int:
    """The dimension that grew with the rows from one trial to the other."""
    if few == more:
        return ROWLESS
    grown = [axis for axis, sizes in enumerate(zip(few, more, strict=True)) if sizes == (ROWS, ROWS + 1)]
    return grown[0] if grown else UNKEYED


def _paths(paths: list[str]) -> str:
    """Names of modules, those that differ in a number only once."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", path) for path in paths))


class _Trial(TorchDispatchMode):
    """One training pass over short rows: outputs (rows, ...), the shapes of the dropouts' inputs, and the
    modules that drew random numbers."""

    def __init__(self, model: nn.Module, rows: RowKeys, row_ids: list[int], padding: int) -> None:
        super().__init__()
        self.drawing: list[str] = []
        self.tracker = ModuleTracker()
        device = next(model.parameters()).device
        rows.set(0, torch.tensor(row_ids, device=device))
        for place in rows.places:
            place.shapes.clear()
        was_training = model.training
        model.train()
        try:
            with torch.no_grad(), self.tracker, self:
                self.outputs = logits_of(model, short_rows(model, row_ids, padding, device))
        finally:
            model.train(was_training)
        self.shapes = {place: dict(place.shapes) for place in rows.places}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        before = torch.get_rng_state()  # attention without dropout has the tag, but draws nothing
        result = func(*args, **(kwargs or {}))
        if not torch.equal(before, torch.get_rng_state()):
            path = max(self.tracker.parents, key=len)
            self.drawing.append(path.partition(".")[2] or path)  # without the model's own class
        return result
