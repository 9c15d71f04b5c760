"""What DDP needs to know about a model, and the gradients that the processes exchange without it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ft.shared_gradients import SharedGradients, shared_memory
from ft.trial import evaluated_logits, short_rows
from ft.words import word_embeddings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ft.hosts import HostGroup


def prepare_for_ddp(model: Any, accelerator: Accelerator, hosts: HostGroup) -> Callable[[], object]:
    """Tell DDP what it cannot see of a model by itself; call it before anything is compiled.

    If a trial on short rows leaves weights without a gradient (as in XLNet and ESM), DDP has to search for
    them in each update; otherwise it does not, and fails at the first one. Returns a function that exchanges
    the gradients that are kept from DDP, on CPUs; call it once all gradients of an update are there."""
    if accelerator.is_fsdp2 or not torch.distributed.is_initialized():
        return nothing_to_exchange
    # One process under torchrun on a CPU is wrapped in DDP, too.
    uses_all = uses_all_weights(model)
    accelerator.ddp_handler.find_unused_parameters = not uses_all
    if accelerator.num_processes == 1 or torch.distributed.get_backend() != "gloo":
        return nothing_to_exchange
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    # The smallest is left to DDP, which refuses to have nothing to do.
    weights.pop(min(weights, key=lambda name: weights[name].numel()))
    plain = all(weight.is_contiguous() and weight.dtype == torch.float32 for weight in weights.values())
    if uses_all and plain and weights:
        numbers = sum(weight.numel() for weight in weights.values())
        memory = shared_memory(hosts.num_processes, numbers, hosts)
        if memory is not None:
            keep_from_ddp(model, weights.values())
            return SharedGradients(weights, memory, hosts.rank).exchange
    words = word_embeddings(model)
    table: Any = words.weight if isinstance(words, nn.Embedding) else None
    if not any(weight is table for weight in weights.values()):
        return nothing_to_exchange
    keep_from_ddp(model, [table])
    return partial(exchange_used_rows, table)


def nothing_to_exchange() -> None:
    """For when DDP or FSDP2 does it, or there is one process."""


def uses_all_weights(model: nn.Module) -> bool:
    """Whether the model's output for short rows depends on every trained weight. True if it cannot be
    tried."""
    try:
        logits = evaluated_logits(model, short_rows(model, [0], 0, next(model.parameters()).device))
    except Exception:  # of the model's own code, which may need more than texts; `key_dropout` says so
        return True
    todo, seen, reached = [logits.grad_fn], set(), set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            reached.add(getattr(node, "variable", None))  # set on a node that accumulates a weight's gradient
            todo += [following for following, _ in node.next_functions]
    return all(weight in reached for weight in model.parameters() if weight.requires_grad)


def keep_from_ddp(model: Any, weights: Collection[nn.Parameter]) -> None:
    """Have DDP ignore these weights of a model, and broadcast those of the first process to all, as DDP does
    with its own."""
    kept = {id(weight) for weight in weights}
    names = [name for name, weight in model.named_parameters(remove_duplicate=False) if id(weight) in kept]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    for weight in weights:
        first = weight.detach().contiguous()
        torch.distributed.broadcast(first, 0)
        weight.detach().copy_(first)


def exchange_used_rows(table: nn.Parameter) -> None:
    """Average the gradient of a table that is kept from DDP over the processes, but exchange only those rows
    (rows, width) that some process used: all others are zero. For when `SharedGradients` cannot, as on
    several hosts.

    The table has a row for each token of the data (`ft.words`) or of the vocabulary, and an update uses some
    hundred or thousand of them. Measured (BERT of width 384 with its whole table, which is half of it, in
    turn with exchanging all of that; two processes on one host, before they shared memory): updates are 1.07
    to 1.29 times as fast on short texts.

    Not on a GPU, where the host would have to wait for the number of rows."""
    gradient = table.grad
    if gradient is None:
        return
    # The fastest way to find rows of zeros. Squares underflow for gradients below 1e-23, which have no effect
    # in AdamW beside an eps of 1e-8.
    used = (torch.linalg.vector_norm(gradient, dim=-1) != 0).byte()
    torch.distributed.all_reduce(used, torch.distributed.ReduceOp.MAX)
    rows = used.nonzero().squeeze(1)
    values = gradient[rows]
    torch.distributed.all_reduce(values)
    gradient[rows] = values / torch.distributed.get_world_size()
