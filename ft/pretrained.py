"""What a pretrained model's folder says before its weights are loaded: config, tokenizer, maximum text
length."""

from __future__ import annotations

import difflib
import json
import math
from pathlib import Path
from typing import Any

from ft.config import Config
from ft.data.files import is_pointer
from ft.data.sources import local_path
from ft.errors import UserError
from ft.options import ModelOptions
from ft.values import precision_name

# These take a token type as a word: the embedding of the token with that number is added.
TYPES_ARE_WORDS = "codegen ctrl gpt2 gpt_bigcode gpt_neo gptj openai-gpt".split()
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Entries of a model's config that are set by something else here.
OWNED = {
    **dict.fromkeys(("num_labels", "id2label", "label2id", "problem_type"), "the data"),
    **dict.fromkeys(("dtype", "torch_dtype"), "the launch: accelerate launch --mixed_precision bf16"),
    **dict.fromkeys(("model_type", "architectures", "transformers_version"), "model_name_or_path"),
    "pad_token_id": "the tokenizer",
    **dict.fromkeys(("return_dict", "output_hidden_states", "output_attentions"), "the loop"),
}
# RoBERTa and its kin count positions from after the padding token's id: a table of 514 holds 512.
POSITIONS_AFTER_PADDING = (
    "camembert data2vec-text esm ibert layoutlmv3 lilt longformer luke markuplm mpnet roberta "
    "roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod"
).split()


def find_model(name: str, key: str = "model_name_or_path") -> str:
    """A local folder as a path, or the unchanged name, for the Hub. Raises `UserError` for a path that is no
    folder; `key` is the option that names it."""
    path = local_path(name)
    looks_local = name.startswith(("pkg:", ".", "/", "~")) or name.count("/") > 1
    if path.is_dir():
        return str(path)
    if path.exists() or looks_local:
        raise UserError(f"{key}: {name!r} is not a folder; expected a model folder, Hub id or pkg: path.")
    return name


def training_columns(options: ModelOptions) -> tuple[tuple[str, ...], str | None]:
    """The text columns and the label that a model in best/ or final/ of a run was trained on, named or
    inferred; nothing if the run does not say."""
    try:
        known = of_training(options)["columns"]
        return tuple(known["texts"]), known["label"]
    except (KeyError, TypeError):
        return (), None


def precision_note(options: ModelOptions, precision: str) -> list[str]:
    """A note for the user who scores a model of a run in another mixed precision than the run's."""
    known = of_training(options).get("mixed_precision", precision)
    if known == precision:
        return []
    then, now = precision_name(known), precision_name(precision)
    return [
        f"WARNING mixed precision: training scored in {then}, this launch scores in {now}; accelerate launch "
        f"--mixed_precision {known} gives the numbers of training"
    ]


def of_training(options: ModelOptions) -> dict[str, Any]:
    """The environment.json of the run to which a model in best/ or final/ belongs; empty if there is none."""
    folder = local_path(options.model_name_or_path).resolve()
    if folder.name not in ("best", "final"):
        return {}
    path = folder.parent / "environment.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def check_model_folder(path: str, allow_pickle: bool) -> None:
    """Refuse a local folder that lacks config or weights, before any work is spent on the data."""
    folder = Path(path)
    if not folder.is_dir():
        return
    if not (folder / "config.json").exists():
        best = folder / "best"  # of a run's output_dir
        hint = f"did you mean {str(best)!r}?" if best.is_dir() else "expected a Transformers model folder."
        if (folder / "adapter_config.json").exists():
            hint = "it is an adapter; its merged model is in best/ or final/, one folder up."
        raise UserError(f"model_name_or_path: {path!r} holds no config.json; {hint}")
    if not any((folder / name).exists() for name in WEIGHT_FILES):
        raise UserError(f"model_name_or_path: {path!r} holds no weights; expected {WEIGHT_FILES[0]}.")
    fetched = [*WEIGHT_FILES, "tokenizer.json", *(path.name for path in folder.glob("*.model"))]
    pointers = [name for name in fetched if (folder / name).exists() and is_pointer(folder / name)]
    if pointers:
        raise UserError(
            f"model_name_or_path: {str(folder / pointers[0])!r} is a Git LFS pointer to a file that was "
            "not fetched; run `git lfs pull` there."
        )
    if not allow_pickle and not any((folder / name).exists() for name in WEIGHT_FILES[:2]):
        raise UserError(
            f"model_name_or_path: {path!r} holds its weights in a pickle, a format that can run code; "
            f"expected {WEIGHT_FILES[0]}. Convert it, or, if you trust its source, set allow_pickle."
        )


def load_model_config(options: Config) -> Any:
    """The model's config with `config_overrides` applied; also settles how long texts are cut."""
    from transformers import AutoConfig

    path = find_model(options.model_name_or_path)
    check_model_folder(path, options.allow_pickle)
    # An evaluation has a run's config.yaml, with the trained folder in place of its model.
    is_asked = options.PURPOSE == "training" and options.model_revision != ModelOptions.model_revision
    if is_asked and Path(path).is_dir():
        raise UserError(
            f"model_revision: found {options.model_revision!r}, but {options.model_name_or_path!r} is a "
            "folder, which has no revisions; leave it out."
        )
    config = _from_pretrained(
        AutoConfig, "model_name_or_path", path, revision=options.model_revision,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    apply_overrides(config, options.config_overrides or "")
    settle_long_text(options, config)
    return config


def settle_long_text(options: Config, model_config: Any) -> None:
    """Fill in long_text and max_windows if the user left them to the model, and record them in the model's
    config, so that whoever loads an exported model can cut texts as in its training."""
    if options.long_text is None:
        options.long_text = getattr(model_config, "long_text", None) or "truncate"
    if options.max_windows is not None and options.long_text != "windows":
        raise UserError(
            f"max_windows: needs long_text: windows, but long_text is {options.long_text}; leave it out."
        )
    theirs = getattr(model_config, "max_windows", None)
    options.max_windows = (options.max_windows or theirs or 8) if options.long_text == "windows" else None
    for name in ("long_text", "max_windows"):
        value = getattr(options, name)
        if value not in (None, "truncate"):
            setattr(model_config, name, value)
        elif hasattr(model_config, name):
            delattr(model_config, name)


def apply_overrides(config: Any, text: str) -> None:
    """Change a model's config by "name=value,..."; each value takes the type of the existing one.

    (Its own update_from_string cannot set what is None, and accepts NaN.)"""
    known = [*config.to_dict(), *config.attribute_map]
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if name in OWNED:
            raise UserError(f"config_overrides: {name!r} is decided by {OWNED[name]}; leave it out.")
        if not equals or name not in known:
            near = difflib.get_close_matches(name, known, n=1) if equals else []
            hint = f"did you mean {near[0]!r}?" if near else "expected name=value pairs, separated by commas."
            raise UserError(f"config_overrides: {pair!r} names nothing in the model's config; {hint}")
        try:
            setattr(config, name, _like(getattr(config, name), value))
        except Exception as error:  # the config's own checks raise a type of their own
            why = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"config_overrides: {pair!r} is wrong: {why[-1].strip()}.") from None


def _like(old: Any, text: str) -> Any:
    """A value of the type of `old`; if that is None, of the type that the text looks like. Where a whole
    number is, a fraction may be allowed, too (a dropout of 0), which the config's own checks know."""
    switches = {"true": True, "false": False}
    if isinstance(old, bool):
        if text.lower() not in switches:
            raise ValueError("expected true or false")
        return switches[text.lower()]
    if isinstance(old, str):
        return text
    if isinstance(old, int) and text.lstrip("+-").isdigit():
        return int(text)
    if old is not None and not isinstance(old, int | float):
        raise ValueError(f"it holds {old!r}; only numbers, texts, true and false can be changed")
    try:
        number = float(text)
    except ValueError:
        if old is not None:
            raise
        return switches.get(text.lower(), text)
    if not math.isfinite(number):
        raise ValueError("expected a finite number")
    return int(text) if old is None and text.lstrip("-").isdigit() else number


def _settle_padding_and_types(model_config: Any, tokenizer: Any) -> None:
    """Set the model's padding token to the tokenizer's: a decoder's head reads the last token that is not
    padding (SmolLM3's config.json names another). Not if positions are counted from it (RoBERTa).

    Have the tokenizer pad where texts are padded: on the right, except for XLNet, whose head reads the last
    position, whatever it holds. And have it give no token types to a model without any: some RoBERTas and
    GPT-2s have the tokenizer of BERT (klue/roberta-base, uer/gpt2-chinese)."""
    tokenizer.padding_side = "left" if model_config.model_type == "xlnet" else "right"
    types = 1 if model_config.model_type in TYPES_ARE_WORDS else getattr(model_config, "type_vocab_size", 2)
    if types == 1 and "token_type_ids" in tokenizer.model_input_names:
        names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        # The second is what an export writes, and what an encoding is identified by.
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    for config in (model_config, model_config.get_text_config()):
        known = getattr(config, "pad_token_id", None) is not None
        if known and config.model_type in POSITIONS_AFTER_PADDING:
            continue
        if not known or tokenizer.pad_token_id < (getattr(config, "vocab_size", None) or 0):
            config.pad_token_id = tokenizer.pad_token_id


def load_tokenizer(options: ModelOptions, model_config: Any) -> Any:
    """The model's tokenizer, or the one that `tokenizer_name` names. It always has a padding token, which is
    also set in `model_config`. Raises `UserError` if there is none."""
    from transformers import AutoTokenizer

    key = "tokenizer_name" if options.tokenizer_name else "model_name_or_path"
    path = find_model(options.tokenizer_name or options.model_name_or_path, key)
    tokenizer = _from_pretrained(
        AutoTokenizer, key, path, trust_remote_code=options.trust_remote_code,
        **({} if options.tokenizer_name else {"revision": options.model_revision}),
    )  # fmt: skip
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # made from nothing but its class
        raise UserError(
            f"{key}: {path!r} holds no tokenizer; expected tokenizer.json, or set tokenizer_name."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    known = getattr(model_config, "pad_token_id", None)
    if tokenizer.pad_token is None and known is not None and 0 <= known < len(tokenizer):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(known)
    if tokenizer.pad_token is None:
        raise UserError(
            f"{key}: the tokenizer of {path!r} has no padding, end-of-text or unknown token; "
            "give it one (tokenizer.pad_token = ...) and save it."
        )
    _settle_padding_and_types(model_config, tokenizer)
    return tokenizer


def _from_pretrained(auto_class: Any, key: str, path: str, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(path, **options)
    except MemoryError:
        raise
    except Exception as error:  # config checks and tokenizer files have error types of their own
        why = " ".join(str(error).split())[:400] or type(error).__name__
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{key}: {path!r} brings code of its own, which is not run; set trust_remote_code if you "
                "have read it, or choose another model."
            ) from None
        # Transformers' fallback, for which the file is of the wrong kind.
        is_folder = Path(path).is_dir()
        if "tiktoken" in str(error) and (any(Path(path).glob("*.model")) or not is_folder):
            what = "has its tokenizer as a SentencePiece file alone, which"
            what = what if is_folder else "has no tokenizer.json; a SentencePiece file alone"
            raise UserError(
                f"{key}: {path!r} {what} takes pip install sentencepiece protobuf (where both are there, the "
                "file is damaged)."
            ) from None
        hint = "; for another tokenizer, set tokenizer_name" if "Tokenizer" in auto_class.__name__ else ""
        what = "" if is_folder else "is no folder here, and "
        raise UserError(f"{key}: {path!r} {what}cannot be loaded: {why.rstrip(': .')}{hint}.") from None


def longest_text(asked: int | None, tokenizer: Any, model_config: Any) -> int:
    """max_length in tokens: the one requested, at most what the model has positions for, or else that
    limit. Raises `UserError` for one that they do not allow."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None) or 10**6
    if positions < 0:  # XLNet's way to say that it has no limit
        positions = 10**6
    if model_config.model_type in POSITIONS_AFTER_PADDING:
        positions -= (model_config.pad_token_id or 0) + 1
    limit = min(tokenizer.model_max_length, positions)
    least = tokenizer.num_special_tokens_to_add() + 1
    if asked is None:
        return limit if limit < 10**6 else 512
    if not least <= asked <= limit:
        hint = ""
        if asked > limit and limit < positions:  # as that of a model that was trained on shorter texts
            hint = " The limit is the tokenizer's; tokenizer_name may name one that takes longer texts."
        raise UserError(
            f"max_length: found {asked}, expected {least} to {limit} tokens with this model and tokenizer."
            + hint
        )
    return asked
