"""LoRA through `peft`: small matrices beside frozen weights; exported merged, and as an adapter for peft."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ft.durable import flush
from ft.errors import UserError, first_line
from ft.layers import head_names
from ft.values import is_installed

if TYPE_CHECKING:
    from ft.config import Config

NAME = "default"  # of the adapter in the model; peft leaves it out in files
STEM = "base_model.model."  # which peft's own wrapper puts before every name
TASK_TYPES = {"text-classification": "SEQ_CLS"}  # peft's word for what the Hub calls it
ALL_LINEAR = "all-linear"


def check_peft() -> None:
    """Raises `UserError` if peft is not installed."""
    if not is_installed("peft"):
        raise UserError("lora_rank: peft is not installed; pip install '.[peft]', or leave it out.")


def add_lora(model: Any, options: Config, pipeline_tag: str, path: str, new: set[str]) -> None:
    """Freeze the pretrained weights and add trainable matrices to `lora_target_modules`, inside the model (Hu
    et al., 2022). The head is trained, and so are the `new` parameters, which are missing in `path`.

    Raises `UserError` for targets that the model does not have, or if peft knows none for it."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    assert options.lora_rank is not None
    trained = head_names(model) | new
    kinds = torch.nn.Linear | Conv1D
    linear = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    body = [name for name in linear if f"{name}.weight" not in trained]
    targets = options.lora_targets
    if targets == [ALL_LINEAR]:
        targets = sorted({name.rpartition(".")[2] for name in body})
    # The head is trained in full.
    outside = [name for name in linear if name not in body and _names(name, targets)]
    config = LoraConfig(
        r=options.lora_rank, lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        lora_dropout=options.lora_dropout, target_modules=targets or None, exclude_modules=outside or None,
        task_type=TASK_TYPES.get(pipeline_tag), base_model_name_or_path=path,
        revision=options.model_revision,
        fan_in_fan_out=all(isinstance(model.get_submodule(name), Conv1D) for name in body),  # GPT-2's way
    )  # fmt: skip
    try:
        inject_adapter_in_model(config, model, adapter_name=NAME)
    except ValueError as error:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in body}))
        found = f"found {', '.join(targets)}" if targets else f"peft has none for a {type(model).__name__}"
        raise UserError(
            f"lora_target_modules: {found}; expected {ALL_LINEAR}, or some of {known} "
            f"({first_line(error)[:200]})"
        ) from None
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.requires_grad_(True)


def has_lora(model: Any) -> bool:
    """Whether the model has the adapter of `add_lora`."""
    return NAME in (getattr(model, "peft_config", None) or {})


@torch.no_grad()
def merge(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of an equivalent model without LoRA; `state` is that of `model`, which is not
    changed."""
    merged = {
        name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name
    }
    for path, module in model.named_modules():
        if hasattr(module, "base_layer"):
            # The model's own tensors may be sharded.
            of_it = {f"layer.{name}": state[f"{path}.{name}"] for name, _ in module.named_parameters()}
            delta = torch.func.functional_call(_Delta(module), of_it, (NAME,))
            # A GPU that trains adapters may not hold the model a second time.
            merged[f"{path}.weight"] = (merged[f"{path}.weight"] + delta).cpu()
    return merged


class _Delta(torch.nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, name: str) -> torch.Tensor:
        return self.layer.get_delta_weight(name)


def save_adapter(model: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the trained weights of `state` as an adapter that `peft.PeftModel.from_pretrained` loads."""
    from safetensors.torch import save_file

    folder.mkdir()
    config = copy.copy(model.peft_config[NAME])
    config.target_modules, config.inference_mode = sorted(config.target_modules), True
    whole = [name for name in _trained(model) if ".lora_" not in name]
    head = head_names(model)
    config.modules_to_save = sorted(
        {name.partition(".")[0] if name in head else name.rpartition(".")[0] for name in whole}
    )
    config.save_pretrained(folder)
    tensors = {_stored(name): state[name].contiguous() for name in _trained(model)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    for path in folder.iterdir():
        flush(path)


def load_adapter(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The weights that `save_adapter` wrote, under their names in the model."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: tensors[_stored(name)] for name in _trained(model)}


def _trained(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _stored(name: str) -> str:
    """A parameter's name in peft's files."""
    return STEM + (name.replace(f".{NAME}", "") if ".lora_" in name else name)


def _names(name: str, targets: list[str]) -> bool:
    """Whether peft takes one of the targets for the module `name`."""
    return any(name == target or name.endswith(f".{target}") for target in targets)
