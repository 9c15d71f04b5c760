"""Tokenizer and pretrained model in, exported model out."""

from __future__ import annotations

import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from ft.checkpoint import replace_folder
from ft.config import Config, ModelOptions
from ft.data.sources import local_path
from ft.errors import UserError
from ft.tasks.base import Task

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def find_model(name: str, key: str = "model_name_or_path") -> str:
    """A local folder as a path, or the name as it is, for the Hub."""
    path = local_path(name)
    looks_local = name.startswith(("pkg:", ".", "/", "~")) or name.count("/") > 1
    if path.is_dir():
        return str(path)
    if path.exists() or looks_local:
        raise UserError(f"{key}: {name!r} is no folder; expected a model folder, a Hub id or a pkg: path.")
    return name


def check_model_folder(path: str, allow_pickle: bool) -> None:
    """Refuse a local folder that lacks config or weights, before any work is spent on the data."""
    folder = Path(path)
    if not folder.is_dir():
        return
    if not (folder / "config.json").exists():
        raise UserError(
            f"model_name_or_path: {path!r} holds no config.json; expected a Transformers model folder."
        )
    if not any((folder / name).exists() for name in WEIGHT_FILES):
        raise UserError(f"model_name_or_path: {path!r} holds no weights; expected {WEIGHT_FILES[0]}.")
    if not allow_pickle and not any((folder / name).exists() for name in WEIGHT_FILES[:2]):
        raise UserError(
            f"model_name_or_path: {path!r} holds its weights in a pickle, a format that can hide programs; "
            f"expected {WEIGHT_FILES[0]}. Convert it, or, if you trust its source, set allow_pickle."
        )


def load_model_config(options: ModelOptions) -> Any:
    """The model's config with `config_overrides` applied."""
    from transformers import AutoConfig

    path = find_model(options.model_name_or_path)
    check_model_folder(path, options.allow_pickle)
    config = _from_pretrained(
        AutoConfig, "model_name_or_path", path, revision=options.model_revision,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    if options.config_overrides:
        try:
            config.update_from_string(options.config_overrides.replace(" ", ""))
        except ValueError as error:
            raise UserError(
                f"config_overrides: {options.config_overrides!r}: {error}; expected name=value pairs of this "
                f"model's config, separated by commas."
            ) from None
    return config


def load_tokenizer(options: ModelOptions) -> Any:
    """The model's tokenizer, or the one that `tokenizer_name` names. It always has a padding token."""
    from transformers import AutoTokenizer

    key = "tokenizer_name" if options.tokenizer_name else "model_name_or_path"
    path = find_model(options.tokenizer_name or options.model_name_or_path, key)
    tokenizer = _from_pretrained(
        AutoTokenizer, key, path, trust_remote_code=options.trust_remote_code,
        **({} if options.tokenizer_name else {"revision": options.model_revision}),
    )  # fmt: skip
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # made up from nothing but its class
        raise UserError(
            f"{key}: {path!r} holds no tokenizer; expected tokenizer.json, or set tokenizer_name."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _from_pretrained(auto_class: Any, key: str, path: str, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{key}: {path!r} brings code of its own, which is not run; set trust_remote_code if you "
                "have read it, or choose another model."
            ) from None
        hint = "; for another tokenizer, set tokenizer_name" if "Tokenizer" in auto_class.__name__ else ""
        raise UserError(f"{key}: {path!r} cannot be loaded: {first.rstrip(': ')}{hint}.") from None


def longest_text(asked: int | None, tokenizer: Any, model_config: Any) -> int:
    """max_length in tokens: the one asked for, at most what the model has positions for, or that limit."""
    positions = getattr(model_config, "max_position_embeddings", None) or 10**6
    limit = min(tokenizer.model_max_length, positions)
    least = tokenizer.num_special_tokens_to_add() + 1
    if asked is None:
        return limit if limit < 10**6 else 512
    if not least <= asked <= limit:
        raise UserError(
            f"max_length: found {asked}, expected {least} to {limit} tokens with this model and tokenizer."
        )
    return asked


def build_model(options: Config, task: Task, model_config: Any, tokenizer: Any) -> Any:
    """The pretrained model with the task's head, in fp32 on the CPU."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # its bars of one second each would stand between ours
    if model_config.pad_token_id is None:
        model_config.pad_token_id = tokenizer.pad_token_id
    path = find_model(options.model_name_or_path)
    try:
        model: Any = task.build_model(
            path, model_config, revision=options.model_revision, trust_remote_code=options.trust_remote_code,
            dtype=torch.float32, ignore_mismatched_sizes=True,
            use_safetensors=None if options.allow_pickle else True, weights_only=True,
        )  # fmt: skip
    except (OSError, ValueError, SafetensorError, UnpicklingError) as error:
        raise UserError(
            f"model_name_or_path: {path!r} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from None
    if options.gradient_checkpointing:
        # Its new name since Transformers 5.2x, or the one before.
        new_name = getattr(model, "activation_checkpointing_enable", None)
        (new_name or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"tokenizer_name: the tokenizer has {len(tokenizer):,} tokens, but the model has embeddings for "
            f"{model.get_input_embeddings().num_embeddings:,}; they do not belong together."
        )
    return model


def export(
    model: Any,
    state: dict[str, torch.Tensor],
    tokenizer: Any,
    max_length: int,
    folder: Path,
    card: str,
) -> None:
    """Write a model folder that `from_pretrained` and `pipeline` load: whole, or not at all.

    `max_length` goes along as the tokenizer's limit, so that later texts are cut where the training texts
    were."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, state_dict=state)
    before, tokenizer.model_max_length = tokenizer.model_max_length, max_length
    tokenizer.save_pretrained(temporary)
    tokenizer.model_max_length = before
    (temporary / "README.md").write_text(card, encoding="utf-8")
    replace_folder(temporary, folder)


def load_weights(model: torch.nn.Module, folder: Path, accelerator: Any) -> None:
    """Give the prepared model the weights of an exported folder. The main process reads; the others, which
    may stand on hosts that do not see the folder, are sent them."""
    from accelerate.utils import broadcast
    from safetensors.torch import load_model

    plain = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        load_model(plain, str(folder / "model.safetensors"))
    if accelerator.num_processes > 1:
        for tensor in plain.state_dict().values():
            broadcast(tensor, from_process=0)


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its place and rename it, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
