"""Uploads best/ to the Hub: checked before the training, done after it."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Any

from ft.config import Config
from ft.errors import UserError, first_line

ADAPTER = ("adapter/", "adapter_config.json", "adapter_model.")  # begin the names of files of a LoRA adapter


def check_hub(config: Config, create: bool = True) -> str:
    """The id of the repository to which best/ will be pushed, created here if it does not exist; "" if
    nothing is to be pushed. Raises `UserError` if pushing would fail. Without `create`, nothing is
    created."""
    if not config.push_to_hub:
        return ""
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError("push_to_hub: HF_HUB_OFFLINE is set; unset it, or push later with `hf upload`.")
    if get_token() is None:
        raise UserError("push_to_hub: no token; run `hf auth login`, set HF_TOKEN, or leave push_to_hub out.")
    api, name = HfApi(), config.hub_model_id or Path(config.output_dir).resolve().name
    try:
        account = api.whoami()["name"]
        if create:
            name = name if "/" in name else f"{account}/{name}"
            name = api.create_repo(name, private=config.hub_private_repo, exist_ok=True).repo_id
            _check_write(api, name)
    except Exception as error:  # of the network, the account or the name, each with a type of its own
        raise UserError(
            f"push_to_hub: {constants.ENDPOINT} does not take {name}: {first_line(error)}"
        ) from None
    if create and config.hub_private_repo is not None:
        _check_private(api, name, config.hub_private_repo)
    return name


def _check_write(api: Any, name: str) -> None:
    """Raise the Hub's error if the account may see a repository but not write to it: "creating" an existing
    one succeeds all the same."""
    try:
        api.auth_check(name, write=True)
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", None) == 403:
            raise


def _check_private(api: Any, name: str, asked: bool) -> None:
    """Raise `UserError` if an existing repository is private, or public, against the user's wish: the Hub
    leaves it as it is."""
    found = None
    with contextlib.suppress(Exception):  # the push itself says what is wrong
        found = api.repo_info(name).private
    if found is not None and found != asked:
        kinds = {True: "private", False: "public"}
        raise UserError(
            f"hub_private_repo: found {asked}, but {name} is there already, and is {kinds[found]}; make it "
            f"{kinds[asked]} in its settings, or name another hub_model_id."
        )


def push(name: str, folder: Path) -> str:
    """Upload the model in `folder` to a repository as one commit; returns its URL. Raises `UserError` if that
    fails: by then, the run itself is finished and complete."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Fine-tuned model",
            delete_patterns=_adapter_files(api, name) or None,
        )  # fmt: skip
    except Exception as error:
        again = shlex.join(["hf", "upload", name, str(folder)])
        raise UserError(
            f"push_to_hub: the run is finished, but {folder} could not be uploaded: {first_line(error)} Try "
            f"again: {again}"
        ) from None
    return str(commit.commit_url)


def _adapter_files(api: Any, name: str) -> list[str]:
    """The files of an adapter in a repository, to be deleted: Transformers would load it instead of the model
    beside it. (That of this model is uploaded in the same commit.)"""
    with contextlib.suppress(Exception):
        return [file for file in api.list_repo_files(name) if file.startswith(ADAPTER)]
    return []
