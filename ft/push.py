"""best/ to the Hub: asked for before the training, done after it."""

from __future__ import annotations

import shlex
from pathlib import Path

from ft.config import Config
from ft.errors import UserError, first_line


def check_hub(config: Config, create: bool = True) -> None:
    """Raise `UserError` where best/ could not be pushed later on. `create` makes the repository, which also
    shows that the account may write there, and fills in hub_model_id."""
    if not config.push_to_hub:
        return
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
            made = api.create_repo(name, private=config.hub_private_repo, exist_ok=True)
            config.hub_model_id = made.repo_id
    except Exception as error:  # of the network, the account or the name, each with a type of its own
        raise UserError(
            f"push_to_hub: {constants.ENDPOINT} does not take {name}: {first_line(error)}"
        ) from None


def push(config: Config, folder: Path) -> str:
    """Upload the model in `folder` as one commit; returns where it is. Raises `UserError` where that fails:
    the run itself is finished by then, and whole."""
    from huggingface_hub import HfApi

    assert config.hub_model_id is not None
    try:
        commit = HfApi().upload_folder(
            repo_id=config.hub_model_id, folder_path=folder, commit_message="Fine-tuned model"
        )
    except Exception as error:
        again = shlex.join(["hf", "upload", config.hub_model_id, str(folder)])
        raise UserError(
            f"push_to_hub: the run is finished, but {folder} could not be uploaded: {first_line(error)} Try "
            f"again: {again}"
        ) from None
    return str(commit.commit_url)
