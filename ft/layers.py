"""The parts of a pretrained model that training treats differently: head, layers, and what is below them;
freezing by pattern."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ft.errors import UserError


def head_names(model: Any) -> set[str]:
    """The parameters of the head: what the task has put on top of the pretrained model. Raises `UserError`
    for a model whose code does not say which part is which."""
    stem, names = f"{model.base_model_prefix}.", [name for name, _ in model.named_parameters()]
    head = {name for name in names if not name.startswith(stem)}
    if not 0 < len(head) < len(names):
        raise UserError(
            f"model_name_or_path: the head of a {type(model).__name__} cannot be told from its pretrained "
            "part, so head_learning_rate, layerwise_lr_decay and lora_rank are not for it; leave them out."
        )
    return head


def depths(model: Any) -> dict[str, int]:
    """How many layers below the top each parameter is: 0 in the top layer, in what comes after it and in the
    head; the number of layers in the embeddings and everything else that comes before the layers.

    Raises `UserError` for a model that does not have exactly one list of layers, but several (an encoder and
    a decoder) or a single layer that is used repeatedly (ALBERT)."""
    count = int(getattr(model.config, "num_hidden_layers", 0))
    lists = (name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    stacks = [name for name in lists if len(model.get_submodule(name)) == count]
    stacks = [name for name in stacks if not any(name.startswith(f"{outer}.") for outer in stacks)]
    if len(stacks) != 1 or model.config.is_encoder_decoder:
        several = f"several lists of layers ({', '.join(stacks)}, ...)" if stacks else "no list of its layers"
        raise UserError(
            f"layerwise_lr_decay: a {type(model).__name__} has {several}, so which layer is below which "
            f"cannot be told; expected one list of {count}. Leave it out for this model."
        )
    stem, head = f"{stacks[0]}.", head_names(model)
    tables = {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        for own, _ in module.named_parameters()
    }
    found: dict[str, int] = {}
    below = True
    for name, _ in model.named_parameters():
        if name.startswith(stem):
            below = False
            found[name] = count - 1 - int(name.removeprefix(stem).partition(".")[0])
        else:  # positions that all layers share (DeBERTa) are registered after them, a pooler maybe before
            is_below = (below and ".pooler." not in name) or name in tables
            found[name] = count if name not in head and is_below else 0
    return found


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Exclude from training the parameters whose names match one of the patterns.

    A pattern is shell-style (*, ?, [0-3]) and matches whole dot-separated parts of a name: `encoder.layer.1`
    is layer 1, not 10. Raises `UserError` for one that matches nothing, and if nothing is left to train."""
    runs = {name: _runs(name) for name, _ in model.named_parameters()}
    for pattern in patterns:
        matched = [name for name, parts in runs.items() if any(fnmatchcase(part, pattern) for part in parts)]
        if not matched:
            known = list(dict.fromkeys(part for parts in runs.values() for part in parts))
            near = difflib.get_close_matches(pattern, known, n=3)
            tops = dict.fromkeys(".".join(name.split(".")[:2]) for name in runs)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(tops)}."
            raise UserError(f"freeze: {pattern!r} matches no parameter of the {type(model).__name__}; {hint}")
        for name in matched:
            model.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"freeze: {', '.join(patterns)} matches every parameter, so nothing is left to train; "
            "leave the head out of it."
        )


def _runs(name: str) -> list[str]:
    """All runs of whole parts of a dotted name: "a.b" gives a, a.b and b."""
    parts = name.split(".")
    places = range(len(parts))
    return [".".join(parts[begin : end + 1]) for begin in places for end in places if end >= begin]


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model's lists of layers of one class, except lists inside them."""
    outermost: list[nn.ModuleList] = []
    for layers in model.modules():
        if not isinstance(layers, nn.ModuleList) or len({type(layer).__name__ for layer in layers}) != 1:
            continue
        if len(layers) > 1 and not any(layers is part for outer in outermost for part in outer.modules()):
            outermost.append(layers)
    return [layer for layers in outermost for layer in layers]


def compile_layers(model: nn.Module) -> None:
    """Compile a model's layers with torch, one program per list of layers, at their first use; the whole
    model if no layer is repeated. 1.55 times as fast in bf16 on an H100.

    A program for one layer compiles faster than one for all of them, and between the layers DDP sends the
    gradients that are ready, so that torch need not cut programs into DDP's buckets. Without a mask, a layer
    would need a second program."""
    layers = repeated_layers(model)
    torch._dynamo.config.optimize_ddp = not layers
    for layer in layers or [model]:
        layer.compile(dynamic=True)
    always_mask(model)


def always_mask(model: nn.Module) -> None:
    """Give a model an all-ones mask if a batch comes without one because nothing in it is padded."""
    model.register_forward_pre_hook(_with_mask, with_kwargs=True)


def _with_mask(model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, ...]:
    if "input_ids" in inputs and "attention_mask" not in inputs:
        inputs = inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}
    return args, inputs
