"""Parameter groups, optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch

from ft.config import Config
from ft.errors import UserError


def build_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019), fused, without decay of vectors: biases and normalisation
    weights."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,  # on a CPU, too: a seventh of the default's time
    )


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: Config, total_updates: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule over `total_updates` optimizer updates; one step of it is one update."""
    from transformers.optimization import get_scheduler

    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil(config.warmup_ratio * total_updates)
    if warmup > total_updates:
        raise UserError(
            f"warmup_steps: found {warmup}, more than the {total_updates} updates of this run; lower "
            "it or train longer."
        )
    try:
        return get_scheduler(
            config.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=total_updates
        )
    except ValueError as error:  # polynomial ends at 1e-7, below which it cannot start
        raise UserError(
            f"learning_rate: {config.learning_rate:g} with lr_scheduler_type {config.lr_scheduler_type}: "
            f"{error}; raise it, or choose another scheduler."
        ) from None


def set_learning_rate(scheduler: Any) -> None:
    """Give the optimizer the rate of the schedule at its step, where a run goes on with more updates than
    before."""
    inner = scheduler.scheduler  # of Accelerate's wrapper
    rates = [
        base * shape(inner.last_epoch) for base, shape in zip(inner.base_lrs, inner.lr_lambdas, strict=True)
    ]
    for group, rate in zip(inner.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    inner._last_lr = rates
