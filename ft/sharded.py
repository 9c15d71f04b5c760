"""Tensors of a model that is sharded over the processes (FSDP2): gathering whole ones, and back.

Tensors of any other model pass unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether the processes hold shards of the model's parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def class_name(model: torch.nn.Module) -> str:
    """The name of a model's class; a sharded model has a class of its own."""
    return type(model).__name__.removeprefix("FSDP" if is_sharded(model) else "")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor; to be called by all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor: the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every process has, sharded `like` another of its shape."""
    if not isinstance(like, DTensor):
        return value
    mesh = like.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def fill(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole tensor of the same shape, which every process has, into a tensor."""
    shard(tensor).copy_(shard(cut(value, tensor)))


def distinct(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model's state dict without duplicate names of shared ones, which safetensors refuses;
    the names are the same on all processes."""
    seen, kept = set(), {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        same: object = id(tensor)
        if not isinstance(tensor, DTensor):  # of one in shards, a process may hold nothing
            same = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or same not in seen:
            kept[name] = tensor
            seen.add(same)
    return kept


def host_copy(value: Any, keep: bool) -> Any:
    """A copy of all tensors in nested dicts and lists, whole and in host memory, if `keep` says so; to be
    called by all processes if they hold shards."""
    if isinstance(value, torch.Tensor):
        value = whole(value.detach())
        return value.to("cpu", copy=True, memory_format=torch.contiguous_format) if keep else None
    if isinstance(value, dict):
        return {key: host_copy(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [host_copy(item, keep) for item in value]
    return value


def whole_state(model: torch.nn.Module, keep: bool) -> dict[str, Any]:
    """The state dict of a model; for a sharded one, a copy of it as made by `host_copy`."""
    state = model.state_dict()
    return host_copy(state, keep) if is_sharded(model) else state
