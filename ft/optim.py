"""Parameter groups, optimizer and learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LRScheduler

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
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,  # on a CPU, too: a seventh of the default's time
    )
    # With fp16, GradScaler then leaves the call out where a gradient overflowed, by which alone Accelerate
    # knows that the step was skipped (ft.attempts takes the update again).
    optimizer._step_supports_amp_scaling = False
    return optimizer


class Schedule(LRScheduler):
    """Learning rates by the number of updates that took effect: `rates[n]` is that of the one after n.

    The fused optimizer counts them, on the device, and leaves out those that it was told to skip (see
    `ft.health`). The rate is read there, too, as a tensor: a skipped update moves no schedule, and the host
    never waits to know. `step` looks where the optimizer stands, so that there is no state to save."""

    def __init__(self, optimizer: torch.optim.Optimizer, rates: list[float]) -> None:
        self.rates = torch.tensor(rates, dtype=torch.float64)
        super().__init__(optimizer)

    def step(self, epoch: int | None = None) -> None:
        """Give the optimizer the rate of its next update."""
        counts = [state["step"] for state in self.optimizer.state.values()]
        rate: float | torch.Tensor = float(self.rates[0])
        if counts:
            done = torch.stack(counts).max()  # a parameter may have got no gradient now and then
            if self.rates.device != done.device:
                # The kernels of a device take the rate in 32 bits.
                self.rates = self.rates.to(torch.float32).to(done.device)
            rate = self.rates.take(done.long().clamp(max=len(self.rates) - 1))
        self._last_lr = [rate] * len(self.optimizer.param_groups)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def state_dict(self) -> dict[str, object]:
        """Nothing: it follows from the optimizer's state and the config."""
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Take the rate of where the optimizer stands, which was restored before."""
        self.step()


def build_scheduler(optimizer: torch.optim.Optimizer, config: Config, total_updates: int) -> Schedule:
    """The schedule over `total_updates` optimizer updates; one step of it is one update that took effect."""
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
        shapes = get_scheduler(
            config.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=total_updates
        )
    except ValueError as error:  # polynomial ends at 1e-7, below which it cannot start
        raise UserError(
            f"learning_rate: {config.learning_rate:g} with lr_scheduler_type {config.lr_scheduler_type}: "
            f"{error}; raise it, or choose another scheduler."
        ) from None
    (shape, *_) = shapes.lr_lambdas  # the same for every group
    return Schedule(optimizer, [config.learning_rate * shape(n) for n in range(total_updates + 1)])
