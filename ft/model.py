"""Loads pretrained weights, and exports the trained model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from ft.config import Config
from ft.data.audit import describe_rows
from ft.data.encode import EncodedRows
from ft.durable import replace_folder
from ft.errors import UserError
from ft.last_layer import narrow_last_layer
from ft.layers import freeze
from ft.lora import add_lora, has_lora, load_adapter, merge, save_adapter
from ft.pretrained import find_model
from ft.sharded import distinct, fill, whole
from ft.tasks.base import Task
from ft.words import used_words, word_embeddings


def build_model(options: Config, task: Task, model_config: Any, tokenizer: Any, notes: list[str]) -> Any:
    """The pretrained model with the task's head, in fp32 on the CPU; adds to `notes` what the user should
    know about it. Raises `UserError` for a model that cannot be loaded or does not suit options, tokenizer or
    task."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # its bars of one second each would come between ours
    path = find_model(options.model_name_or_path)
    if getattr(model_config, "attention_type", None) == "block_sparse":
        model_config.attention_type = "original_full"
        notes.append(
            "the model attends to whole texts: BigBird drops sparse attention for good at the first "
            "batch of short texts, so results would depend on the order of batches"
        )
    try:
        model, loaded = task.build_model(
            path, model_config, notes, revision=options.model_revision,
            trust_remote_code=options.trust_remote_code, dtype=torch.float32, ignore_mismatched_sizes=True,
            use_safetensors=None if options.allow_pickle else True, weights_only=True,
        )  # fmt: skip
    except UserError:
        raise
    except Exception as error:  # whatever a model's code raises for an impossible config
        why = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
        is_file = isinstance(error, OSError | SafetensorError | UnpicklingError)
        if options.config_overrides and not is_file:
            raise UserError(
                f"config_overrides: {options.config_overrides!r}: the model cannot be built: {why}"
            ) from error
        if not options.allow_pickle and "use_safetensors" in str(error):  # from the Hub
            raise UserError(
                f"model_name_or_path: {path!r} has its weights as a pickle alone, which can run code: if you "
                "trust its source, set allow_pickle."
            ) from error
        raise UserError(f"model_name_or_path: {path!r} cannot be loaded: {why}") from error
    _check_loaded(model, loaded, path, options, notes)
    for part in model.modules():  # T5's decoder has a config of its own
        if getattr(getattr(part, "config", None), "use_cache", False):
            part.config.use_cache = False  # it is for generating the next token: there is none here
    if options.PURPOSE == "training":
        freeze(model, options.frozen)
        if options.lora_rank is not None:
            add_lora(model, options, task.pipeline_tag, path, set(loaded["missing_keys"]))
    draws = options.PURPOSE == "training" and options.dropout_mode == "torch"
    notes += narrow_last_layer(model, draws)
    if options.gradient_checkpointing:
        checkpoint_activations(model)
    there = embedded_tokens(model)
    if there is not None and tokenizer.vocab_size > there:
        raise UserError(
            f"tokenizer_name: the tokenizer has {tokenizer.vocab_size:,} tokens, but the model has "
            f"embeddings for {there:,}; they do not belong together."
        )
    if there is not None and tokenizer.pad_token_id >= there:
        raise UserError(
            f"tokenizer_name: the padding token {tokenizer.pad_token!r}, number {tokenizer.pad_token_id:,}, "
            f"was added to the tokenizer, but the model has embeddings for {there:,} tokens: add one "
            "(model.resize_token_embeddings), and save the model with its tokenizer."
        )
    return model


def embedded_tokens(model: Any) -> int | None:
    """How many tokens the model has embeddings for; None if they do not come from a table."""
    return getattr(word_embeddings(model), "num_embeddings", None)


def check_tokens(model: Any, tokenizer: Any, splits: dict[str, EncodedRows]) -> None:
    """Raise `UserError` for a text with a token that the model has no embedding for: one that was added only
    to the tokenizer. (Gemma 3 has such a token for images, which no ordinary text holds.) Also for a text
    that contains the token by which BART, T5 and similar models find its end: they refuse any batch with
    it."""
    there = embedded_tokens(model)
    end = model.config.eos_token_id if model.config.is_encoder_decoder else None
    # (T5Gemma takes the last token.)
    if not isinstance(end, int) or model.config.model_type.startswith("t5gemma"):
        end = None
    for split, rows in splits.items():
        if end is not None:
            pieces = 1 if rows.pieces is None else rows.pieces
            times = rows.times(end)
            # The tokenizer ends all pieces alike, with the fewest that any has; the rest are in texts.
            odd = np.flatnonzero(times != pieces * (times // pieces).min())
            if len(odd):
                raise UserError(
                    f"{split} data: {describe_rows(rows.row[odd])}: the text holds "
                    f"{tokenizer.convert_ids_to_tokens(end)!r}, which ends a text for this model; "
                    "rows count from 0. Remove it."
                )
        if there is None or len(tokenizer) <= there:
            continue
        if (highest := rows.highest_token()) >= there:
            raise UserError(
                f"{split} data: a text holds the token {tokenizer.convert_ids_to_tokens(highest)!r}, which "
                "was added to the tokenizer, but the model has no embedding for it: add one "
                "(model.resize_token_embeddings), and save the model with its tokenizer."
            )


def _check_loaded(model: Any, loaded: dict[str, Any], path: str, options: Config, notes: list[str]) -> None:
    """Say which weights of the model, except a new head, start at random because the folder lacks them;
    refuse a model that is not the one in the folder. For an evaluation, every weight must be there."""
    stem = f"{model.base_model_prefix}."
    missing = sorted(loaded["missing_keys"])
    other_size = sorted(loaded["mismatched_keys"], key=lambda entry: entry[0])
    if options.PURPOSE == "evaluation" and (missing or other_size):
        first = [*missing, *(name for name, *_ in other_size)][0]
        raise UserError(
            f"model_name_or_path: {path!r} lacks weights ({first} ...), so it was not trained for this task; "
            "expected a model that train.py has written, such as output_dir/best."
        )
    for name, found, expected in other_size:
        if name.startswith(stem):
            key = "config_overrides" if options.config_overrides else "model_name_or_path"
            raise UserError(
                f"{key}: the weights in {path!r} do not fit the model's config: {name} is {list(found)} "
                f"there and {list(expected)} in the config; pretrained weights cannot change their size."
            )
    missing = [name for name in missing if name.startswith(stem)]
    total = sum(name.startswith(stem) for name, _ in model.named_parameters())
    if total and len(missing) >= total:
        raise UserError(
            f"model_name_or_path: {path!r} holds none of the weights of a {type(model).__name__}; expected "
            "a pretrained model of this kind."
        )
    for name, parameter in model.named_parameters():
        parameter.was_drawn = name in missing  # which `weights_mark` leaves out
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        notes.append(
            f"WARNING model: {len(missing)} of {total} pretrained weights are not in {path!r} and start at "
            f"random: {', '.join(missing[:3])}{more}"
        )


def checkpoint_activations(model: Any, **options: Any) -> None:
    """Have the model recompute activations in the backward pass; `options` go to torch.utils.checkpoint."""
    # Its new name since Transformers 5.2x, or the one before.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False, **options})
    except ValueError as error:
        raise UserError(
            f"gradient_checkpointing: a {type(model).__name__} has no way to compute activations again; "
            "leave it out, and lower per_device_train_batch_size to save memory."
        ) from error


def export(
    model: Any,
    state: dict[str, torch.Tensor],
    tokenizer: Any,
    max_length: int,
    folder: Path,
    card: str,
    keep: Path | None = None,
) -> None:
    """Write a model folder that `from_pretrained` and `pipeline` load, atomically. An older one there is kept
    as `keep`, if that is given.

    `max_length` is stored as the tokenizer's limit, so that later texts are cut where the training texts
    were."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    before, tokenizer.model_max_length = tokenizer.model_max_length, max_length
    try:
        # Under the names that the weights have in the model, not in the folder it came from (in
        # bert-base-cased, LayerNorm.gamma; in mixtures of experts, others), as `load_weights` reads them.
        model.save_pretrained(
            temporary,
            state_dict=merge(model, state) if has_lora(model) else state,
            save_original_format=False,
            max_shard_size="10TB",  # one file, whatever the model: it is read as one
        )
        if has_lora(model):
            save_adapter(model, state, temporary / "adapter")
        try:
            tokenizer.save_pretrained(temporary)
        except Exception as error:  # Rust's have no type of their own for a full disk
            raise OSError(error) from None
        (temporary / "README.md").write_text(card, encoding="utf-8")
        replace_folder(temporary, folder, keep)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"output_dir: {str(folder)!r} cannot be written: {error}. Make room, then resume with "
            "--resume_from_checkpoint latest (without a checkpoint, that trains anew)."
        ) from None
    finally:
        tokenizer.model_max_length = before


def load_weights(model: torch.nn.Module, folder: Path, accelerator: Any, task: Task) -> None:
    """Load the weights of an exported folder into the prepared model. The main process reads and sends them
    to the others, which may be on hosts that do not see the folder."""
    from accelerate.utils import broadcast, broadcast_object_list
    from safetensors.torch import load_file

    plain = accelerator.unwrap_model(model)
    values: dict[str, torch.Tensor] = {}
    tables = used_words(plain)
    # Gathered by all processes, which may hold shards.
    ones = {name: whole(words.weight.detach())[-1:].cpu() for name, words in tables.items()}
    if accelerator.is_main_process:
        if has_lora(plain):
            values = load_adapter(plain, folder / "adapter")  # merged weights cannot be trained further
        else:
            values = load_file(folder / "model.safetensors")
            for name in tables.keys() & values.keys():
                values[name] = torch.cat([values[name][tables[name].tokens], ones[name]])
            elements = sum(tensor.numel() for tensor in distinct(plain).values())
            if (
                sum(v.numel() for v in values.values()) != elements
                or values.keys() - plain.state_dict().keys()
            ):
                raise RuntimeError(f"{folder}: its weights are not those of this model")
        model_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        values = task.import_weights(values, model_config)
    (names,) = broadcast_object_list([list(values)])
    own, device = plain.state_dict(keep_vars=True), accelerator.device
    for name in names:
        shape, dtype = own[name].shape, own[name].dtype
        value = values[name].to(device) if values else torch.empty(shape, dtype=dtype, device=device)
        fill(own[name], broadcast(value))
