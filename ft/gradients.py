"""Gradients of an update: what of them the processes exchange, their norm, and how they are clipped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ft.sharded import DTensor, shard

if TYPE_CHECKING:
    from accelerate import Accelerator


def exchange_met_rows(model: Any, accelerator: Accelerator) -> None:
    """Where gloo joins the processes, let them exchange the gradients of those rows of the word embeddings
    that an update met, not of the whole table, which is half of a BERT of width 384 and two thirds of an
    XLM-R. To be called before the model is wrapped.

    DDP sends a gradient that autograd gives as rows (`nn.Embedding(sparse=True)`) as rows; `clip_in_step`
    makes a table of what comes. Measured (BERT of width 384, two processes on the cores of one host, in turn
    with whole tables): updates are 1.2 times as fast on short texts. NCCL knows no such tensors.

    Only for Transformers' own classes, whose classifiers use the table in no other way: DDP ends a run in
    which such a gradient is a table after all."""
    if not (torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo"):
        return
    words = model.get_input_embeddings()
    if accelerator.is_fsdp2 or not isinstance(words, nn.Embedding) or not words.weight.requires_grad:
        return
    tied = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight is words.weight]
    words.sparse = len(tied) == 1 and type(model).__module__.startswith("transformers.models.")


def clip_in_step(
    optimizer: Any, parameters: Iterable[torch.nn.Parameter], max_norm: float | None
) -> torch.Tensor:
    """Have the next step of a prepared, fused optimizer scale the gradients to a norm of at most `max_norm`,
    all together, and change nothing if that norm is not finite. Returns the norm, on the device.

    torch's fused optimizers read both for `torch.amp.GradScaler`: `grad_scale`, by which they divide what
    they load in any case (1.02 times the updates on short texts, on a CPU, against scaling before), and
    `found_inf`, with which they skip a step, so that the host need not wait to know. In fp16 the scaler finds
    that out itself."""
    gradients = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.is_sparse:
            # AdamW moves the rows that were not met, too: by their moments and the decay.
            gradient, parameter.grad = gradient.coalesce().values(), gradient.to_dense()
        if gradient is not None:
            gradients.append(gradient)
    norm = total_norm(gradients)
    plain = optimizer.optimizer
    plain.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1) if max_norm else None
    if optimizer.scaler is None:
        plain.found_inf = norm.isfinite().logical_not().float()
    return norm


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all gradients together, right to the last digits of fp32; where processes hold shards of
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
