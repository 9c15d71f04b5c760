"""Parameter groups, optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from ft.config import Config
from ft.ema import keep_average
from ft.errors import UserError
from ft.layers import depths, head_names
from ft.sharded import DTensor, shard

MOST_UPDATES = 10_000_000  # of a run: the schedule holds a number for each


def build_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019), fused, which also keeps an average of the weights if `ema_decay`
    is set."""
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,  # on a CPU, too: a seventh of the default's time
    )
    # With fp16, GradScaler then omits the call if a gradient overflowed, which is the only way Accelerate
    # knows that the step was skipped (ft.attempts retries the update). It asks the device for that: only in
    # fp16, the host waits once per update.
    optimizer._step_supports_amp_scaling = False
    if config.ema_decay is not None:
        keep_average(optimizer, config.ema_decay)
    return optimizer


def parameter_groups(model: torch.nn.Module, config: Config) -> list[dict[str, Any]]:
    """The trained parameters grouped by learning rate and weight decay. Vectors (biases and normalisation
    weights) are exempt from decay. The first group has `learning_rate`.

    A layer's rate is that of the one above it times `layerwise_lr_decay` (as in Sun et al., 2019); the head's
    is `head_learning_rate`, if set. The "name" of a group says which parts have its rate: head, layer_3,
    embeddings or, if all layers have the same, pretrained; several are joined, as in head_and_layer_3. Raises
    `UserError` if `freeze` leaves nothing for a rate."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    rates = dict.fromkeys(trained, config.learning_rate)
    parts = dict.fromkeys(trained, "pretrained")
    if config.layerwise_lr_decay < 1:
        below = depths(model)
        rates = {name: rate * config.layerwise_lr_decay ** below[name] for name, rate in rates.items()}
        model_config: Any = model.config
        top = model_config.num_hidden_layers - 1
        parts = {
            name: f"layer_{top - below[name]}" if below[name] <= top else "embeddings" for name in trained
        }
        parts |= dict.fromkeys(head_names(model) & trained.keys(), "head")
        if not any(below[name] for name in trained):
            raise UserError("layerwise_lr_decay: freeze leaves no layer below the top one to train; drop it.")
    if config.head_learning_rate is not None:
        head = head_names(model) & trained.keys()
        if not head:
            raise UserError("head_learning_rate: freeze leaves no parameter of the head to train; drop it.")
        rates |= dict.fromkeys(head, config.head_learning_rate)
        parts |= dict.fromkeys(head, "head")
    groups: list[dict[str, Any]] = []
    for rate in dict.fromkeys([config.learning_rate, *rates.values()]):
        here = [parameter for name, parameter in trained.items() if rates[name] == rate]
        name = "_and_".join(sorted({parts[name] for name in trained if rates[name] == rate}))
        matrices, vectors = [p for p in here if p.ndim > 1], [p for p in here if p.ndim <= 1]
        for params, decay in ((matrices, config.weight_decay), (vectors, 0.0)):
            if params or not groups:
                groups.append({"params": params, "weight_decay": decay, "lr": rate, "name": name})
    return groups


def clip_in_step(optimizer: Any, parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Have the next step of a prepared, fused optimizer clip the norm of all gradients together to `max_norm`
    (0 for no clipping), and change nothing if that norm is not finite. Returns the norm, on the device.

    torch's fused optimizers read both for `torch.amp.GradScaler`: `grad_scale`, by which they divide what
    they load in any case (1.02 times the updates on short texts, on a CPU, compared with scaling before), and
    `found_inf`, with which they skip a step, so that the host need not wait to know. In fp16 the scaler finds
    that out itself."""
    norm = total_norm([p.grad for p in parameters if p.grad is not None])
    plain = optimizer.optimizer
    plain.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1) if max_norm else None
    if optimizer.scaler is None:
        plain.found_inf = norm.isfinite().logical_not().float()
    return norm


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all gradients together, accurate to the last digits of fp32; if processes hold shards of
    them, to be called by all."""
    in_shards = any(isinstance(gradient, DTensor) for gradient in gradients)
    gradients = [shard(gradient) for gradient in gradients]
    if gradients and gradients[0].device.type == "cpu":
        # Row by row: over a whole table at once, torch 2.13 adds so many squares to one sum that the norm is
        # off by up to 2e-4, which varies with the threads; with two threads, it takes 1.5 times as long, too.
        gradients = [torch.linalg.vector_norm(gradient, dim=-1) for gradient in gradients]
    norm = torch.nn.utils.get_total_norm(gradients)
    if in_shards:
        torch.distributed.all_reduce(norm.square_())
        norm.sqrt_()
    return norm


class Schedule(LRScheduler):
    """Learning rates by the number of updates that took effect: for each group, its initial rate times
    `shape[n]` after n of them.

    The fused optimizer counts these on the device, leaving out those that it was told to skip. The rate is
    read there, too, as a tensor: a skipped update does not advance the schedule, and the host never waits to
    know. `step` reads the optimizer's count, so that there is no state to save."""

    def __init__(self, optimizer: torch.optim.Optimizer, shape: list[float]) -> None:
        self.first, self.shape = shape[0], torch.tensor(shape, dtype=torch.float64)
        super().__init__(optimizer)

    def step(self, epoch: int | None = None) -> None:
        """Set the optimizer's rate for its next update."""
        counts = [state["step"] for state in self.optimizer.state.values()]
        factor: float | torch.Tensor = self.first
        if counts:
            done = torch.stack(counts).max()  # a parameter may sometimes have got no gradient
            if self.shape.device != done.device:
                # A device's kernels take the rate in 32 bits.
                self.shape = self.shape.to(torch.float32).to(done.device)
            factor = self.shape.take(done.long().clamp(max=len(self.shape) - 1))
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, object]:
        """Nothing: it follows from the optimizer's state and the config."""
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Set the rate from the optimizer's state, which was restored before."""
        self.step()


def build_scheduler(optimizer: torch.optim.Optimizer, config: Config, total_updates: int) -> Schedule:
    """The schedule over `total_updates` optimizer updates; one step of it is one update that took effect.
    Raises `UserError` for too many of them, and for more of warm-up than there are."""
    from transformers.optimization import get_scheduler

    if total_updates > MOST_UPDATES:
        raise UserError(
            f"max_train_steps: {total_updates:,} updates are more than the {MOST_UPDATES:,} that a schedule "
            "can have; lower it, or num_train_epochs. (max_time ends a run earlier.)"
        )
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil(round(config.warmup_ratio * total_updates, 6))  # 0.07 * 100 is more than 7
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
    return Schedule(optimizer, [shape(n) for n in range(total_updates + 1)])
