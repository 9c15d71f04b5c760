"""What DDP is told of a model, and the gradients that the processes exchange beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ft.trial import evaluated_logits, short_rows
from ft.words import word_embeddings

if TYPE_CHECKING:
    from accelerate import Accelerator


def prepare_for_ddp(model: Any, accelerator: Accelerator) -> nn.Parameter | None:
    """Tell DDP what of a model it cannot see by itself; to be called before anything is compiled.

    Where a trial on short rows leaves weights without a gradient (XLNet and ESM have such), DDP has to search
    for them in each update; else it does not, and stops at the first. Returns the table whose gradient is
    left to `exchange_met_rows`, if any."""
    if accelerator.is_fsdp2 or not torch.distributed.is_initialized():
        return None
    # One process under torchrun on a CPU is wrapped in DDP, too.
    accelerator.ddp_handler.find_unused_parameters = not uses_all_weights(model)
    return keep_from_ddp(model) if accelerator.num_processes > 1 else None


def uses_all_weights(model: nn.Module) -> bool:
    """Whether what a model gives for short rows depends on every weight that is trained. True where it cannot
    be tried."""
    try:
        logits = evaluated_logits(model, short_rows(model, [0], 0, next(model.parameters()).device))
    except Exception:  # of the model's own code, which may want more than texts; `key_dropout` says so
        return True
    todo, seen, reached = [logits.grad_fn], set(), set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            reached.add(getattr(node, "variable", None))  # which a node has that gathers a weight's gradient
            todo += [following for following, _ in node.next_functions]
    return all(weight in reached for weight in model.parameters() if weight.requires_grad)


def keep_from_ddp(model: Any) -> nn.Parameter | None:
    """The table of the word embeddings, whose gradient DDP is told to leave alone; None where it is not
    trained, and where it is not gloo that joins the processes."""
    words = word_embeddings(model)
    if torch.distributed.get_backend() != "gloo" or not isinstance(words, nn.Embedding):
        return None
    table = words.weight
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not isinstance(table, nn.Parameter) or not table.requires_grad or len(trained) == 1:
        return None  # DDP refuses to have nothing to do
    names = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight is table]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    torch.distributed.broadcast(table.detach(), 0)  # as DDP begins with what it takes
    return table


def exchange_met_rows(table: nn.Parameter | None) -> None:
    """Give the gradient of a table that `keep_from_ddp` returned its mean over the processes, as DDP does,
    but exchange only those rows (rows, width) that a process met: all others are zero.

    The table has a row for each token of the data (`ft.words`) or of the vocabulary, and an update meets some
    hundred or thousand of them. Measured (BERT of width 384, two processes on the cores of one host, the
    vocabulary's table, which is half of the model, in turn with exchanging all of it): updates are 1.07 to
    1.29 times as fast on short texts. Not on a GPU, where the host would have to wait for the number of
    rows."""
    if table is None or table.grad is None:
        return
    gradient = table.grad
    # The fastest way to find rows of zeros. Squares vanish where a gradient is below 1e-23, where AdamW makes
    # nothing of it, beside an eps of 1e-8.
    met = (torch.linalg.vector_norm(gradient, dim=-1) != 0).byte()
    torch.distributed.all_reduce(met, torch.distributed.ReduceOp.MAX)
    rows = met.nonzero().squeeze(1)
    values = gradient[rows]
    torch.distributed.all_reduce(values)
    gradient[rows] = values / torch.distributed.get_world_size()
