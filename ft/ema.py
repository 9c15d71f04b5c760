"""An exponential moving average of the trained weights, which replaces them in evaluations and exports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

AVERAGE = "average"  # beside AdamW's moments, so that checkpoints hold it and resuming restores it


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Have every AdamW step update the average of each trained parameter, in fp32.

    It starts as the weight after the first step; after step n it is `d * average + (1 - d) * weight` with d =
    min(decay, (1 + n) / (10 + n)), so that a short run does not average over its start, when the head is
    random (like TensorFlow's ExponentialMovingAverage with num_updates); n counts the steps that took
    effect."""
    optimizer.register_step_post_hook(partial(_update, decay))


@torch.no_grad()
def _update(decay: float, optimizer: torch.optim.Optimizer, *_: Any) -> None:
    begun = {parameter: state for parameter, state in optimizer.state.items() if AVERAGE in state}
    for parameter, state in optimizer.state.items():
        if AVERAGE not in state:
            state[AVERAGE] = parameter.detach().clone()
    if not begun:
        return
    # On the device, like all of this: the host does not wait. A parameter may sometimes get no gradient.
    step = torch.stack([state["step"] for state in begun.values()]).max()
    # Averages that began with a step without effect do not count yet.
    weight = 1 - ((1 + step) / (10 + step)).clamp(max=decay) * (step > 1)
    if getattr(optimizer, "found_inf", None) is not None:  # a step that changed nothing
        weight = weight * (1 - optimizer.found_inf)  # type: ignore[attr-defined]
    for parameter, state in begun.items():
        state[AVERAGE].lerp_(parameter, weight)


@contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """Inside this context, the weights are their averages; without averages, they stay as they are. Weights
    that are loaded inside become the average."""
    _swap(optimizer)
    try:
        yield
    finally:
        _swap(optimizer)


@torch.no_grad()
def _swap(optimizer: Any) -> None:
    for parameter, state in optimizer.state.items():
        if AVERAGE in state:
            trained = parameter.detach().clone()
            parameter.copy_(state[AVERAGE])
            state[AVERAGE].copy_(trained)
