"""How a launch with FSDP2 shards a model over the processes: Accelerate's plugin, and what that leaves to do.
(Zhao et al., 2023; torch's `fully_shard`.)"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import CPUOffloadPolicy

from ft.errors import UserError
from ft.launch import asked_precision
from ft.layers import repeated_layers

if TYPE_CHECKING:
    from accelerate import Accelerator


class Sharding(FullyShardedDataParallelPlugin):
    """The launch's settings (FSDP_* in the environment), as far as they change only memory and no result."""

    transformer_cls_names_to_wrap: list[str] | None

    def __init__(self) -> None:
        super().__init__()
        found = {
            "fsdp_version": (self.fsdp_version, 2),
            "fsdp_cpu_ram_efficient_loading": (self.cpu_ram_efficient_loading, False),
            "fsdp_offload_params": (isinstance(self.cpu_offload, CPUOffloadPolicy), False),
            "fsdp_activation_checkpointing": (self.activation_checkpointing, False),
            "fsdp_reshard_after_forward": (self.reshard_after_forward, True),  # see `finish_sharding`
            "fsdp_auto_wrap_policy": (
                os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP").upper(),
                "TRANSFORMER_BASED_WRAP",
                "NO_WRAP",
            ),
            "mixed_precision": (asked_precision(), "no", "bf16"),
        }
        for name, (value, *expected) in found.items():
            if value not in expected:
                raise UserError(
                    f"the launch asks for {name}: {value}, expected {' or '.join(map(str, expected))}; "
                    "accelerate_configs/multi_gpu_fsdp2.yaml is a launch that works, and "
                    "--gradient_checkpointing saves more memory."
                )

    def set_auto_wrap_policy(self, model: Any) -> None:
        """Shard the repeated layers one by one, if the launch names none. Accelerate would take
        `_no_split_modules`: those of a BERT contain the embeddings, on which it then fails (seen with 1.15).

        Raises `UserError` for a model that shares a tensor between modules, as BART and T5 do with their
        embeddings: FSDP2 requires these to be sharded together, which Accelerate does not do."""
        places: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            places.setdefault(id(parameter), []).append(name)
        for names in places.values():
            if len(names) > 1:
                raise UserError(
                    f"the launch asks for FSDP, but a {type(model).__name__} has a tensor in several "
                    f"places ({', '.join(names[:3])}) and cannot be sharded; use "
                    "accelerate_configs/multi_gpu_bf16.yaml."
                )
        if self.transformer_cls_names_to_wrap is None:
            layers = {type(layer).__name__ for layer in repeated_layers(model)}
            self.transformer_cls_names_to_wrap = sorted(layers)
        try:
            super().set_auto_wrap_policy(model)
        except ValueError as error:  # a layer that the model does not have
            raise UserError(f"the launch asks for fsdp_transformer_layer_cls_to_wrap: {error}") from None

    def set_mixed_precision(self, *_: Any, **__: Any) -> None:
        """None in FSDP2 itself: autocast handles it (`finish_sharding`), with the results of any other
        launch, and gradients are summed in fp32."""


def shard_over_processes(accelerator: Accelerator, sharding: Sharding) -> None:
    """Have a new Accelerator shard the model that it prepares. On a CPU it would silently keep it whole."""
    state: Any = accelerator.state
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, sharding


def finish_sharding(accelerator: Accelerator, model: Any) -> None:
    """What Accelerate leaves to do after sharding a model."""
    # Otherwise, unsharded parameters outside the layers (the head) would stay after an evaluation, and be
    # reused after their shards have changed.
    model.set_reshard_after_forward(True)
    if accelerator.mixed_precision == "bf16":
        # Its cache would keep a copy of every layer's whole weights until the end of the forward pass.
        torch.set_autocast_cache_enabled(False)
        model.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward)
